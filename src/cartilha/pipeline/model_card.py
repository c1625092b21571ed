"""The README.md that goes with a trained model: what it is, how it was made, what it scores, its licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OPT_LICENCE = (
    "The weights of OPT carry Meta's OPT-175B licence: non-commercial research only. It binds this model too. / "
    "Os pesos do OPT têm a licença OPT-175B da Meta: só pesquisa não comercial. Ela vale também para este modelo."
)


def model_card(results: dict[str, Any]) -> str:
    """The card of a run's model, in English and Portuguese, from its results."""
    settings, corpus = results["settings"], results["corpus"]
    before, after = results["evaluations"][0], results["evaluations"][-1]
    licence = (
        OPT_LICENCE
        if "opt" in settings["model"].lower()
        else "See the base model's licence. / Veja a licença do modelo de base."
    )
    protocol = after["protocol"]
    base = settings["model"]
    # The hub links a base model by its id; a directory's path is nobody else's business.
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()
    base_line = f"base_model: {base}\n" if on_hub else ""
    shown = base if on_hub or base.startswith(("package:", "random:")) else Path(base).name
    return f"""---
language: pt
{base_line}library_name: transformers
pipeline_tag: text-generation
tags: [cartilha, continued-pretraining, portuguese]
---

# {results["name"]}

`{shown}`, trained on with Cartilha on {corpus["num_train_documents"]:,} Portuguese documents
({corpus["num_train_tokens"]:,} tokens; {results["tokens"]:,} targets seen). /
`{shown}`, treinado adiante com o Cartilha em {corpus["num_train_documents"]:,} documentos em português.

| held-out text / texto reservado | before / antes | after / depois |
|---|---|---|
| perplexity / perplexidade | {before["perplexity"]:.2f} | {after["perplexity"]:.2f} |
| bits per byte / bits por byte | {_number(before["bits_per_byte"])} | {_number(after["bits_per_byte"])} |

Protocol / protocolo: {protocol["name"]}, window {protocol["window"]}, stride {protocol["stride"]}, prefix token
{protocol["prefix_id"]}, {protocol["dtype"]}, hash `{protocol["hash"]}`; {after["num_documents"]:,} documents,
{after["num_tokens"]:,} tokens. Perplexities of other protocols or tokenizers cannot be compared with these; bits per
byte of the same text can. / Perplexidades de outros protocolos ou tokenizadores não se comparam com estas;
bits por byte do mesmo texto, sim.

Settings / configuração: block size {settings["block_size"]}, {settings["batch_tokens"]:,} tokens a step,
{settings["num_steps"]} steps, peak learning rate {settings["lr"]:.2g}, seed {settings["seed"]}, {settings["dtype"]}.

## Licence / licença

{licence}
"""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
