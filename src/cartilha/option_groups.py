"""Options that several commands share, as bases of their configurations (`config.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cartilha.settings import Settings, deciding, option

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
BaseKind = Literal["float32", "bfloat16", "4bit"]

# What an option means that several commands have, with a default of their own.
MODEL_HELP = (
    "a hub id (NAME or NAME@REVISION), a directory (model, run or LoRA adapter), a .gguf file, package:NAME or"
    " random:ARCH"
)
REF_HELP = (
    "files, globs or folders (.txt one document per line, .json, .jsonl, .csv, .tsv, .parquet, .arrow; also"
    " compressed), hf:NAME[@REVISION][:CONFIG[:SPLIT]], or primer (primer:gl)"
)
OPTIMIZER_HELP = (
    "adamw; rmsprop (adamw without momentum: for short runs and small steps); muon (hidden matrices; the rest adamw);"
    " adafactor (small states); auto: rmsprop in steps of fewer than 2,048 tokens, else adamw"
)


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Settings):
    """How the text is read."""

    text_column: str = deciding("text", "the column or key that holds the text (all but .txt)")
    domain_column: str | None = deciding(
        None, "the column or key of the domain; default domain, genre or source, else the folder below the input"
    )
    text_unit: Literal["line", "paragraph", "file"] = deciding(
        "line", "what is a document in a .txt file: a line, a paragraph (lines up to an empty one), or the whole file"
    )
    csv_quoting: Literal["auto", "minimal", "none"] = deciding(
        "auto",
        "quotes in .csv and .tsv enclose fields (minimal) or are plain characters (none); auto: as the file shows",
    )
    csv_delimiter: str = deciding("auto", "separator in .csv and .tsv: one character, or tab; auto: as the file shows")
    encoding: str = deciding("utf-8", "encoding of text files")
    invalid_bytes: Literal["stop", "replace"] = deciding(
        "stop", "bytes that the encoding does not allow: stop and name the line, or put U+FFFD (counted)"
    )


@dataclass(frozen=True, kw_only=True)
class QualityOptions(Settings):
    """Which documents are not worth training on, or must not be trained on."""

    decontaminate: tuple[str, ...] = deciding(
        (), "leave out documents with 13 words in a row of these: REFs, or tasks of lm-evaluation-harness (extra eval)"
    )
    max_perplexity: str | None = deciding(
        None, "do not train on documents that --model finds more perplexing than this (200), or the top share (10%)"
    )
    min_perplexity: str | None = deciding(
        None, "do not train on documents less perplexing than this (5), or the bottom share (2%)"
    )
    classifier: str | None = deciding(
        None, "a text classifier (hub id or directory), such as one of educational value, for --min_score"
    )
    min_score: str | None = deciding(
        None, "do not train on documents that --classifier scores lower than this (3), or on the bottom share (50%)"
    )


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(Settings):
    """Which of the text is trained on, and how much of it."""

    select_tokens: str | None = deciding(
        None, "train on so many tokens of the input, or such a share of them (5m, 20%), drawn at random or by --like"
    )
    select_for: str | None = deciding(
        None,
        "instead of --select_tokens: as many tokens as --model trains on in this time (50m, 1h30m) on this machine",
    )
    like: tuple[str, ...] = option(
        (), "with --select_tokens or --select_for: draw documents like these texts, some of which are held out"
    )
    stream_best: str | None = deciding(
        None,
        "with --select_tokens: stop reading once the best share (5%) of the text, by a first sample, holds them",
    )
    keep_pool: bool = option(
        False,
        "keep what was read beside the store, so that --overwrite with another --select_tokens reads nothing anew",
    )
    weights: tuple[str, ...] = deciding((), "for each --input, its share of the tokens (0.95 0.05)")
    max_repeats: int = deciding(4, "with --weights: repeat an input this often at most, before others are cut")


WeightDtype = Literal["float32", "bfloat16"]
WEIGHTS_HELP = "type in which weights are kept; bfloat16 takes half the memory and changes figures a little"


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(Settings):
    """How documents are scored."""

    protocol: str = option("full", "full (whole documents) or first-N (only the first N tokens of each)")
    window: int | None = option(None, "most input positions of a window; default min(context, 2048)", minimum=1)
    stride: int | None = option(None, "new tokens scored by each later window; default window / 2", minimum=1)
    prefix_token: str | None = option(None, "the token put before each document as context; default bos, else eos")
    limit_documents: int | None = option(None, "score at most this many documents", minimum=1)
    load_dtype: WeightDtype = option("float32", WEIGHTS_HELP)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Settings):
    """What computes."""

    dtype: Dtype = option("auto", "type of the computation, whatever that of the weights")
    device: Device = option("auto", "where to compute")


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Settings):
    """What is trained instead of all weights."""

    lora: int | None = deciding(
        None, "train LoRA adapters of this rank on the linear layers, all weights frozen (extra adapters)", minimum=1
    )
    lora_embeddings: bool = deciding(False, "with --lora: train token embeddings and head too, in full")
    lora_base: BaseKind = deciding(
        "float32", "with --lora: how the frozen linear layers are kept (4bit on CUDA, extra quantization)"
    )
