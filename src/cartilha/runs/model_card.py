"""The README.md that goes with a trained model: what it is, how it was made, what it scores, its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cartilha.errors import UserError, counted
from cartilha.model_reference import adapter_base, resolve_model
from cartilha.runs.best import evaluation_of_model
from cartilha.storage import write_atomically
from cartilha.tokens.declared_tokens import read_tokenizer_json

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
KEPT = ("license", "license_name", "license_link", "language", "base_model")  # what a card copies from the base's card
OPT = {
    "license": "other",
    "license_name": "opt-175b",
    "license_link": "https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/MODEL_LICENSE.md",
}
OPT_LICENCE = (
    "The weights of OPT carry Meta's OPT-175B licence: non-commercial research only. It binds this model too. / "
    "Os pesos do OPT têm a licença OPT-175B da Meta: só pesquisa não comercial. Ela vale também para este modelo."
)


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


def licence(record: dict[str, Any]) -> str:
    """A model's licence in words, from its base's record."""
    if record.get("license_name") == OPT["license_name"]:
        return OPT_LICENCE
    if "license" not in record:
        return "See the base model's licence. / Veja a licença do modelo de base."
    name = record.get("license_name", record["license"])
    link = f" ({record['license_link']})" if record.get("license_link") else ""
    return f"That of the base model: {name}{link}. / A do modelo de base: {name}{link}."


def _header(name: str, record: dict[str, Any], evaluation: Mapping[str, Any], library: str) -> str:
    values = {"perplexity": evaluation["perplexity"], "bits_per_byte": evaluation["bits_per_byte"]}
    metrics = [{"type": metric, "value": value} for metric, value in values.items() if value is not None]
    dataset = {"name": "held-out text", "type": "held-out"}
    result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
    header = {
        **record,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["cartilha", "continued-pretraining"],
        "model-index": [{"name": name, "results": [result]}],
    }
    return str(yaml.safe_dump(header, sort_keys=False, allow_unicode=True))


def write_card(folder: Path, results: dict[str, Any]) -> None:
    """Write the card of a run's model into the model's folder."""
    write_atomically(folder / "README.md", model_card(results))


def model_card(results: dict[str, Any]) -> str:
    """The card of a run's model, in English and Portuguese, from its results."""
    settings, corpus = results["settings"], results["corpus"]
    before, after = results["evaluations"][0], evaluation_of_model(results)
    protocol = after["protocol"]
    base, commit = settings["model"], settings.get("model_commit")
    record = base_record(base, commit)
    # The path of a local directory is not published.
    is_public = commit or record.get("base_model") == base or base.startswith(("package:", "random:"))
    shown = base if is_public else Path(base).name
    datasets = corpus.get("datasets", [])
    if datasets:
        record["datasets"] = sorted({re.split("[@:]", item["name"].removeprefix("hf:"))[0] for item in datasets})
    num_documents = corpus["num_train_documents"]
    documents = f"{num_documents:,} {'documento' if num_documents == 1 else 'documentos'}"
    return f"""---
{_header(results["name"], record, after, "peft" if settings.get("lora") else "transformers")}---

# {results["name"]}

`{shown}`, trained on with Cartilha on {counted(corpus["num_train_documents"], "document")}
({counted(corpus["num_train_tokens"], "token")}; {counted(results["tokens"], "target")} seen). /
`{shown}`, treinado adiante com o Cartilha em {documents}.

{_adapter(settings, shown) + _chosen(results.get("selection")) + _mixed(results.get("sources"))}\
| held-out text / texto de validação | before / antes | after / depois |
|---|---|---|
| perplexity / perplexidade | {before["perplexity"]:.2f} | {after["perplexity"]:.2f} |
| bits per byte / bits por byte | {_number(before["bits_per_byte"])} | {_number(after["bits_per_byte"])} |
{_english(results.get("english"))}
Protocol / protocolo: {protocol["name"]}, window {protocol["window"]}, stride {protocol["stride"]}, prefix token
{protocol["prefix_id"]}, {protocol["dtype"]}, hash `{protocol["hash"]}`; {counted(after["num_documents"], "document")},
{counted(after["num_tokens"], "token")}. Perplexities of other protocols or tokenizers cannot be compared with these;
bits per byte of the same text can. / Perplexidades de outros protocolos ou tokenizadores não se comparam com estas;
bits por byte do mesmo texto, sim.

Settings / configuração: block size {settings["block_size"]}, {counted(settings["batch_tokens"], "token")} per step,
{_steps(results)}, peak learning rate {settings["lr"]:.2g}, seed {settings["seed"]},
{settings["dtype"]}.
{_commits({shown: commit} if commit else {}, datasets)}
## Licence / licença

{licence(record)}
"""


def _adapter(settings: dict[str, Any], base: str) -> str:
    """That this is an adapter, if it is one, and what it was trained with."""
    if not settings.get("lora"):
        return ""
    rank, trained = settings["lora"], f"{settings['num_trained'] / 1e6:.1f} M"
    also = (" and its embeddings", " e os embeddings") if settings.get("lora_embeddings") else ("", "")
    return (
        f"This is a LoRA adapter of rank {rank}{also[0]} ({trained} parameters), to be loaded with peft on `{base}`, "
        f"which was kept in {settings['lora_base']}. /\nEste é um adaptador LoRA de posto {rank}{also[1]} "
        f"({trained} de parâmetros), para carregar com o peft sobre `{base}`, mantido em {settings['lora_base']}.\n\n"
    )


def _steps(results: dict[str, Any]) -> str:
    steps = counted(results["settings"]["num_steps"], "step")
    held = results.get("model_step")
    if held is None or held == results["settings"]["num_steps"]:
        return steps
    return f"{steps} planned, the weights those of step {held}"


def _chosen(selection: dict[str, Any] | None) -> str:
    """How the documents were chosen, if they were."""
    if not selection:
        return ""
    sizes = f"{selection['num_documents']:,}", f"{selection['pool_documents']:,}"
    if "divergence" not in selection:
        how, como = "at random", "por sorteio"
    else:
        num_targets = f"{selection['target_documents']:,}"
        nats = "{random:.3f} -> {chosen:.3f}".format_map(selection["divergence"])
        how = f"by their likeness to {num_targets} documents (divergence {nats} nats per n-gram)"
        como = f"pela semelhança com {num_targets} documentos (divergência {nats} nats por n-grama)"
    return (
        f"The documents were chosen {how}: {sizes[0]} of {sizes[1]}. /\n"
        f"Os documentos foram escolhidos {como}: {sizes[0]} de {sizes[1]}.\n\n"
    )


def _mixed(sources: list[dict[str, Any]] | None) -> str:
    """What was read of each source of a mixture, if it was one; of a store's place only the end is published."""
    if not sources:
        return ""
    rows = [
        f"| {'/'.join(Path(row['store']).parts[-2:])}{'::' + row['domain'] if row['domain'] else ''} "
        f"| {row['documents_read']:,} | {row['tokens_read']:,} | {row['passes']:.2f} |\n"
        for row in sources
    ]
    head = "| source / fonte | documents read / documentos lidos | tokens | times read / vezes que foi lida |\n"
    return f"{head}|---|---|---|---|\n{''.join(rows)}\n"


def _english(english: dict[str, Any] | None) -> str:
    """A row of the table, if the English sample was measured before and after."""
    rows = [(english or {}).get(when) for when in ("before", "after")]
    if not all(rows):
        return ""
    before, after = (_number(row["bits_per_byte"]) for row in rows if row)
    return f"| English sample, bits per byte / amostra em inglês, bits por byte | {before} | {after} |\n"


def _commits(models: dict[str, str], datasets: list[dict[str, Any]]) -> str:
    """A paragraph on what was read from the hub, or nothing."""
    read = models | {item["name"]: item["commit"] for item in datasets}
    if not read:
        return ""
    listed = ", ".join(f"`{name}` (commit `{commit}`)" for name, commit in read.items())
    return f"\nRead from the hub / lido do hub: {listed}.\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
