"""Head and cross-entropy together, chunk by chunk: never more than one chunk of logits exists.

All logits of 16 x 1024 tokens and 50,272 ids take about 9 GiB. Here the forward pass computes the gradients, too, and
keeps only those of hidden states and head. Matrix products run in the compute dtype, reductions in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cartilha.blocks.packing import IGNORE_INDEX
from cartilha.machine.devices import compile_pays
from cartilha.model.compiling import CompiledOrPlain, keep_compiled_code
from cartilha.model.head import Head, HeadShape
from cartilha.model.products import add_product, cpu_product_dtype
from cartilha.model.weight_gradients import computes_in_place, factor_in_place, gradient_of

CHUNK_TOKENS, MAX_CHUNK_TOKENS = 1024, 8192
LOGITS_SHARE = 0.05  # of a GPU's memory, which a chunk of logits may take with its gradient
_Manner = tuple[HeadShape, torch.dtype, float | None, int]


def chunk_tokens(num_ids: int, dtype: torch.dtype, gpu_bytes: int = 0) -> int:
    """Tokens per chunk: 1,024 on a CPU (`gpu_bytes` 0), and up to 8,192 on a GPU with so much memory.

    Of 1,024, 2,048, 4,096 and 8,192 it is the largest whose logits and their gradient, in `dtype`, take at most
    `LOGITS_SHARE` of that memory. The head's gradient is read and written once per chunk, so that a GPU is faster with
    few of them. A CPU is not.
    """
    chunk = CHUNK_TOKENS
    while 2 * chunk <= MAX_CHUNK_TOKENS and 2 * chunk * 2 * num_ids * dtype.itemsize <= LOGITS_SHARE * gpu_bytes:
        chunk *= 2
    return chunk


def _chunk_on(device: torch.device, head: Head, dtype: torch.dtype) -> int:
    """Tokens per chunk of logits in `dtype` on this device."""
    gpu_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return chunk_tokens(len(head.weight), dtype, gpu_bytes)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over scored tokens of -ln softmax(hidden @ weight.T)[target]; the forward pass computes the gradients, too.

    `manner` has the head's shape, the dtype of the products, the factor that the nll will be multiplied by, if it is
    known, and the tokens per chunk. With a factor, the weight's gradient is added to `weight.grad`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, manner: _Manner
    ) -> Tensor:
        shape, dtype, known_factor, chunk = manner
        in_place = known_factor is not None
        head, whole = weight.detach().to(dtype), Head(weight, bias, shape)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None  # of a frozen head
        if ctx.needs_input_grad[1]:
            grad_weight = gradient_of(weight) if in_place else torch.zeros_like(weight, dtype=torch.float32)
        nll = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # All chunks share one buffer: fresh memory costs more than the arithmetic (docs/log.md).
        buffer = hidden.new_empty((min(chunk, len(targets)), len(weight)), dtype=dtype)
        for begin in range(0, len(targets), chunk):
            rows = slice(begin, begin + chunk)
            states = hidden[rows].to(dtype)
            scored = (targets[rows] != IGNORE_INDEX)[:, None]
            index = targets[rows, None].where(scored, 0)
            logits = whole.finish(torch.mm(states, head.T, out=buffer[: len(states)]))
            slope = shape.slope(logits)  # before the logits become their gradient
            chunk_nll, grad_logits = chunk_kernel(hidden.device.type)(logits, index, scored.float())
            nll += chunk_nll
            if shape != HeadShape():
                grad_logits.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=torch.float32)
            grad_hidden[rows] = grad_logits @ head
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, states, 1.0 if known_factor is None else known_factor)
        ctx.known_factor = known_factor
        ctx.save_for_backward(grad_hidden, None if in_place else grad_weight, grad_bias)
        return nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        # In place: nothing else uses these tensors.
        gradients = [gradient if gradient is None else gradient.mul_(scale) for gradient in ctx.saved_tensors]
        if ctx.known_factor is not None and type(scale) is Tensor:  # memory is traced with tensors without contents
            found = float(scale)
            assert not math.isfinite(found) or math.isclose(found, ctx.known_factor, rel_tol=1e-5), found
        return *gradients, None, None


@functools.cache
def chunk_kernel(device_type: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function for a chunk's nll and gradient: compiled where that pays."""
    if not compile_pays(device_type):
        return nll_and_gradient
    keep_compiled_code()
    # The last chunk may have fewer rows; its size makes the number of rows, and nothing else, symbolic.
    return CompiledOrPlain(torch.compile(fused_nll_and_gradient), nll_and_gradient, "The loss")


def nll_and_gradient(logits: Tensor, index: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Summed nll (float32) of a chunk and its gradient by the logits: softmax minus one-hot, zero in rows not scored.

    `logits` (num_tokens, num_ids) are in the compute dtype, and the gradient overwrites them. `index` (num_tokens, 1)
    has the target of each row; `scored` (num_tokens, 1), float32, is 1 in rows that count and 0 in others.
    """
    work = logits.float()  # in float32 these are the logits themselves, which are overwritten
    target_logits = work.gather(1, index)
    highest = work.amax(dim=1, keepdim=True)
    total = work.sub_(highest).exp_().sum(dim=1, keepdim=True)
    nll = (scored * (total.log() + highest - target_logits)).sum()
    return nll, logits.copy_(work.mul_(scored / total).scatter_add_(1, index, -scored))


def fused_nll_and_gradient(logits: Tensor, index: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """`nll_and_gradient` for the compiler, in nothing but reductions along rows and elementwise steps.

    Logits are read and the gradient is written in the compute dtype, and float32 exists in registers alone. A scatter
    would need a float32 copy in memory.
    """
    work = logits.float()
    highest = work.amax(dim=1, keepdim=True)
    weights = (work - highest).exp()
    total = weights.sum(dim=1, keepdim=True)
    is_target = torch.arange(work.shape[1], device=work.device) == index
    nll = (scored * (total.log() + highest - work.gather(1, index))).sum()
    return nll, (weights * (scored / total) - is_target * scored).to(logits.dtype)


def linear_cross_entropy(
    hidden: Tensor, head: Head, targets: Tensor, dtype: torch.dtype, chunk: int | None = None
) -> Tensor:
    """Summed nll of the targets in nats, a float32 scalar, differentiable once in `hidden` and the head.

    `hidden` are last hidden states (num_tokens, hidden_size), `targets` shifted token ids (num_tokens,) with
    `IGNORE_INDEX` where nothing is scored. Matrix products run in `dtype`; `chunk` is a number of tokens, by default
    what suits the device.
    """
    if chunk is None:
        chunk = _chunk_on(hidden.device, head, dtype)
    if computes_in_place(head.weight):  # on a CPU, in training
        dtype = cpu_product_dtype(dtype)
    manner = (head.shape, dtype, factor_in_place(head.weight), chunk)
    nll: Tensor = _LinearCrossEntropy.apply(hidden, head.weight, head.bias, targets, manner)
    return nll


@dataclass(frozen=True)
class TokenScores:
    """Scores of tokens, float32 of shape (num_tokens,) unless said otherwise; None for what was not `Wanted`."""

    nll: Tensor  # minus ln p(token), nats
    unused_mass: Tensor  # total probability of the rows of the vocabulary that no token uses
    entropy: Tensor | None = None  # of the distribution over the next token, nats
    rank: Tensor | None = None  # of the token, 1 for the likeliest, int64
    likeliest_ids: Tensor | None = None  # likeliest first, int64, shape (num_tokens, num_likeliest)
    likeliest: Tensor | None = None  # their probabilities, same shape


@dataclass(frozen=True)
class Wanted:
    """What is wanted of each token beside its nll."""

    unused_ids: Tensor | None = None  # rows of the head that no token uses, for `unused_mass`
    details: bool = False  # entropy and rank, which cost two more passes over the logits
    num_likeliest: int = 0  # how many of the likeliest tokens


NLL_ONLY = Wanted()


@torch.no_grad()
def token_scores(
    hidden: Tensor, head: Head, targets: Tensor, dtype: torch.dtype, wanted: Wanted = NLL_ONLY
) -> TokenScores:
    """Score each target, without gradients and with one chunk of logits at a time.

    `hidden` has the shape (num_tokens, hidden_size), `targets` (num_tokens,). The matrix product runs in `dtype`, the
    softmax in float32.
    """
    weight, chunk = head.weight.to(dtype), _chunk_on(hidden.device, head, torch.float32)
    buffer = hidden.new_empty((min(chunk, len(targets)), len(weight)), dtype=torch.float32)
    chunks = []
    for begin in range(0, max(1, len(targets)), chunk):  # no targets are one empty chunk
        rows = slice(begin, begin + chunk)
        states = hidden[rows].to(dtype)
        product = buffer[: len(states)]
        if dtype == torch.float32:
            torch.mm(states, weight.T, out=product)
        else:
            product.copy_(states @ weight.T)
        chunks.append(_score_chunk(head.finish(product), targets[rows, None], wanted))
    found = [name for name, first in vars(chunks[0]).items() if first is not None]
    return TokenScores(**{name: torch.cat([getattr(chunk, name) for chunk in chunks]) for name in found})


def _score_chunk(logits: Tensor, index: Tensor, wanted: Wanted) -> TokenScores:
    """Scores of a chunk: `logits` (num_tokens, num_ids) are overwritten, `index` (num_tokens, 1) has the targets."""
    details, unused_ids = wanted.details, wanted.unused_ids
    target_logits = logits.gather(1, index)
    rank = entropy = None
    if details:  # ties count in the token's favour by half, so that a uniform model's ranks average (V + 1) / 2
        rank = (logits > target_logits).sum(dim=1) + ((logits == target_logits).sum(dim=1) + 1) // 2
    highest = logits.amax(dim=1, keepdim=True)
    shifted = logits.sub_(highest)
    weights = shifted.exp() if details else shifted.exp_()  # the entropy needs both
    total = weights.sum(dim=1)
    if details:
        entropy = total.log() - (weights * shifted.clamp(min=-1e30)).sum(dim=1) / total
    unused = weights[:, unused_ids].sum(dim=1) / total if unused_ids is not None else torch.zeros_like(total)
    scores = TokenScores(total.log() - (target_logits - highest)[:, 0], unused, entropy, rank)
    if not wanted.num_likeliest:
        return scores
    likeliest, ids = weights.topk(min(wanted.num_likeliest, weights.shape[1]), dim=1)
    return replace(scores, likeliest_ids=ids, likeliest=likeliest / total[:, None])
