"""Checks that take gradients and steps. Weights are put back afterwards."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cartilha.blocks.packing import IGNORE_INDEX, PackedStream, stack
from cartilha.blocks.sampler import BlockSampler
from cartilha.checks.outcome import CheckResult, Judgement, Subject
from cartilha.errors import counted
from cartilha.evaluation.sums import perplexity
from cartilha.model.forward import batch_nll, hidden_states
from cartilha.model.head import head_of
from cartilha.model.loss import linear_cross_entropy
from cartilha.tokens.packed import PackedDocuments
from cartilha.training.checkpoint import freeze, load_checkpoint, write_checkpoint
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.schedule import Schedule
from cartilha.training.state import StepRecord, TrainingState

PROBE_BLOCK = 64  # inputs a block where only equality is at stake
SAME_LOSS = 1e-5  # relative, of two ways to compute a loss in float32
SAME_GRADIENT = 1e-3  # relative, of two gradients; norms of sums in another order
OVERFIT_PERPLEXITY = 1.5
OVERFIT_TEXTS, OVERFIT_TEXTS_QUICK = 100, 8
OVERFIT_TOKENS, OVERFIT_TOKENS_QUICK = 128, 24  # of each text
OVERFIT_PASSES = 600  # at most: fresh weights of a small model need about a hundred
OVERFIT_PATIENCE = 15  # passes in which the best or the median loss must fall by a fiftieth, or learning has stopped
OVERFIT_WEIGHT_DECAY = 0.0  # decay works against learning by heart


@contextmanager
def weights_kept(model: torch.nn.Module) -> Iterator[None]:
    """A context at whose end the model has the weights of its beginning, and no gradients."""
    kept = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(kept)
        model.zero_grad(set_to_none=True)


def _sampler(stream: PackedStream, blocks_per_step: int) -> BlockSampler:
    return BlockSampler(stream.documents, block_size=stream.block_size, blocks_per_step=blocks_per_step, seed=0)


def _state(subject: Subject, weight_decay: float = 0.1) -> TrainingState:
    rates = {"lr": subject.lr, "weight_decay": weight_decay}
    return TrainingState.begin(subject.model, subject.dtype, **rates, optimizer=subject.optimizer)


def _steps(
    subject: Subject, state: TrainingState, sampler: BlockSampler, schedule: Schedule, micro_batch_size: int
) -> Iterator[StepRecord]:
    return train_steps(state, sampler, schedule, StepSettings(subject.dtype, micro_batch_size))


def overfit(subject: Subject) -> CheckResult:
    """A few texts are learnt by heart: their perplexity falls below 1.5.

    Catches targets that are not the next token, gradients that do not reach the weights, an optimizer or a learning
    rate that does not work. A model that cannot overfit cannot learn.
    """
    words = Judgement(
        f"perplexity of the first {OVERFIT_TEXTS_QUICK if subject.quick else OVERFIT_TEXTS} texts below "
        f"{OVERFIT_PERPLEXITY}",
        "The model does not learn even what it sees again and again: the training is broken, or the rate is.",
        "Try a lower and a higher --lr; if none learns, look at the other checks first.",
    )
    texts, length = (OVERFIT_TEXTS_QUICK, OVERFIT_TOKENS_QUICK) if subject.quick else (OVERFIT_TEXTS, OVERFIT_TOKENS)
    documents = subject.training[:texts]
    stream = subject.stream(documents, min(subject.block_size, 256, subject.loaded.context_length), max_tokens=length)
    sampler = _sampler(stream, blocks_per_step=min(8, len(stream)))
    num_steps = OVERFIT_PASSES * sampler.steps_per_epoch
    losses: list[float] = []
    with weights_kept(subject.model):
        state = _state(subject, OVERFIT_WEIGHT_DECAY)
        nll = 0.0
        # The rate is constant after a short rise: the passes end when the texts are known.
        schedule = Schedule(num_steps, subject.lr, 3 / num_steps, 1.0)
        for step in _steps(subject, state, sampler, schedule, subject.micro_batch_size):
            nll += float(step.loss) * step.num_targets
            if step.ends_epoch:
                losses.append(nll / sampler.targets_per_epoch)
                nll = 0.0
                if losses[-1] < math.log(OVERFIT_PERPLEXITY) or _has_stopped(losses):
                    break
    curve, num_tokens = [perplexity(loss) for loss in losses], sampler.targets_per_epoch
    shown = " -> ".join(f"{curve[i]:,.2f}" for i in sorted({0, len(curve) // 4, len(curve) // 2, len(curve) - 1}))
    counts = (counted(len(documents), "text"), counted(num_tokens, "token"), counted(len(curve), "pass"))
    figures = {"curve": curve, "num_texts": len(documents), "num_tokens": num_tokens, "lr": subject.lr}
    return words.judge(curve[-1] < OVERFIT_PERPLEXITY, f"{', '.join(counts)}: perplexity {shown}", **figures)


def _has_stopped(losses: list[float]) -> bool:
    """Whether the loss is not finite, or the last passes lowered neither the best nor the median loss by a fiftieth.

    One of the two is not enough: single passes jump by several per cent, up and down, and by how much depends on the
    last bits of a processor's sums.
    """
    if not math.isfinite(losses[-1]):
        return True
    before, latest = losses[:-OVERFIT_PATIENCE], losses[-OVERFIT_PATIENCE:]
    if not before:
        return False
    usual = statistics.median(latest) / statistics.median(before[-OVERFIT_PATIENCE:])
    return min(latest) > 0.98 * min(before) and usual > 0.98


def loss(subject: Subject) -> CheckResult:
    """The fused, chunked loss and its gradients equal the plain ones over all logits at once.

    Catches a chunk lost or counted twice, an ignored target that is scored, a gradient of the wrong scale.
    """
    words = Judgement(
        f"fused and plain loss equal to {SAME_LOSS:g}, their gradients to {SAME_GRADIENT:g}",
        "Training would follow another loss than the one that is reported.",
        "Report it with this output; on CUDA, try once more without a compiler (TORCH_COMPILE_DISABLE=1).",
    )
    batch = stack([_partly_padded(subject).block(i) for i in range(2)])
    targets = torch.from_numpy(batch.targets).to(subject.device).flatten()
    with torch.no_grad():
        states = hidden_states(subject.model, batch, torch.float32).flatten(0, 1)
    found = []
    for fused in (True, False):
        hidden = states.detach().clone().requires_grad_()
        own = head_of(subject.model)
        bias = None if own.bias is None else own.bias.detach()
        head = replace(own, weight=own.weight.detach().clone().requires_grad_(), bias=bias)
        if fused:
            nll = linear_cross_entropy(hidden, head, targets, torch.float32)
        else:
            logits = head.logits(hidden, torch.float32)
            nll = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        nll.backward()
        assert hidden.grad is not None and head.weight.grad is not None
        found.append((float(nll.detach()), hidden.grad, head.weight.grad))
    (ours, own_hidden, own_head), (plain, plain_hidden, plain_head) = found
    difference = abs(ours / plain - 1)
    apart = max(_relative(own_hidden, plain_hidden), _relative(own_head, plain_head))
    measured = f"losses {ours:.4f} and {plain:.4f} nats (relative difference {difference:.1e}), gradients {apart:.1e}"
    passed = difference <= SAME_LOSS and apart <= SAME_GRADIENT
    return words.judge(passed, measured, fused=ours, plain=plain, gradient_difference=apart)


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def _partly_padded(subject: Subject) -> PackedStream:
    """Two and a half short blocks of training text, so that the last one has fewer targets than the others."""
    length = min(PROBE_BLOCK, subject.loaded.context_length)
    ids = np.concatenate(subject.tokenizer.encode([document.text for document in subject.training]))
    ids = np.resize(ids, length * 5 // 2 - 1)
    tokenizer = subject.tokenizer
    return PackedStream(PackedDocuments.from_ids([ids], tokenizer.prefix_id, tokenizer.end_id), length)


def accumulation(subject: Subject) -> CheckResult:
    """A step of k micro-batches equals the same step in one piece, though the last micro-batch has fewer targets.

    Catches means of means: gradients that depend on how much memory the machine has.
    """
    words = Judgement(
        f"loss and gradient norm of one step equal to {SAME_GRADIENT:g}, however it is cut",
        "The result would depend on the micro-batch, that is, on the machine's memory.",
        "Report it with this output; until then keep --micro_batch_size the same in all runs.",
    )
    stream, schedule = _partly_padded(subject), Schedule(1, 1e-9, 0, 1)
    found = []
    for micro_batch_size in (1, len(stream)):
        with weights_kept(subject.model):
            sampler = _sampler(stream, len(stream))
            (step,) = _steps(subject, _state(subject, 1e-9), sampler, schedule, micro_batch_size)
            found.append((float(step.loss), float(step.grad_norm)))
    (cut_loss, cut_norm), (whole_loss, whole_norm) = found
    apart = max(abs(cut_loss / whole_loss - 1), abs(cut_norm / whole_norm - 1))
    tolerance = SAME_GRADIENT if subject.dtype == torch.float32 else 20 * SAME_GRADIENT
    measured = f"{len(stream)} micro-batches: loss {cut_loss:.5f}, gradient norm {cut_norm:.5f}; "
    measured += f"in one: {whole_loss:.5f}, {whole_norm:.5f}"
    return words.judge(apart <= tolerance, measured, difference=apart)


def gradients(subject: Subject) -> CheckResult:
    """Every parameter gets a gradient, and every gradient is a number.

    Catches frozen or detached weights, a module that the forward pass leaves out, and overflow.
    """
    words = Judgement(
        "finite in every parameter group; no parameter without one",
        "Parts of the model would not be trained, or the first step would destroy it.",
        "Look at the parameters named; a model with frozen weights is not trained further by this tool.",
    )
    model = subject.model
    model.zero_grad(set_to_none=True)
    (batch_nll(model, stack([_partly_padded(subject).block(0)]), subject.dtype) / PROBE_BLOCK).backward()
    without, infinite = [], []
    groups = {"matrices": 0.0, "vectors": 0.0}
    for name, parameter in model.named_parameters():
        # A key's bias moves all scores of a query alike: its gradient is zero in theory, apart from rounding.
        if parameter.grad is None or (not parameter.grad.any() and not name.endswith(("k_proj.bias", "key.bias"))):
            without.append(name)
            continue
        square = float(parameter.grad.double().square().sum())
        if not math.isfinite(square):
            infinite.append(name)
        groups["matrices" if parameter.dim() >= 2 else "vectors"] += square
    model.zero_grad(set_to_none=True)
    norms = {group: math.sqrt(square) if square >= 0 else math.nan for group, square in groups.items()}
    measured = ", ".join(f"norm of {group} {norm:.3g}" for group, norm in norms.items())
    for names, fault in ((without, "without gradient"), (infinite, "not finite")):
        if names:
            measured += f"; {fault}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return words.judge(not without and not infinite, measured, norms=norms, without=without, infinite=infinite)


def resume(subject: Subject) -> CheckResult:
    """Three steps, with a stop after the first and a resume from disk, give the losses of an unbroken run.

    The second step's update needs the moments of the first, and the third step's loss shows it. Catches a checkpoint
    that forgets weights, moments, schedule, scaler or the position in the data.
    """
    words = Judgement(
        "the losses equal the unbroken run's"
        + (", bit for bit" if subject.device.type == "cpu" else f" to {SAME_GRADIENT:g}"),
        "A run that is interrupted and resumed would not be the run that was asked for.",
        "Report it with this output; until then do not resume runs.",
    )
    sampler = _sampler(_partly_padded(subject), blocks_per_step=1)
    schedule = Schedule(3, subject.lr, 0.3, 0.1)
    with weights_kept(subject.model):
        unbroken = [float(step.loss) for step in _steps(subject, _state(subject), sampler, schedule, 1)]
    with weights_kept(subject.model), tempfile.TemporaryDirectory(prefix=".check-", dir=subject.disk) as directory:
        state = _state(subject)
        losses = [float(next(_steps(subject, state, sampler, schedule, 1)).loss)]
        checkpoint = write_checkpoint(Path(directory), freeze(state, {}))
        with torch.no_grad():
            for parameter in subject.model.parameters():
                parameter.zero_()
        state = _state(subject)
        load_checkpoint(checkpoint, state)
        losses += [float(step.loss) for step in _steps(subject, state, sampler, schedule, 1)]
    apart = max(abs(a - b) for a, b in zip(losses, unbroken, strict=True)) if len(losses) == 3 else math.inf
    tolerance = 0.0 if subject.device.type == "cpu" else SAME_GRADIENT * unbroken[-1]
    shown = [", ".join(f"{value:.6f}" for value in values) for values in (unbroken, losses)]
    passed, measured = len(losses) == 3 and apart <= tolerance, f"unbroken {shown[0]}; resumed {shown[1]}"
    return words.judge(passed, measured, unbroken=unbroken, resumed=losses)
