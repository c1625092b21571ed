"""The model, the texts and the shapes that a training speed is measured on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

PREFIX_ID, END_ID, PAD_ID = 2, 2, 1


@dataclass(frozen=True)
class Shape:
    """What is trained on what.

    Attributes:
        model: `opt-125m` or `tiny-opt`, with fresh weights.
        device: `cpu` or `cuda`.
        block_size: Tokens a row.
        micro_batch: Rows a step.
        at_once: Of these, what the Trainer takes in a forward pass, since it makes all logits; 0 takes all.
        windows: How many times are taken.
        window: Steps a time is taken over.
        warmup: Steps before the first; compilation falls into them.
        text: A text file, one document a line; without one, documents of random tokens with lengths as on the web.
        tokenizer: Its tokenizer.
        longest: Tokens of a text at most: short ones put many into a row.
    """

    model: str = "opt-125m"
    device: str = "cpu"
    block_size: int = 512
    micro_batch: int = 4
    at_once: int = 0
    windows: int = 3
    window: int = 1
    warmup: int = 1
    text: str | None = None
    tokenizer: str | None = None
    longest: int = 20_000

    @property
    def tokens_per_step(self) -> int:
        """Positions, padding counted."""
        return self.block_size * self.micro_batch

    @property
    def num_steps(self) -> int:
        """Those that are timed, and the warm-up."""
        return self.warmup + self.windows * self.window


def model_config(shape: Shape) -> Any:
    from cartilha.model.configuration import model_config

    return model_config(f"random:{shape.model}")


def documents(shape: Shape) -> list[np.ndarray]:
    """Token ids of each text, nothing added.

    Without a text: log-normal lengths of median 500 and mean 1,330, of which 512 tokens a text keep 28 %: those of
    the exercise's web pages.
    """
    if shape.text:
        from cartilha.tokens.tokenizer import load_tokenizer

        lines = [line for line in Path(shape.text).read_text(encoding="utf-8").split("\n") if line.strip()]
        encoded = load_tokenizer(str(shape.tokenizer)).encode(lines)
        return [np.asarray(ids, np.int64)[: shape.longest] for ids in encoded]
    generator = np.random.default_rng(0)
    num_ids = 256 if shape.model.startswith("tiny") else 50265
    wanted, lengths = shape.tokens_per_step * (shape.num_steps + 2), []
    while sum(lengths) < wanted or len(lengths) < 2 * shape.micro_batch:
        lengths.append(int(np.clip(generator.lognormal(np.log(500), 1.4), 8, shape.longest)))
    return [generator.integers(4, num_ids, length) for length in lengths]


def make_sampler(shape: Shape) -> Any:
    from cartilha.blocks.sampler import BlockSampler
    from cartilha.tokens.packed import PackedDocuments

    packed = PackedDocuments.from_ids(documents(shape), PREFIX_ID, END_ID)
    return BlockSampler(packed, block_size=shape.block_size, blocks_per_step=shape.micro_batch, seed=0)


def padded_rows(shape: Shape) -> tuple[list[dict[str, torch.Tensor]], float]:
    """One text a row, cut and padded to `block_size` as notebooks do; and the share of positions that hold text."""
    rows, filled = [], 0
    for ids in documents(shape):
        kept = np.concatenate([[PREFIX_ID], ids])[: shape.block_size]
        row = np.full(shape.block_size, PAD_ID)
        row[: len(kept)] = kept
        mask = np.arange(shape.block_size) < len(kept)
        rows.append(
            {
                "input_ids": torch.from_numpy(row),
                "attention_mask": torch.from_numpy(mask.astype(np.int64)),
                "labels": torch.from_numpy(np.where(mask, row, -100)),
            }
        )
        filled += len(kept)
    return rows, filled / (len(rows) * shape.block_size)


def packed_rows(shape: Shape) -> list[dict[str, torch.Tensor]]:
    """All texts in one stream, cut into rows: what those do who pack by hand (documents see each other)."""
    stream = np.concatenate([np.concatenate([[PREFIX_ID], ids]) for ids in documents(shape)])
    whole = stream[: len(stream) // shape.block_size * shape.block_size].reshape(-1, shape.block_size)
    return [{"input_ids": row, "labels": row} for row in torch.from_numpy(whole)]


class Clock:
    """Times windows of steps after the warm-up; a CUDA device has done its work whenever a time is taken."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._times: list[float] = []
        self._steps = 0
        self._begun = time.perf_counter()
        self.first_step_s: float | None = None  # with all that is compiled in it

    def begin(self) -> None:
        """The first step begins."""
        self._begun = time.perf_counter()

    def step(self) -> None:
        """A step has ended (or, on CUDA, has been launched)."""
        self._steps += 1
        if self._steps == 1:
            self._synchronize()
            self.first_step_s = time.perf_counter() - self._begun
        counted = self._steps - self._shape.warmup
        if counted >= 0 and counted % self._shape.window == 0:
            self._synchronize()
            self._times.append(time.perf_counter())

    def _synchronize(self) -> None:
        if self._shape.device == "cuda":
            torch.cuda.synchronize()

    def positions_per_second(self) -> list[float]:
        """Of each window, padding counted."""
        steps = zip(self._times[:-1], self._times[1:], strict=True)
        return [self._shape.tokens_per_step * self._shape.window / (end - begin) for begin, end in steps]
