"""`vocab`: what a text costs under a model's vocabulary, and the model with a vocabulary extended for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cartilha.config import VocabConfig
from cartilha.console import progress
from cartilha.corpus.document import Document
from cartilha.corpus.english import english_sample
from cartilha.corpus.readers import input_documents
from cartilha.corpus.splits import choose_split
from cartilha.errors import UserError
from cartilha.model.embeddings import ModelShape, model_shape
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.result import Result
from cartilha.pipeline.vocab_advice import advise
from cartilha.pipeline.vocab_extension import learn_extension, write_extension
from cartilha.tokens.fertility import FertilityCounter
from cartilha.tokens.store import batches
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer
from cartilha.tokens.vocabulary import check_extendable, count_words, extend, learn_merges, num_tokens

SIZES = (1000, 2000, 4000, 8000)  # extensions whose effect the report states
HELD_OUT = 0.2  # of the documents: what an extension saves is counted on text that it was not learnt on
TRAINING_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments, float32


@dataclass(frozen=True)
class VocabResult(Result):
    """The report on the vocabulary (docs/vocabulary.md) and, with `--extend`, the extension; or the advice."""

    report: dict[str, Any] | None = None
    extension: dict[str, Any] | None = None
    advice: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Text:
    """What one pass over the text gathers: its figures, and its words as the tokenizer's splitter writes them."""

    figures: FertilityCounter
    learnt_on: Counter[str]
    held_out: Counter[str]
    num_words_held_out: int


def vocab(config: VocabConfig) -> VocabResult:
    """Report on a vocabulary, extend it, or advise; a UserError says that tokenizer or text do not allow it."""
    preflight(config)
    if config.advise:
        return VocabResult(advice=advise(config))
    tokenizer = load_tokenizer(config.model)
    not_extendable = None
    try:
        check_extendable(tokenizer, config.model)
    except UserError as error:
        if config.extend is not None:
            raise
        not_extendable = str(error)
    text = _read(config, tokenizer, byte_level=not_extendable is None)
    report = _report(config.model, tokenizer, text, not_extendable)
    if config.extend is None:
        return VocabResult(report)
    learnt = learn_extension(tokenizer, text.learnt_on + text.held_out, config.extend)
    origin = {"input": list(config.input), "num_documents": report["total"]["num_documents"]}
    return VocabResult(report, extension=write_extension(config.model, tokenizer, learnt, Path(config.output), origin))


def _read(config: VocabConfig, tokenizer: TextTokenizer, *, byte_level: bool) -> _Text:
    figures = FertilityCounter(tokenizer, after_space=byte_level)
    words = {"train": Counter[str](), "validation": Counter[str]()}
    num_words = 0
    with progress("Reading", None, "characters") as advance:
        for batch in batches(input_documents(config)):
            figures.add(batch)
            for document in batch:
                side = choose_split(document.text_hash, HELD_OUT, 0)
                if byte_level:
                    words[side].update(count_words(tokenizer, [document.text]))
                num_words += len(document.text.split()) if side == "validation" else 0
            advance(sum(len(document.text) for document in batch))
    return _Text(figures, words["train"], words["validation"], num_words)


def _report(model: str, tokenizer: TextTokenizer, text: _Text, not_extendable: str | None) -> dict[str, Any]:
    english = FertilityCounter(tokenizer, after_space=not_extendable is None)
    english.add([Document(line, str(i), "english", "english") for i, line in enumerate(english_sample())])
    shape, total = model_shape(model, tokenizer), text.figures.total().to_dict()
    return {
        "model": model,
        "num_ids": tokenizer.num_ids,
        "num_rows": None if shape is None else shape.num_rows,
        "num_spare_rows": None if shape is None else max(0, shape.num_rows - tokenizer.num_ids),
        "share_of_ids_used": float((text.figures.id_counts > 0).mean()),
        "total": total,
        "domains": {name: figures.to_dict() for name, figures in text.figures.by_domain().items()},
        "english": english.total().to_dict(),
        "words_in_context": None if shape is None else shape.context_length / total["tokens_per_word"],
        "words": [asdict(word) for word in text.figures.costliest_words()],
        "letters": [asdict(letter) for letter in text.figures.costliest_letters()],
        "sizes": [] if not_extendable else _sizes(tokenizer, text, shape),
        "not_extendable": not_extendable,
    }


def _sizes(tokenizer: TextTokenizer, text: _Text, shape: ModelShape | None) -> list[dict[str, Any]]:
    """What extensions of several sizes would cost, and what they would save on documents that taught them nothing."""
    if not text.learnt_on or not text.held_out:
        return []
    learnt = learn_merges(tokenizer, text.learnt_on, max(SIZES))
    old_tokens = num_tokens(tokenizer, text.held_out)
    rows = []
    for size in (size for size in SIZES if size <= learnt.num_new):
        new_tokens = num_tokens(extend(learnt, size).tokenizer, text.held_out)
        row: dict[str, Any] = {
            "num_new": size,
            "tokens_per_word": new_tokens / max(1, text.num_words_held_out),
            "share_of_tokens": new_tokens / old_tokens,
        }
        if shape is not None:
            new_rows = max(0, tokenizer.num_ids + size - shape.num_rows)
            new_parameters = new_rows * shape.row_parameters
            row |= {
                "words_in_context": shape.context_length / row["tokens_per_word"],
                "share_of_time": row["share_of_tokens"] * shape.relative_cost(new_rows),
                "new_parameters": new_parameters,
                "share_of_parameters": new_parameters / shape.num_parameters,
                "training_bytes": new_parameters * TRAINING_BYTES,
            }
        rows.append(row)
    return rows
