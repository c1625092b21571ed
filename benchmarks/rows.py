"""What one document per row costs beside packed rows: gradients of the same blocks by one model, both ways in turn.

    python benchmarks/rows.py [--model random:opt-125m] [--mean 130] [--micro_batch 1 2 4] [--rounds 5]

Lengths of documents are log-normal. Times are those of the processor, so that other programs on the machine count
little; the medians of the rounds are compared. The goal is a ratio of at most 1.2.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from cartilha.blocks.packing import Batch, PackedStream, stack
from cartilha.model.forward import batch_nll
from cartilha.model.load import load_model
from cartilha.model.packed_or_rows import how_it_runs
from cartilha.model.weight_gradients import weight_gradients_in_place
from cartilha.tokens.packed import PackedDocuments

BLOCK_SIZE = 512


def batches(mean: float, micro_batch: int, number: int) -> list[Batch]:
    """Blocks full of documents, `mean` tokens each on average."""
    generator = np.random.default_rng(0)
    spread = 0.7
    lengths = generator.lognormal(
        np.log(mean) - spread**2 / 2, spread, 4 * number * micro_batch * BLOCK_SIZE // int(mean)
    )
    ids = [generator.integers(0, 250, max(1, int(length))) for length in lengths]
    stream = PackedStream(PackedDocuments.from_ids(ids, 0, 0), BLOCK_SIZE)
    blocks = [stream.block(i) for i in range(number * micro_batch)]
    return [stack(blocks[i : i + micro_batch]) for i in range(0, len(blocks), micro_batch)]


def seconds(model: PreTrainedModel, batch: Batch) -> float:
    """Processor time of the gradients of a batch."""
    began = time.process_time()
    with weight_gradients_in_place("cpu", 1.0):
        batch_nll(model, batch, torch.float32).backward()
    return time.process_time() - began


def main() -> None:
    """Print a line for each size of the micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="random:opt-125m")
    parser.add_argument("--mean", type=float, default=130.0, help="tokens per document")
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[1, 2, 4], help="blocks per forward pass")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = load_model(arguments.model, torch.device("cpu")).model
    packed = how_it_runs(model)
    in_rows = replace(packed, packed=False, reason="they are measured in rows")
    for micro_batch in arguments.micro_batch:
        times: dict[str, list[float]] = {"packed": [], "rows": []}
        for i, batch in enumerate(batches(arguments.mean, micro_batch, arguments.rounds + 1)):
            for name, how in (("packed", packed), ("rows", in_rows)):
                model.how_it_runs = how  # type: ignore[assignment]
                model.set_attn_implementation("cartilha_documents" if how.packed else packed.own_attention)
                taken = seconds(model, batch)
                if i:  # the first of each allocates
                    times[name].append(taken)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        print(
            f"{micro_batch} x {BLOCK_SIZE} tokens: packed {medians['packed']:.2f} s, rows {medians['rows']:.2f} s, "
            f"ratio {medians['rows'] / medians['packed']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
