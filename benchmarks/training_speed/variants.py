"""One way to train, timed in this process: ours, the HF Trainer as its users run it, packed, and tuned.

ours       packed, masked, fused loss, fused AdamW; compiled on CUDA
hf_users   one text a row, cut and padded; the Trainer's own defaults, but for the compute dtype
hf_packed  rows full of text, the defaults otherwise
hf_tuned   the same rows, no dropout, sdpa, fused AdamW, torch.compile where a C++ compiler is there
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from cartilha.errors import first_line
from cartilha.machine.memory import is_out_of_memory
from training_speed.setup import Clock, Shape, make_sampler, model_config, packed_rows, padded_rows
from training_speed.switches import turn_off

VARIANTS = ("ours", "hf_users", "hf_packed", "hf_tuned")


def measure(
    shape: Shape, variant: str, dtype: str, compiled: bool = True, without: str | None = None
) -> dict[str, Any]:
    """Train a few steps, `without` one of `SWITCHES` if that is asked for, and say how fast.

    Returns:
        `tokens_per_second`: of each window, tokens of text (padding does not count); `text_share` of the positions;
        `first_step_s`, with what is compiled in it; `losses` of the first and last step where the variant gives them;
        peak memory in bytes. Of one of the Trainer's for which memory does not suffice, `out_of_memory` says so
        instead; ours halves its micro-batch. The tuned one is timed plainly where it cannot be compiled, and
        `compile_error` says why.
    """
    if without is not None:
        turn_off(without)
    if shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        result = _ours(shape, dtype, compiled) if variant == "ours" else _trainer(shape, variant, dtype, compiled)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # torch.compile wraps what happens in it
        reason = first_line(cause)[:200]
        if variant == "ours":
            raise
        if is_out_of_memory(cause):
            return {"variant": variant, "dtype": dtype, "out_of_memory": reason, **peak_memory(shape.device)}
        if variant != "hf_tuned" or not compiled:
            raise
        result = {}
    if not result:  # as on cards that Triton has given up; outside of the handler, which holds on to memory
        return {**measure(shape, variant, dtype, compiled=False), "compile_error": reason}
    rates = [rate * result["text_share"] for rate in result.pop("positions_per_second")]
    return {"variant": variant, "dtype": dtype, "tokens_per_second": rates, **result, **peak_memory(shape.device)}


def peak_memory(device: str) -> dict[str, int]:
    if device == "cuda":
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_bytes": torch.cuda.max_memory_reserved(),
        }
    from cartilha.machine.memory import peak_memory_bytes

    return {"peak_bytes": peak_memory_bytes(device)}


def train_ours(
    shape: Shape, dtype: str, compiled: bool, kernel: str | None = None, micro_batch: int | None = None
) -> Any:
    """An iterator over the records of our training; one a step, of which `micro_batch` rows go through at a time."""
    from cartilha.model import forward
    from cartilha.model.compiling import training_body
    from cartilha.model.load import load_model
    from cartilha.training.loop import StepSettings, train_steps
    from cartilha.training.schedule import Schedule
    from cartilha.training.state import TrainingState

    if kernel:
        forward.choose_kernel = lambda *hardware: kernel
    loaded = load_model(f"random:{shape.model}", torch.device(shape.device))
    compute = getattr(torch, dtype)
    state = TrainingState.begin(loaded.model, compute, lr=1e-5, weight_decay=0.1)
    body = training_body(loaded.model, "always" if compiled and shape.device == "cuda" else "never", 0)
    settings = StepSettings(compute, micro_batch or shape.micro_batch, body=body)
    return train_steps(state, make_sampler(shape), Schedule(shape.num_steps, 1e-5, 0.0, 1.0), settings)


def _ours(shape: Shape, dtype: str, compiled: bool) -> dict[str, Any]:
    from cartilha.training.device_facts import max_tokens_on_this_cpu

    clock, losses, in_force = Clock(shape), [], 0
    # As the product chooses them: on a CPU small ones.
    tokens = max_tokens_on_this_cpu(getattr(torch, dtype)) if shape.device == "cpu" else shape.tokens_per_step
    rows = max(1, tokens // shape.block_size)
    records = train_ours(shape, dtype, compiled, micro_batch=min(rows, shape.micro_batch))
    clock.begin()
    for record in records:
        clock.step()
        losses.append(record.loss)
        in_force = record.micro_batch_size
    sampler = make_sampler(shape)
    return {
        "positions_per_second": clock.positions_per_second(),
        "text_share": 1 - sampler.padding_share,
        "micro_batch": min(rows, shape.micro_batch),
        "losses": [float(losses[0]), float(losses[-1])],
        "micro_batch_in_force": in_force,
        "first_step_s": clock.first_step_s,
    }


def _trainer(shape: Shape, variant: str, dtype: str, compiled: bool) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from cartilha.machine.devices import has_cxx_compiler

    clock, losses = Clock(shape), []

    class Listener(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend(value for key, value in (logs or {}).items() if key == "train_loss")

    tuned = variant == "hf_tuned"
    config = model_config(shape)
    config.dropout = 0.0 if tuned else config.dropout
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    rows, share = padded_rows(shape) if variant == "hf_users" else (packed_rows(shape), 1.0)
    rows = (rows * (-(-shape.micro_batch * (shape.num_steps + 1) // len(rows))))[: shape.micro_batch * 1000]
    at_once = min(shape.at_once or shape.micro_batch, shape.micro_batch)
    compiling = tuned and compiled and has_cxx_compiler()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=at_once, max_steps=shape.num_steps, report_to=[],
            use_cpu=shape.device == "cpu", bf16=dtype == "bfloat16", fp16=dtype == "float16", save_strategy="no",
            gradient_accumulation_steps=shape.micro_batch // at_once, disable_tqdm=True, logging_strategy="no",
            torch_compile=compiling,
            **({"optim": "adamw_torch_fused"} if tuned else {}),
        )  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=rows, callbacks=[Listener()]).train()
    return {
        "positions_per_second": clock.positions_per_second(), "text_share": share, "compiled": compiling,
        "losses": losses, "first_step_s": clock.first_step_s, "micro_batch_in_force": at_once,
    }  # fmt: skip
