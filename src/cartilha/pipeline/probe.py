"""The speed of this machine in a training, by a few real steps."""

from __future__ import annotations

import time

import numpy as np

from cartilha.blocks.sampler import BlockSampler
from cartilha.errors import counted, log
from cartilha.machine.devices import choose_device
from cartilha.model.compiling import MIN_STEPS_TO_COMPILE, training_body
from cartilha.model.load import load_model, load_with_adapter
from cartilha.model.recomputation import checkpoint_layers
from cartilha.tokens.packed import PackedDocuments
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.memory import MemoryModel
from cartilha.training.profiles import Profile
from cartilha.training.schedule import Schedule
from cartilha.training.state import TrainingState

TOKENS, TOKENS_CUDA = 1024, 16_384  # per step
STEPS = 3  # the first is not counted


def probe(model: str, profile: Profile, memory: MemoryModel, block_size: int) -> float:
    """Tokens per second of the training of a model with this profile, in the memory model's dtype and optimizer."""
    device = choose_device("auto")
    adapter = profile.adapter
    if adapter is None:
        loaded = load_model(model, device, dtype=profile.weights)
    else:
        loaded = load_with_adapter(model, device, adapter)
    if profile.checkpointing:
        checkpoint_layers(loaded.model)
    blocks = max(1, (TOKENS_CUDA if device.type == "cuda" else TOKENS) // block_size)
    log.info("Probing this machine: %d steps of %s of %d tokens.", STEPS, counted(blocks, "block"), block_size)
    ids = np.random.default_rng(0).integers(0, 256, (blocks * STEPS + 1, block_size - 1))
    rates = {"lr": 1e-6, "weight_decay": 0.0}
    state = TrainingState.begin(loaded.model, memory.dtype, **rates, optimizer=memory.size.optimizer)
    schedule = Schedule(STEPS, 1e-6, warmup_fraction=0.0, final_lr_fraction=1.0)
    documents = PackedDocuments.from_ids(list(ids), prefix_id=0, end_id=0)
    sampler = BlockSampler(documents, block_size=block_size, blocks_per_step=blocks, seed=0)
    began = time.perf_counter()
    compiled = "never" if profile.lean else "auto"  # as `train` does
    body = training_body(loaded.model, compiled, MIN_STEPS_TO_COMPILE)
    records = list(train_steps(state, sampler, schedule, StepSettings(memory.dtype, blocks, body=body)))
    rate = max(blocks * block_size / record.seconds for record in records[1:])
    log.info("%s tokens/s, in %.0f s.", f"{rate:,.0f}", time.perf_counter() - began)
    return rate
