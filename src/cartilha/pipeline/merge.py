"""`merge`: an adapter into its base, or an instruction-tuned model minus its base into a trained model."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from cartilha.config import GenerateConfig, MergeConfig
from cartilha.errors import UserError, log
from cartilha.evaluation.continuation import continue_prompts
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.measures import make_evaluation
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.scorer import load_scorer
from cartilha.machine.devices import choose_device
from cartilha.model.arithmetic import WeightFiles, added, check_alike, write_weights
from cartilha.model.configuration import model_config, place_of
from cartilha.model.load import load_model, save_model
from cartilha.model_reference import adapter_base, resolve_model
from cartilha.pipeline.check import sample_documents
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.result import Result
from cartilha.reporting.wording import LANGUAGES
from cartilha.runs.card_parts import CardWording, base_licence
from cartilha.runs.files import read_results, run_directory
from cartilha.runs.model_card import base_record
from cartilha.storage import new_directory, read_json, write_atomically, write_json
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import CHAT_TEMPLATE, TextTokenizer, load_tokenizer

MEASURED = ("bits_per_byte", "bits_per_byte_interval", "perplexity", "num_documents", "corpus_hash", "protocol")


@dataclass(frozen=True)
class MergeResult(Result):
    """Where the merged model is, and what went into it; `before` and `after` are measured where a model was added."""

    output: str
    model: str
    base: str
    added: str | None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


def merge(config: MergeConfig) -> MergeResult:
    """Merge RUN's adapter, or add a model to RUN's, into `config.output`; a UserError says why that cannot be."""
    preflight(config)
    run = run_directory(config.run)
    output = Path(config.output or run / ("instruct" if config.add else "merged"))
    dtype = getattr(torch, config.save_dtype)
    if config.add is None:
        base = adapter_base(Path(place_of(resolve_model(str(run))))) or ""
        _write_merged(str(run), output, dtype, base)
        return MergeResult(str(output), str(run), base, None)
    base = config.base or base_of(run)
    log.info("Adding %s minus %s to %s.", config.add, base, run)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=output.parent) as temporary:
        trained = Path(place_of(resolve_model(str(run))))
        if adapter_base(trained) is not None:
            trained = Path(temporary) / "merged"
            _write_merged(str(run), trained, torch.float32, base)
        record = _add(config, str(run), trained, base, output)
    return MergeResult(str(output), str(run), base, config.add, record["before"], record["after"])


def base_of(run: Path) -> str:
    """The MODEL that a run began with, before an extension of its vocabulary and before earlier runs."""
    settings = (read_results(run).get("settings") or {}) if (run / "results.json").is_file() else {}
    reference, commit = str(settings.get("model", "")), settings.get("model_commit")
    if not reference:
        raise UserError(f"{run} does not record what it was trained from; name that model with --base.")
    source = resolve_model(reference)
    if source.kind == "hub" and commit:
        return f"{source.name}@{commit}"
    folder = source.path
    if source.kind == "directory" and folder is not None:
        if (folder / "extension.json").is_file():
            return str(read_json(folder / "extension.json")["model"])
        if (folder.parent / "results.json").is_file() and folder.parent.resolve() != run.resolve():
            return base_of(folder.parent)
    return reference


def _write_merged(reference: str, output: Path, dtype: torch.dtype, base: str) -> None:
    tokenizer = load_tokenizer(reference)
    loaded = load_model(reference, torch.device("cpu"), tokenizer=tokenizer)
    with new_directory(output) as temporary:
        save_model(loaded, temporary, dtype)
        tokenizer.save(temporary)
        write_atomically(temporary / "README.md", _card(output.resolve().parent.name, base, None, None))


def _add(config: MergeConfig, run: str, trained: Path, base: str, output: Path) -> dict[str, Any]:
    """Write the sum, and measure before and after; returns the contents of merge.json."""
    assert config.add is not None
    references = {"trained": run, "base": base, "instruct": config.add}
    folders = {"trained": trained} | {
        name: Path(place_of(resolve_model(reference))) for name, reference in references.items() if name != "trained"
    }
    files = {name: WeightFiles(references[name], folder) for name, folder in folders.items()}
    tokenizers = {name: load_tokenizer(reference) for name, reference in references.items()}
    _check_vocabularies(references, tokenizers)
    check_alike(files["trained"], files["base"], files["instruct"])
    before = _measured(run, config)
    with new_directory(output) as temporary:
        sizes = model_config(base).vocab_size, tokenizers["base"].num_ids
        compute = added(files["trained"], files["base"], files["instruct"], *sizes)
        write_weights(files["trained"].shapes, compute, temporary, getattr(torch, config.save_dtype))
        settings = AutoConfig.from_pretrained(trained)
        settings.dtype = config.save_dtype
        settings.save_pretrained(temporary)
        tokenizers["trained"].save(temporary)
        for name in (CHAT_TEMPLATE, "generation_config.json"):  # how the instruct model is talked to
            if (folders["instruct"] / name).is_file():
                write_atomically(temporary / name, (folders["instruct"] / name).read_text(encoding="utf-8"))
        after = _measured(str(temporary), config)
        record = {**references, "before": before, "after": after}
        write_json(temporary / "merge.json", record)
        write_atomically(temporary / "README.md", _card(output.resolve().parent.name, base, config.add, record))
    return record


def _check_vocabularies(references: dict[str, str], tokenizers: dict[str, TextTokenizer]) -> None:
    """Refuse, with a UserError, tokenizers that give a token of the base another id."""
    ids = {name: tokenizer.backend.get_vocab(with_added_tokens=True) for name, tokenizer in tokenizers.items()}
    for name in ("trained", "instruct"):
        differing = [token for token, i in ids["base"].items() if ids[name].get(token) != i]
        differing += [token for token in ids[name] if token not in ids["base"]] if name == "instruct" else []
        if differing:
            raise UserError(
                f"{references[name]} has another tokenizer than {references['base']} ({differing[0]!r} differs), so "
                "the models cannot be added; name models of one family."
            )


def _measured(reference: str, config: MergeConfig) -> dict[str, Any]:
    """Bits per byte of some held-out documents, and one text, of a model."""
    store = _store_of(config)
    started, device = time.perf_counter(), choose_device(config.device)
    scorer = load_scorer(reference, None, config, device)
    documents = encode_documents(sample_documents(store, quick=False)[0], scorer.tokenizer)
    evaluation = make_evaluation(scorer, documents, score_documents(scorer, documents), time.perf_counter() - started)
    asked = GenerateConfig(prompt=(config.prompt,), max_new_tokens=config.max_new_tokens)
    (written,) = continue_prompts(scorer.loaded, scorer.tokenizer, asked)
    figures = evaluation.to_dict()
    return {**{name: figures[name] for name in MEASURED}, "prompt": config.prompt, "text": written.text}


def _store_of(config: MergeConfig) -> TokenStore | None:
    """The store that is scored: the one named, else the run's if it is still there, else none (the primer then)."""
    if config.store:
        return TokenStore(config.store)
    results = run_directory(config.run) / "results.json"
    recorded = (read_results(results.parent).get("settings") or {}).get("store", "") if results.is_file() else ""
    return TokenStore(recorded) if recorded and (Path(recorded) / "store.json").is_file() else None


def _card(name: str, base: str, instruct: str | None, record: dict[str, Any] | None) -> str:
    kept = {**base_record(base), "library_name": "transformers", "tags": ["cartilha", "continued-pretraining"]}
    shown, other = (ref if ref is None or not Path(ref).exists() else Path(ref).name for ref in (base, instruct))
    lines = [f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n\n# {name}\n"]
    if record is None:
        lines.append(
            f"An adapter trained with Cartilha, merged into `{shown}`. /\n"
            f"Um adaptador treinado com a Cartilha, juntado a `{shown}`.\n"
        )
    else:
        bits = [f"{record[when]['bits_per_byte']:.4f}" for when in ("before", "after")]
        lines.append(
            f"`{shown}`, trained further with Cartilha, plus `{other}` minus `{shown}` (arXiv:2410.10739). /\n"
            f"`{shown}`, com treino continuado pela Cartilha, mais `{other}` menos `{shown}`.\n\n"
            "Bits per byte of held-out text, before and after the sum / bits por byte do texto de validação, antes e "
            f"depois da soma: {bits[0]}, {bits[1]}.\n"
        )
    licences = " / ".join(base_licence(kept, CardWording(language)) for language in LANGUAGES)
    return "\n".join([*lines, f"## Licence / licença\n\n{licences}\n"])
