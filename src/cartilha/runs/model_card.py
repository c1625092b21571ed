"""The README.md that goes with a trained model: what it is, how it was made, what it scores, its licence.

One file in both languages, since the hub shows no other; that of the text comes first if it is one of them. All of it
comes from the run's own record. What the record does not say is said to be unknown.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cartilha.errors import UserError
from cartilha.model_reference import adapter_base, resolve_model
from cartilha.reporting.wording import LANGUAGES
from cartilha.runs.best import evaluation_of_model
from cartilha.runs.card_parts import OPT_LICENCE, CardParts, CardWording, dataset_id, engines, prompt
from cartilha.storage import write_atomically
from cartilha.tokens.declared_tokens import read_tokenizer_json

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
KEPT = ("license", "license_name", "license_link", "language", "base_model")  # what a card copies from the base's card
OPT = {
    "license": "other",
    "license_name": OPT_LICENCE,
    "license_link": "https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/MODEL_LICENSE.md",
}


def base_record(base: str, commit: str | None = None) -> dict[str, Any]:
    """Licence, language and origin from the card of a base model (a MODEL argument); OPT's licence goes with OPT."""
    try:
        source = resolve_model(base)
    except UserError:  # the model has been removed since
        return {}
    record: dict[str, Any] = {}
    if source.path is not None and (below := adapter_base(source.path)) is not None:
        return base_record(below)
    if source.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(source.name, "README.md", revision=commit)
        record = _front_matter(Path(card)) if isinstance(card, str) else {}
        record["base_model"] = source.name
    elif source.kind == "directory" and source.path is not None:
        record = _front_matter(source.path / "README.md")
        origin = read_tokenizer_json(source.path / "config.json").get("_name_or_path", "")
        if re.fullmatch(HUB_ID, origin):
            record.setdefault("base_model", origin)
    origins = record.get("base_model", [])
    if any(re.match(r"facebook/opt-\d", str(name)) for name in ([origins] if isinstance(origins, str) else origins)):
        record |= OPT
    return record


def _front_matter(card: Path) -> dict[str, Any]:
    """The entries of a card's YAML header that the card of a model trained from it keeps."""
    try:
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, yaml.YAMLError):
        return {}
    return {name: values[name] for name in KEPT if values.get(name)} if isinstance(values, dict) else {}


def data_licences(corpus: dict[str, Any]) -> dict[str, str]:
    """What the cards of the datasets say, as they were read from the hub, and that of the primers; empty if nothing."""
    found: dict[str, str] = {}
    for item in corpus.get("datasets", []):
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(
            dataset_id(item["name"]), "README.md", revision=item["commit"], repo_type="dataset"
        )
        stated = _front_matter(Path(card)).get("license", "") if isinstance(card, str) else ""
        found[item["name"]] = ", ".join(stated) if isinstance(stated, list) else str(stated)
    primers = [name for name in corpus.get("inputs", []) if re.fullmatch("primer(:[a-z]+)?", name)]
    return found | dict.fromkeys(primers, "CC0 1.0")


def write_card(folder: Path, results: dict[str, Any]) -> None:
    """Write the card of a run's model into the model's folder."""
    model_type = read_tokenizer_json(folder / "config.json").get("model_type")
    write_atomically(folder / "README.md", model_card(results, model_type))


def model_card(results: dict[str, Any], model_type: str | None = None) -> str:
    """The card of a run's model from its results; the model's type says which other programs load it."""
    settings, corpus = results["settings"], results["corpus"]
    base, commit, language = settings["model"], settings.get("model_commit"), corpus.get("language")
    record = base_record(base, commit)
    # The path of a local directory is not published.
    is_public = commit or record.get("base_model") == base or base.startswith(("package:", "random:"))
    parts = CardParts(
        results,
        base if is_public else Path(base).name,
        {"base": dict(record), "data": data_licences(corpus)},
    )
    return (
        _environment()
        .get_template("card.md.j2")
        .render(
            header=_header(results, record),
            name=results["name"],
            parts=parts,
            wordings=sorted(map(CardWording, LANGUAGES), key=lambda say: say.language != language),
            prefix_id=evaluation_of_model(results)["protocol"]["prefix_id"],
            prompt=prompt(corpus.get("prompts", ())),
            tasks=language if (results.get("tasks") or {}).get("lists") else "TASK",
            model_type=model_type,
            engines=[] if parts.is_adapter else engines(model_type),
        )
    )


@cache
def _environment() -> Environment:
    """Templates whose text is Markdown: nothing is escaped, and what others wrote stands in code spans."""
    loader = PackageLoader("cartilha.runs")
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _header(results: dict[str, Any], record: dict[str, Any]) -> str:
    """The YAML at the card's head, from which the hub makes its filters, its links and its table of results."""
    corpus, evaluation = results["corpus"], evaluation_of_model(results)
    values = {"perplexity": evaluation["perplexity"], "bits_per_byte": evaluation["bits_per_byte"]}
    scored = [_result("held-out text", "held-out", values)]
    for row in (results.get("tasks") or {}).get("scores", []):
        scored.append(_result(row["task"], row["task"], {row["metric"]: row["after"]}))
    spoken = record.get("language", [])
    languages = [corpus.get("language"), *([spoken] if isinstance(spoken, str) else spoken)]
    known: dict[str, Any] = {
        "language": list(dict.fromkeys(filter(None, languages))),
        "datasets": sorted({dataset_id(item["name"]) for item in corpus.get("datasets", [])}),
    }
    is_adapter = bool(results["settings"].get("lora"))
    header = {
        **record,
        **{name: value for name, value in known.items() if value},
        **({"base_model_relation": "adapter" if is_adapter else "finetune"} if "base_model" in record else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cartilha", "continued-pretraining"],
        "model-index": [{"name": results["name"], "results": scored}],
    }
    return str(yaml.safe_dump(header, sort_keys=False, allow_unicode=True))


def _result(name: str, kind: str, values: dict[str, float | None]) -> dict[str, Any]:
    metrics = [{"type": metric, "value": value} for metric, value in values.items() if value is not None]
    return {"task": {"type": "text-generation"}, "dataset": {"name": name, "type": kind}, "metrics": metrics}
