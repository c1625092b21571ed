"""How fast held-out text is scored: the second thing that a card is rented for."""

from __future__ import annotations

import time
from typing import Any

import torch

from training_speed.setup import PREFIX_ID, Shape, documents
from training_speed.variants import peak_memory


def measure(shape: Shape, dtype: str, tokens: int) -> dict[str, Any]:
    """Score about so many tokens of whole documents, window after window, and say how fast; a few come before."""
    from cartilha.evaluation.documents import ScoredDocuments
    from cartilha.evaluation.nll import score_documents
    from cartilha.evaluation.scorer import Scorer
    from cartilha.evaluation.windows import Protocol
    from cartilha.model.load import load_model

    loaded = load_model(f"random:{shape.model}", torch.device(shape.device))
    window = shape.block_size
    scorer: Any = Scorer(loaded, None, Protocol("full", window, window, PREFIX_ID, dtype))  # type: ignore[arg-type]
    chosen, length = [], 0
    for ids in documents(shape):
        if length < tokens:
            chosen.append(ids)
            length += len(ids)
    score_documents(scorer, ScoredDocuments.of_ids(chosen[: max(1, len(chosen) // 10)]))
    started = time.perf_counter()
    nll = float(score_documents(scorer, ScoredDocuments.of_ids(chosen)).nll.sum())  # on the host: the work is done
    seconds = time.perf_counter() - started
    peak = peak_memory(shape.device)
    return {"scored_per_second": length / seconds, "num_tokens": length, "nats_per_token": nll / length, **peak}
