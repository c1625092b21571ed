"""`inspect`: what a store, or the primer, holds; any document or block of it, decoded; and how a model will run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from cartilha.blocks.mixing import MixtureSampler
from cartilha.blocks.sampler import BlockSampler
from cartilha.config import InspectConfig
from cartilha.corpus.primer import PrimerCount, primer_table
from cartilha.corpus.sources import PrimerSource, resolve_inputs
from cartilha.corpus.splits import SPLITS, Split
from cartilha.errors import UserError, counted
from cartilha.model_reference import ADAPTER_CONFIG
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.result import Result
from cartilha.preparation.selection_report import explain, not_chosen
from cartilha.runs.sources import Mix
from cartilha.tokens.store import TokenStore
from cartilha.tokens.summary import summarize

FIRST_DOCUMENTS, FIRST_TOKENS = 3, 24  # shown of each side, and of each of them


@dataclass(frozen=True)
class InspectResult(Result):
    """The facts of a store, or the primer's texts by genre and variety; None stands for what was not asked for.

    Documents and blocks count from 1. A block has `segments`, one for each piece of a document.
    """

    store: dict[str, Any] | None = None  # what store.json records, without the hashes of the files
    primer: tuple[PrimerCount, ...] | None = None
    summary: dict[str, Any] | None = None
    first_documents: tuple[dict[str, Any], ...] | None = None  # how those of each side begin
    document: dict[str, Any] | None = None
    block: dict[str, Any] | None = None
    model: dict[str, Any] | None = None  # its type, size and context, and how it runs in a line

    def to_dict(self) -> dict[str, Any]:
        """What there is, as plain values."""
        return {name: value for name, value in super().to_dict().items() if value is not None}


def inspect(config: InspectConfig) -> InspectResult:
    """Look at a store, the primer or a model; a UserError says that there is no such store, document or block."""
    preflight(config)
    looks_closer = config.document is not None or config.block is not None or config.weights
    if re.match("primer(:|$)", config.what) and not Path(config.what).is_dir():
        (primer,) = resolve_inputs([config.what])
        assert isinstance(primer, PrimerSource)
        if looks_closer:
            raise UserError("The primer has no documents and blocks to look at before it is prepared; name a store.")
        return InspectResult(primer=tuple(primer_table(primer.language)))
    if _is_model(config.what):
        if looks_closer:
            raise UserError(f"{config.what} is a model, which has no documents and blocks; name a store.")
        return InspectResult(model=_model(config.what))
    store = TokenStore(config.what)
    if config.weights and config.document is None:
        raise UserError("--weights is about one document; name it with --document.")
    return InspectResult(
        store={key: value for key, value in store.info.items() if key != "files"},
        summary=asdict(summarize(store)),
        first_documents=tuple(_first_documents(store)),
        document=None if config.document is None else _document(store, config),
        block=None if config.block is None else _block(store, config),
    )


def _is_model(what: str) -> bool:
    """Whether this is a MODEL argument: a scheme, a GGUF file, a directory with a model, or the hub's USER/NAME."""
    path = Path(what)
    if what.startswith(("random:", "package:")) or what.endswith(".gguf"):
        return True
    if path.is_dir():
        return any((path / name).is_file() for name in ("config.json", "results.json", ADAPTER_CONFIG))
    return re.fullmatch(r"[\w.-]+/[\w.-]+", what) is not None and not path.parent.exists()


def _model(reference: str) -> dict[str, Any]:
    from cartilha.model.configuration import context_length, whole_config
    from cartilha.model.load import look_at
    from cartilha.model.parts import count_other_parameters, text_config
    from cartilha.training.optimizer import StateSize

    whole = whole_config(reference)
    config, size = text_config(whole), StateSize.planned(whole)
    return {
        "model": reference,
        "type": whole.model_type,
        "num_parameters": size.num_parameters,
        "num_active_parameters": size.num_active_parameters,
        "num_other_parameters": count_other_parameters(whole),
        "context_length": context_length(config),
        "runs": look_at(config, reference).line,
    }


def _first_documents(store: TokenStore) -> list[dict[str, Any]]:
    """The beginnings of each side's first documents, as a model reads them."""
    tokenizer = store.tokenizer()
    rows = []
    for split in SPLITS:
        documents, labels = store.packed(split), store.labels(split)
        for i in range(min(FIRST_DOCUMENTS, len(documents))):
            ids = documents.ids(i, FIRST_TOKENS)
            row = {"split": split, "doc_id": labels["doc_id"][i], "num_tokens": int(documents.num_tokens[i])}
            rows.append({**row, "ids": ids.tolist(), "begins": tokenizer.decode(ids)})
    return rows


def _document(store: TokenStore, config: InspectConfig) -> dict[str, Any]:
    """A document by its id, on either side, or by its number on one; of one that was not chosen, its weight."""
    asked, split = str(config.document), config.split
    for side in (split, *(other for other in SPLITS if other != split)):
        ids = store.labels(side)["doc_id"]
        plain = [normalize("NFC", doc_id) for doc_id in ids]  # in file names, accents may be characters of their own
        for names, name in ((ids, asked), (plain, normalize("NFC", asked))):
            if name in names:
                return _described(store, config, side, names.index(name))
    if config.weights and (found := not_chosen(store, asked)):
        return found
    number = int(asked) if asked.isdecimal() else 0
    num_documents = store.counts[split].num_documents
    if not 1 <= number <= num_documents:
        raise UserError(
            f"{store.path} has no document {asked!r}; give an id, or a number from 1 to {num_documents} for one of the"
            f" {split} side (--split)."
        )
    return _described(store, config, split, number - 1)


def _described(store: TokenStore, config: InspectConfig, split: Split, index: int) -> dict[str, Any]:
    table, labels, tokenizer = store.documents(split), store.labels(split), store.tokenizer()
    begin, num_tokens = int(table.start[index]), int(table.num_tokens[index])
    ids = store.tokens(split)[begin : begin + num_tokens]
    return {
        "split": split,
        "number": index + 1,
        **{name: labels[name][index] for name in ("doc_id", "source", "domain", "text_hash")},
        **{name: int(getattr(table, name)[index]) for name in ("num_tokens", "num_bytes", "num_chars", "num_words")},
        "first_token": begin,
        "text": next(islice(store.read_documents(split, first=index), 1)).text,
        "tokens": tokenizer.decode_each(ids),
        **({"weight": explain(store, labels["text_hash"][index], ids)} if config.weights else {}),
    }


def _block(store: TokenStore, config: InspectConfig) -> dict[str, Any]:
    """A block of the first epoch, as training with this seed and block size packs it."""
    if config.block_size < 1:
        raise UserError(f"--block_size is {config.block_size}; give 1 or more.")
    tokenizer = store.tokenizer()
    shape = {"block_size": config.block_size, "blocks_per_step": 1, "seed": config.seed}
    sampler: BlockSampler
    if config.mix:
        mix = Mix.of(config.mix, store)
        sampler, label = MixtureSampler(mix.documents, **shape), mix.label
    else:
        ids = store.labels(config.split)["doc_id"]
        sampler, label = BlockSampler(store.packed(config.split), **shape), lambda document: str(ids[document])
    stream, num_blocks, order = sampler.stream(0), sampler.blocks_per_epoch, sampler.order(0)
    assert config.block is not None
    if not 1 <= config.block <= num_blocks:
        raise UserError(
            f"{store.path} has {counted(num_blocks, 'block')} of {config.block_size} in an epoch;"
            f" --block {config.block} is not from 1 to {num_blocks}."
        )
    index = config.block - 1
    block = stream.block(index)
    segments: list[dict[str, Any]] = []
    for piece in stream.segments(index):
        if piece.document is None:
            segments.append({"padding": piece.end - piece.begin})
            continue
        document = int(order[piece.document])
        segments.append(
            {
                "document": document + 1,
                "doc_id": label(document),
                "num_inputs": piece.end - piece.begin,
                "from_the_beginning": piece.begins,
                "to_the_end": piece.ends,
                "text": tokenizer.decode(block.input_ids[piece.begin : piece.end]),
            }
        )
    asked = {"block_size": config.block_size, "split": config.split, "seed": config.seed}
    return {"block": config.block, "num_blocks": num_blocks, **asked, "segments": segments}
