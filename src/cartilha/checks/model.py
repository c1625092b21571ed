"""Checks of the model's forward pass: where it starts, what a token may see, how exact the numbers are."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cartilha.blocks.packing import Batch, Block, PackedStream, stack
from cartilha.checks.outcome import CheckResult, Judgement, Subject
from cartilha.evaluation.baselines import token_counts, unigram_nll
from cartilha.evaluation.documents import ScoredDocuments, encode_documents
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.sums import perplexity
from cartilha.evaluation.windows import MAX_WINDOW
from cartilha.machine.devices import dtype_name, seed_everything
from cartilha.model.forward import batch_nll, hidden_states, token_logits
from cartilha.model.head import body_of, head_of
from cartilha.model.loss import token_scores
from cartilha.model.packed_or_rows import transformers_attention, use_document_attention

PROBE_POSITIONS = 256  # a block for causality and isolation: the shorter, the cheaper
START_TOKENS = 2048  # random tokens: the mean of their target logits is known to about 1 %
START_TOLERANCE = 0.05  # of the perplexity
UNCHANGED = 1e-3  # largest change of a logit that counts as none; another document moves them by whole units
SAME_NLL = 1e-4  # relative difference of two ways to compute a sum in float32
MAX_DRIFT = 0.01  # nats per token by which half precision may move the mean
FP16_LARGEST = 65504.0
SCORED_TOKENS, SCORED_TOKENS_QUICK = 20_000, 1500


def start(subject: Subject) -> CheckResult:
    """Fresh weights start where theory says, and pretrained ones below a unigram model.

    A head with independent weights of standard deviation sigma over hidden states h makes normal logits of variance
    sigma^2 |h|^2, so that the loss on unrelated targets is ln V + sigma^2 |h|^2 / 2, where |h|^2 is the hidden size d
    after a final norm. With the head zeroed it is ln V exactly. Catches a loss that is shifted, masked or averaged
    wrongly, and pretrained weights that did not load (their loss is that of fresh ones).
    """
    words = Judgement(
        f"fresh weights: perplexity within {START_TOLERANCE:.0%} of exp(ln V + sigma^2 |h|^2 / 2), with a zero head V"
        + ("" if subject.is_random else "; pretrained: below the unigram model"),
        "The loss is computed wrongly, or the pretrained weights did not load.",
        "Fetch the model's files again and compare its perplexity with the published one; if fresh weights start "
        "elsewhere than theory says, report it with this output.",
    )
    found = _fresh_start(subject)
    near_theory = abs(found["perplexity"] / found["theory"] - 1) <= START_TOLERANCE
    exact = abs(found["zero_head"] / found["num_rows"] - 1) <= SAME_NLL
    measured = (
        f"fresh {found['perplexity']:,.0f} (theory {found['theory']:,.0f}), zero head {found['zero_head']:,.1f} "
        f"(V = {found['num_rows']:,})"
    )
    if subject.is_random:
        return words.judge(near_theory and exact, measured, **found)
    own, unigram = _beside_unigram(subject)
    measured += f"; pretrained {own:,.1f}, unigram {unigram:,.1f}"
    return words.judge(near_theory and exact and own < unigram, measured, pretrained=own, unigram=unigram, **found)


def _fresh_start(subject: Subject) -> dict[str, float]:
    """Perplexities of fresh weights on random tokens, as they are and with the head zeroed, beside theory."""
    seed_everything(0)
    config = copy.deepcopy(subject.model.config)
    with subject.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert isinstance(model, PreTrainedModel)
    use_document_attention(model)
    head = replace(head_of(model), shape=head_of(subject.model).shape)
    rows = len(head.weight)
    length = min(subject.loaded.context_length, 512)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, rows, (max(1, START_TOKENS // length), length + 1))
    batch = Batch(
        ids[:, :-1], ids[:, 1:], np.tile(np.arange(length), (len(ids), 1)), np.full(len(ids), length, np.int64)
    )
    targets = torch.from_numpy(ids[:, 1:].reshape(-1)).to(subject.device)
    with torch.no_grad():
        states = hidden_states(model, batch, torch.float32).flatten(0, 1)
        nll = float(token_scores(states, head, targets, torch.float32).nll.double().mean())
        sigma = float(head.weight.std()) * head.shape.scale
        spread = sigma**2 * float(states.double().square().sum(-1).mean())
        head.weight.zero_()
        zero = float(token_scores(states, head, targets, torch.float32).nll.double().mean())
    found = {"perplexity": perplexity(nll), "theory": rows * perplexity(spread / 2), "zero_head": perplexity(zero)}
    return {**found, "num_rows": rows, "hidden_square": spread / float(head.weight.shape[1])}


def _beside_unigram(subject: Subject) -> tuple[float, float]:
    """Perplexities of the model and of a unigram model of the training text, on the same held-out tokens."""
    scored, store = _sample(subject), subject.store
    tokens = (
        store.tokens("train") if store is not None else np.asarray(subject.stream(subject.training, 2).documents.tokens)
    )
    unigram = unigram_nll(token_counts(tokens, len(head_of(subject.model).weight)), scored.ids)
    num_tokens = scored.num_tokens.sum()
    return perplexity(_nll(subject, torch.float32).sum() / num_tokens), perplexity(unigram.sum() / num_tokens)


def _sample(subject: Subject) -> ScoredDocuments:
    """The beginnings of the held-out documents, short enough to be affordable together."""
    total = SCORED_TOKENS_QUICK if subject.quick else SCORED_TOKENS
    context = min(subject.loaded.context_length, MAX_WINDOW)
    each = max(2, min(context - 1, total // len(subject.held_out)))
    return encode_documents(subject.held_out, subject.tokenizer, first_tokens=each)


def _nll(subject: Subject, dtype: torch.dtype) -> np.ndarray:
    """Nats of each document of the sample in this compute dtype; scored once for all checks that ask."""
    if dtype not in subject.scored:
        subject.scored[dtype] = score_documents(subject.in_dtype(dtype), _sample(subject)).nll
    return subject.scored[dtype]


def causality(subject: Subject) -> CheckResult:
    """Changing a token changes no logit before it, and does change those after it.

    Catches a mask that is off by one, or missing: the model would read the answer.
    """
    words = Judgement(
        f"logits before the changed token move by less than {UNCHANGED:g} of their spread, those after it move",
        "A position sees the token that it has to predict; every loss would be too good, and generation nonsense.",
        "Do not train with this model and version of transformers; report it with this output.",
    )
    stream = _probe_stream(subject, num_documents=1)
    if stream.num_inputs < 3:
        return words.skip("the sample holds no text of a few tokens")
    block = stream.block(0)
    past = int(block.segment_lengths[0])
    changed = past // 2
    before, after = _before_and_after(subject, block, changed, changed + 1)
    earlier, later = _largest_change(before, after, 0, changed), _largest_change(before, after, changed, past)
    spread = f"at most {earlier:.1e} of the logits' spread before it, {later:.1e} after"
    measured = f"token {changed} of {past} changed: {spread}"
    return words.judge(earlier <= UNCHANGED < later, measured, before=earlier, after=later)


def isolation(subject: Subject) -> CheckResult:
    """Changing a document changes nothing in its neighbours in the block, which read as if they stood alone.

    Catches packed documents that see each other, and positions that do not begin anew with each document.
    """
    words = Judgement(
        f"neighbours move by less than {UNCHANGED:g} of the logits' spread, and equal the document alone",
        "Packed documents see each other: training and perplexity would depend on what stands beside a text.",
        "Do not train with this model and version of transformers; report it with this output.",
    )
    stream = _probe_stream(subject, num_documents=4)
    if len(stream.num_tokens) < 3:
        return words.skip("the sample holds fewer than three documents with text")
    block = stream.block(0)
    first, past, end = np.cumsum(block.segment_lengths)[:3].tolist()
    before, after = _before_and_after(subject, block, first, past)
    own = _largest_change(before, after, first, past)
    beside = max(_largest_change(before, after, 0, first), _largest_change(before, after, past, end))
    alone = _logits(subject, Batch.unscored(block.input_ids[past:end]))
    apart = float((alone - before[past:end]).abs().max() / before.std())
    # Half precision rounds differently in rows of another length; that is no leak.
    near = UNCHANGED if subject.dtype == torch.float32 else 0.5
    measured = f"neighbours moved by {beside:.1e} of the logits' spread (the document itself by {own:.1e}); "
    measured += f"packed against alone {apart:.1e}"
    passed = beside <= UNCHANGED < own and apart <= near
    return words.judge(passed, measured, neighbours=beside, itself=own, packed_against_alone=apart)


def _probe_stream(subject: Subject, num_documents: int) -> PackedStream:
    """One block with the beginnings of a few held-out documents, each with its end token."""
    length = min(PROBE_POSITIONS, subject.loaded.context_length)
    documents = [document for document in subject.held_out if len(document.text) > 1][:num_documents]
    return subject.stream(documents, length, max_tokens=max(2, length // max(1, len(documents)) - 2))


def _logits(subject: Subject, batch: Batch) -> torch.Tensor:
    """Of the only row of a batch, float32, shape (row_length, num_rows)."""
    return token_logits(subject.model, batch, subject.dtype)[0]


def _before_and_after(subject: Subject, block: Block, first: int, past: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a block, and of the same with other text tokens at positions first to past - 1."""
    before = _logits(subject, stack([block]))
    num_ids = min(subject.tokenizer.num_ids, len(head_of(subject.model).weight))
    block.input_ids[first:past] = (block.input_ids[first:past] + 7919) % num_ids
    return before, _logits(subject, stack([block]))


def _largest_change(before: torch.Tensor, after: torch.Tensor, begin: int, end: int) -> float:
    """Largest difference of a logit at positions begin to end - 1, in standard deviations of the logits."""
    if begin >= end:
        return 0.0
    return float((after[begin:end] - before[begin:end]).abs().max() / before.std())


def precision(subject: Subject) -> CheckResult:
    """The compute dtype against float32: the drift in nats per token, and how near fp16 comes to overflowing.

    Catches a dtype in which this model loses its accuracy, or overflows to infinity (fp16 ends at 65,504).
    """
    words = Judgement(
        f"mean nll within {MAX_DRIFT:g} nats per token of float32; in float16, activations below half of its range",
        "In this compute type the model's numbers are not those of its weights.",
        "Train and evaluate with --dtype float32, or --dtype bfloat16 where the hardware has it.",
    )
    largest = _largest_activation(subject)
    share = largest / FP16_LARGEST
    if subject.dtype == torch.float32:
        reason = f"the run computes in float32 (in float16, activations would reach {share:.1%} of its range)"
        return words.skip(reason, largest_activation=largest)
    half, full = (_nll(subject, dtype).sum() for dtype in (subject.dtype, torch.float32))
    drift = float(half - full) / int(_sample(subject).num_tokens.sum())
    overflows = subject.dtype == torch.float16 and share > 0.5
    measured = f"{dtype_name(subject.dtype)} drifts by {drift:+.1e} nats per token; "
    measured += f"activations up to {share:.1%} of float16's range"
    passed = abs(drift) <= MAX_DRIFT and not overflows
    return words.judge(passed, measured, drift=drift, largest_activation=largest)


def _largest_activation(subject: Subject) -> float:
    """Largest absolute output of any module on a probe block, float32."""
    largest = 0.0

    def look(module: torch.nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        found = output[0] if isinstance(output, tuple) else output
        if isinstance(found, torch.Tensor) and found.is_floating_point() and found.numel():
            largest = max(largest, float(found.detach().abs().max()))

    hooks = [module.register_forward_hook(look) for module in body_of(subject.model).modules()]
    try:
        with torch.no_grad():
            hidden_states(subject.model, stack([_probe_stream(subject, 4).block(0)]), torch.float32)
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def truth(subject: Subject) -> CheckResult:
    """The held-out nll and the training loss equal those of the plain transformers model, one document at a time.

    Catches any fault of ours in packing, shift, attention, windows or loss: the peer shares none of it.
    """
    words = Judgement(
        f"total nats within {SAME_NLL:g} of transformers' own loss, in evaluation and in training",
        "Our figures are not those of the model; none of them can be trusted.",
        "Do not use this model with this version; report it with this output.",
    )
    model, tokenizer = subject.model, subject.tokenizer
    scored = _sample(subject)
    ours = float(_nll(subject, torch.float32).sum())
    stream = _probe_stream(subject, num_documents=4)
    with torch.no_grad():
        trained = float(batch_nll(model, stack([stream.block(0)]), torch.float32))
    packed = [
        [*stream.documents.tokens[begin : begin + length].tolist(), tokenizer.end_id]
        for begin, length in zip(stream.start, stream.num_tokens, strict=True)
    ]
    with transformers_attention(model):
        theirs = sum(_plain_nll(subject, ids.tolist()) for ids in scored.ids)
        plain = sum(_plain_nll(subject, ids) for ids in packed)
    differences, num_tokens = (ours / theirs - 1, trained / plain - 1), int(scored.num_tokens.sum())
    measured = (
        f"{ours:,.3f} nats, transformers {theirs:,.3f} (relative difference {differences[0]:+.1e}) over "
        f"{num_tokens:,} tokens; a packed block {trained:,.3f} and {plain:,.3f}"
    )
    figures = {"ours": ours, "theirs": theirs, "packed": trained, "packed_theirs": plain, "num_tokens": num_tokens}
    return words.judge(max(map(abs, differences)) <= SAME_NLL, measured, **figures)


def _plain_nll(subject: Subject, ids: list[int]) -> float:
    """Nats of the tokens after the prefix, by the loss that transformers computes itself."""
    if not ids:
        return 0.0
    input_ids = torch.tensor([[subject.tokenizer.prefix_id, *ids]], device=subject.device)
    with torch.no_grad():
        return float(subject.model(input_ids=input_ids, labels=input_ids).loss) * len(ids)
