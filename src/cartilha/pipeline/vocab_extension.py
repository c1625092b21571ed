"""A model with an extended vocabulary, written so that transformers loads it without Cartilha."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from cartilha.errors import UserError, counted, log
from cartilha.model.embeddings import extend_embeddings, shape_of
from cartilha.model.load import load_model
from cartilha.model_reference import resolve_model
from cartilha.reporting.wording import LANGUAGES
from cartilha.runs.card_parts import CardWording, base_licence
from cartilha.runs.model_card import base_record
from cartilha.storage import new_directory, write_atomically, write_json
from cartilha.tokens.store_writer import MAX_UINT16_IDS
from cartilha.tokens.tokenizer import TextTokenizer
from cartilha.tokens.vocabulary import Extension, extend, learn_merges, save_extended


def learn_extension(tokenizer: TextTokenizer, words: Counter[str], num_new: int) -> Extension:
    """Learn exactly `num_new` tokens; a UserError says that too few pairs occur twice in the text."""
    learnt = learn_merges(tokenizer, words, num_new)
    found = learnt.num_new
    if found < num_new:
        remedy = f"use --extend {found}, or more text" if found else "give more text"
        raise UserError(
            f"The text is too small for {counted(num_new, 'new token')}: only"
            f" {counted(found, 'pair', 'occurs', 'occur')} twice or more; {remedy}."
        )
    return extend(learnt)


def write_extension(
    ref: str, base: TextTokenizer, learnt: Extension, output: Path, origin: dict[str, Any]
) -> dict[str, Any]:
    """Write the extended tokenizer and model, whole or not at all; returns what extension.json records."""
    record: dict[str, Any] = {
        "model": ref,
        **origin,
        "num_new": len(learnt.pieces),
        "first_id": learnt.first_id,
        "num_ids": learnt.tokenizer.num_ids,
        "tokens_before": learnt.num_tokens_before,
        "tokens_after": learnt.num_tokens,
        "tokenizer_before": base.fingerprint,
        "tokenizer_after": learnt.tokenizer.fingerprint,
    }
    if base.num_ids <= MAX_UINT16_IDS < learnt.tokenizer.num_ids:
        ids = f"{MAX_UINT16_IDS:,}"
        log.warning("The vocabulary grows beyond %s ids: stores made with it take 4 bytes per token instead of 2.", ids)
    with new_directory(output) as temporary:
        if _has_weights(ref):
            loaded = load_model(ref, torch.device("cpu"), tokenizer=base)
            record["model_commit"] = loaded.commit
            before = shape_of(loaded.model)
            extend_embeddings(loaded, learnt.pieces, learnt.first_id)
            after = shape_of(loaded.model)
            for name in ("num_rows", "num_parameters"):
                record |= {f"{name}_before": getattr(before, name), name: getattr(after, name)}
            loaded.save(temporary)
            write_atomically(temporary / "README.md", _card(record))
        else:
            log.warning("%s holds no weights: only the tokenizer is extended.", ref)
        save_extended(base, learnt.tokenizer, temporary)
        write_json(temporary / "extension.json", record)
    return {**record, "output": str(output)}


def _has_weights(ref: str) -> bool:
    source = resolve_model(ref)
    files = source.path.iterdir() if source.kind == "directory" and source.path else ()
    return source.kind != "directory" or any(file.suffix in (".safetensors", ".bin") for file in files)


def _card(record: dict[str, Any]) -> str:
    kept = base_record(record["model"], record["model_commit"])
    header = f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n\n" if kept else ""
    return f"""{header}# {record["model"]}, {counted(record["num_new"], "token")} more

The vocabulary of `{record["model"]}` extended by {record["num_new"]:,} continued byte-pair merges with Cartilha; the
new rows are means of those of the tokens that they replace, and no weight has been trained since: train it before use.

{" / ".join(base_licence(kept, CardWording(language)) for language in LANGUAGES)}
"""
