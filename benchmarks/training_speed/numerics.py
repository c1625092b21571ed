"""Whether all ways to compute a step agree, before any of them is timed; and how far two equal runs lie apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from training_speed.setup import Shape, make_sampler
from training_speed.variants import train_ours


def check(shape: Shape, dtype: str) -> dict[str, Any]:
    """Compare losses (nats a token) and gradients (norm of the difference to norm).

    Args:
        shape: Of the step.
        dtype: The half precision that is held against float32.

    Returns:
        `checks`, each with what was found and what is allowed, and `failed` where one of them is beyond.
    """
    from cartilha.blocks.packing import stack
    from cartilha.model.attention import choose_kernel
    from cartilha.model.compiling import CompiledBody

    shape = dataclasses.replace(shape, longest=shape.block_size // 3)
    subject = _Subject(shape, stack(make_sampler(shape).blocks(0)))
    rows: list[dict[str, Any]] = []

    def compare(name: str, found: Any, expected: Any, loss_limit: float, gradient_limit: float) -> None:
        loss, gradient = abs(found[0] - expected[0]), _distance(found[1], expected[1])
        good = loss <= loss_limit and gradient <= gradient_limit
        rows.append({"name": name, "loss": loss, "gradient": gradient, "limits": [loss_limit, gradient_limit],
                     "ok": good})  # fmt: skip

    exact = subject.step("mask", torch.float32)
    # Rounding moves some ReLUs across zero, and a share s of them moves the gradient by the root of s: 1e-3 measured
    # in float32 and 0.08 in bfloat16, on a CPU; documents that see each other move it by 0.8.
    compare("mask, float32, against each document alone", exact, subject.alone(), 1e-4, 1e-2)
    half = getattr(torch, dtype)
    masked = subject.step("mask", half)
    compare(f"mask, {dtype}, against float32", masked, exact, 0.02, 0.2)
    capability = torch.cuda.get_device_capability() if shape.device == "cuda" else None
    own = choose_kernel(shape.device, capability, half)
    fast = subject.step(own, half)
    compare(f"the hardware's own kernel, {dtype}, against mask", fast, masked, 0.01, 0.2)
    if shape.device == "cuda":
        body = CompiledBody(subject.model)
        compare(f"compiled, {dtype}, against plain", subject.step(own, half, body), fast, 0.01, 0.2)
        rows.append(_was_compiled("body", body))
    rows += _loss_kernels(shape, half)
    blind = subject.step("mask", torch.float32, leak=True)
    apart = _distance(blind[1], exact[1])
    rows.append({"name": "documents that see each other would be noticed", "gradient": apart, "ok": apart > 0.01})
    bad = [row["name"] for row in rows if not row["ok"]]
    return {"checks": rows, **({"failed": "numerics: " + "; ".join(bad)} if bad else {})}


class _Subject:
    """A model and a batch to compute in several ways."""

    def __init__(self, shape: Shape, batch: Any) -> None:
        from cartilha.model.load import load_model

        self.batch = batch
        self.model = load_model(f"random:{shape.model}", torch.device(shape.device)).model
        generator = torch.Generator(shape.device).manual_seed(0)
        with torch.no_grad():  # fresh weights hardly look at other tokens
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.add_(noise, alpha=0.03)

    def step(self, kernel: str, dtype: torch.dtype, body: Any = None, leak: bool = False) -> Any:
        """Loss and gradients of the packed batch."""
        from cartilha.model import forward

        batch, chosen = self.batch, forward.choose_kernel
        if leak:
            num_rows, row_length = batch.input_ids.shape
            batch = dataclasses.replace(batch, segment_lengths=torch.full((num_rows,), row_length).numpy())
        forward.choose_kernel = lambda *hardware: kernel
        try:
            return self._finish(forward.batch_nll(self.model, batch, dtype, body) / batch.num_targets)
        finally:
            forward.choose_kernel = chosen

    def alone(self) -> Any:
        """The same by transformers' own model and loss, a document at a time."""
        self.model.set_attn_implementation("eager")
        total: Any = 0.0
        device = self.model.device
        ids, targets = (torch.from_numpy(x).flatten().to(device) for x in (self.batch.input_ids, self.batch.targets))
        begin = 0
        for length in self.batch.segment_lengths.tolist():
            piece = slice(begin, begin + length)
            begin += length
            logits = self.model(ids[None, piece], use_cache=False).logits[0].float()
            total = total + torch.nn.functional.cross_entropy(logits, targets[piece], reduction="sum")
        result = self._finish(total / self.batch.num_targets)
        from cartilha.model.packed_or_rows import use_document_attention

        use_document_attention(self.model)
        return result

    def _finish(self, loss: torch.Tensor) -> Any:
        self.model.zero_grad()
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in self.model.parameters()]


def _distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
    return float(difference / torch.stack([b.norm() for b in expected]).norm())


def _loss_kernels(shape: Shape, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The chunk's kernel of this device against the plain one, on a full and on a partial chunk."""
    from cartilha.model.loss import chunk_kernel, nll_and_gradient

    kernel, rows = chunk_kernel(shape.device), []
    for num_tokens in (256, 77):
        logits = (4 * torch.randn(num_tokens, 5027, device=shape.device)).to(dtype)
        index = torch.randint(0, 5027, (num_tokens, 1), device=shape.device)
        scored = (torch.rand(num_tokens, 1, device=shape.device) < 0.8).float()
        found, expected = (f(logits.clone(), index, scored) for f in (kernel, nll_and_gradient))
        value = abs(float((found[0] - expected[0]) / expected[0]))
        gradient = _distance([found[1].float()], [expected[1].float()])
        rows.append({"name": f"loss kernel, {num_tokens} tokens", "loss": value, "gradient": gradient,
                     "ok": value < 1e-5 and gradient < 0.01})  # fmt: skip
    if shape.device == "cuda":
        rows.append(_was_compiled("loss", kernel))
    return rows


def _was_compiled(name: str, function: Any) -> dict[str, Any]:
    """Asked for on cards of capability 8 and above; Triton has given up older ones: plain code is no fault there."""
    compiled = bool(getattr(function, "is_compiled", False))
    return {"name": f"the {name} was compiled", "compiled": compiled,
            "ok": compiled or torch.cuda.get_device_capability() < (8, 0)}  # fmt: skip


def noise(shape: Shape, dtype: str, compiled: bool) -> dict[str, Any]:
    """The same training twice: the largest difference of a step's loss, and how many losses are equal to the bit."""
    runs = [[float(record.loss) for record in train_ours(shape, dtype, compiled)] for _ in range(2)]
    differences = [abs(a - b) for a, b in zip(*runs, strict=True)]
    return {"largest_difference": max(differences), "equal_steps": differences.count(0.0), "steps": len(differences)}
