"""What a training step keeps in memory, found by running the real code on tensors that have shapes and no contents.

torch's fake tensors go through training's own forward pass, loss and backward pass, and a dispatch mode counts the
bytes of all live storages, so that no architecture needs a formula of its own. Memory grows linearly with the number of
layers: models of one and of two layers are traced, and the rest is a straight line.
"""

from __future__ import annotations

import copy
import functools
import json
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from cartilha.model.adapters import Adapter, add_adapter, trained_parameters
from cartilha.model.attention import ATTENTION_DROPOUT, KERNELS
from cartilha.model.boundaries import plain_torch
from cartilha.model.configuration import with_layers
from cartilha.model.head import body_of, head_inputs, head_of
from cartilha.model.load import look_at
from cartilha.model.loss import CHUNK_TOKENS, linear_cross_entropy
from cartilha.model.packed_or_rows import HowItRuns, use_document_attention
from cartilha.model.products import cpu_product_dtype, sums_in_float32
from cartilha.model.recomputation import checkpoint_layers, layers_of
from cartilha.model.rows import ROWS
from cartilha.model.weight_gradients import weight_gradients_in_place
from cartilha.training.streams import random_numbers_apart


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a step of gradients holds beyond weights, gradients and optimizer states."""

    activations: float  # what the forward pass keeps for the backward pass, cast copies of the weights included
    body: float  # the most alive, with activations, until the gradient is back at the embeddings; linear in tokens
    end: float  # the most after that: the embeddings' own gradients, in models whose vocabulary is large
    head: float  # of the head's weights in float32; 0 where they are frozen
    num_operations: float = 0.0  # of torch, which are small or large

    def toward(self, other: StepBytes, distance: float) -> StepBytes:
        """The point on the line from this one (distance 0) through another one (distance 1)."""
        return StepBytes(*(a + distance * (b - a) for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Computation:
    """How a step is computed, as far as its memory depends on it."""

    dtype: torch.dtype
    kernel: str  # a name in `attention.KERNELS`, or `ROWS`
    on_cpu: bool  # gradients are added in place there, and products may be in float32
    checkpointing: bool = False  # the layers' activations are computed a second time instead of kept
    dropout: bool = False  # the dropout that the configuration asks for is drawn
    adapter: Adapter | None = None  # which alone is trained
    sharded: bool = False  # layers are gathered in `dtype`, so that no copies of them are cast
    weights: torch.dtype = torch.float32
    gpu_bytes: int = 0  # all of a GPU's memory, which decides `chunk`
    chunk: int = CHUNK_TOKENS  # tokens whose logits are there at a time
    gives_back: bool = False  # each gradient is freed in the backward pass, as soon as its parameter has been stepped


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, except those of the tensors that were there before (`others`)."""

    def __init__(self, others: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.num_operations = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def restart(self) -> int:
        # Returns the peak so far; the next one begins with what is alive now.
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.num_operations += 1
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result


class _ProductsOfExperts(TorchFunctionMode):
    """Products with grouped experts as transformers computes them where torch cannot, with what is kept the same.

    For tensors without contents, torch has its own in bfloat16 alone.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._grouped_mm:
            return torch.ops.transformers.grouped_mm_fallback(*args[:2], offs=kwargs["offs"])
        return function(*args, **(kwargs or {}))


def model_without_contents(
    config: PretrainedConfig, adapter: Adapter | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of this configuration whose parameters have shapes alone; nothing is allocated."""
    if adapter is None:
        with FakeTensorMode(), no_init_weights():  # some look at their fresh weights (ModernBERT's decoder)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
            model.tie_weights()
            return model
    with random_numbers_apart(), FakeTensorMode():
        return _adapted(copy.deepcopy(config), adapter)


def _adapted(config: PretrainedConfig, adapter: Adapter) -> PreTrainedModel:
    """A float32 model with an adapter, whose parameters become fake: peft cannot work on fake ones."""
    with unset_fake_temporarily(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        add_adapter(model, adapter.traced)
    model.own_adapter = adapter  # type: ignore[assignment]  # torch types attributes as modules and tensors
    fake: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None:
                    made: Any = torch.empty(value.shape, dtype=value.dtype)
                    if isinstance(value, torch.nn.Parameter):
                        made = torch.nn.Parameter(made, requires_grad=value.requires_grad)
                    kept[name] = fake.setdefault(id(value), made)
    return model


EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")  # as configurations call it


def idle_parameters(model: PreTrainedModel) -> int:
    """Parameters of experts that do not compute the average token; 0 in a model without experts.

    transformers keeps a layer's experts in one parameter of the shape (num_experts, ..., ...).
    """
    counts = [getattr(model.config, name, None) for name in EXPERTS_PER_TOKEN]
    each = next((count for count in counts if isinstance(count, int)), None)
    if each is None:
        return 0
    own = [module._parameters for module in model.modules() if not isinstance(module, torch.nn.Conv1d)]
    experts = [weight for weights in own for weight in weights.values() if weight is not None and weight.dim() == 3]
    return sum(weight.numel() // len(weight) * max(0, len(weight) - each) for weight in experts)


@dataclass(frozen=True)
class Parts:
    """Numbers of parameters of the largest layer, and of all that lies outside of layers; and how many are trained."""

    layer: int
    outside: int
    trained_layer: int
    trained_outside: int


def parts_of(config: PretrainedConfig, adapter: Adapter | None = None) -> Parts:
    """What is gathered of a sharded model at a time."""
    model = model_without_contents(config, adapter)
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(model)]
    trained = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers_of(model)]
    all_trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    return Parts(
        layer=max(layers, default=0),
        outside=int(model.num_parameters()) - sum(layers),
        trained_layer=max(trained, default=0),
        trained_outside=all_trained - sum(trained),
    )


SHORT_ROWS = (4, 8)  # in which models that go token by token are traced
PROBED_ROWS = (16, 32)  # whether they do is seen in these: other models go through them in one piece
LONG_ROWS = 128  # shorter ones are traced as they are


def traced_step(config: PretrainedConfig, rows: int, row_length: int, how: Computation) -> StepBytes:
    """Trace a forward and backward pass over `rows` blocks of one document of `row_length` tokens each.

    Gradients are taken to be there already, as in every micro-batch but a step's first, unless they are given back.
    """
    key = json.dumps(copy.deepcopy(config).to_dict(), sort_keys=True, default=str)
    num_layers = int(config.num_hidden_layers)
    if how.kernel == ROWS and row_length > LONG_ROWS and _goes_token_by_token(key):
        return _from_short_rows(key, num_layers, rows * row_length, row_length, how)
    return _of_layers(key, num_layers, rows, row_length, how)


def _goes_token_by_token(config_json: str) -> bool:
    """Whether longer rows take more operations in the first layer, one per token at least, and not only larger ones."""
    how = Computation(torch.float32, ROWS, on_cpu=False)
    short, longer = (_traced(config_json, 1, 1, length, how).num_operations for length in PROBED_ROWS)
    return longer - short >= PROBED_ROWS[1] - PROBED_ROWS[0]


def _from_short_rows(
    config_json: str, num_layers: int, num_tokens: int, row_length: int, how: Computation
) -> StepBytes:
    """What a model keeps that goes token by token, whose trace takes a time in proportion to the row's length.

    That is so much per token and so much per row, which three traces tell. What attention keeps for pairs of tokens, in
    models that have both, is left out: it is little beside a state for each token.
    """
    if how.dtype == torch.float16:
        how = replace(how, dtype=torch.bfloat16)  # which takes as many bytes
    how, usual = (replace(how, chunk=chunk) for chunk in (max(how.chunk, CHUNK_TOKENS), CHUNK_TOKENS))
    if num_tokens > how.chunk > CHUNK_TOKENS:  # logits grow until they fill the chunk
        sizes = ((how.chunk, how), (num_tokens, usual), (how.chunk, usual))
        parts = (astuple(_from_short_rows(config_json, num_layers, size, row_length, one)) for size, one in sizes)
        return StepBytes(*(full + more - same for full, more, same in zip(*parts, strict=True)))
    first, second = SHORT_ROWS
    shapes = ((CHUNK_TOKENS // first, first), (2 * CHUNK_TOKENS // first, first), (CHUNK_TOKENS // second, second))
    traces = (astuple(_of_layers(config_json, num_layers, *shape, how)) for shape in shapes)
    chunks = num_tokens / CHUNK_TOKENS
    of_rows = chunks * (1 / first - 1 / row_length) / (1 / first - 1 / second)
    return StepBytes(
        *(one + (chunks - 1) * (two - one) + of_rows * (longer - one) for one, two, longer in zip(*traces, strict=True))
    )


def _of_layers(key: str, num_layers: int, rows: int, row_length: int, how: Computation) -> StepBytes:
    how = replace(how, chunk=min(how.chunk, rows * row_length))  # a larger one needs no trace of its own
    one = _traced(key, 1, rows, row_length, how)
    return one if num_layers == 1 else one.toward(_traced(key, 2, rows, row_length, how), num_layers - 1)


@functools.lru_cache(maxsize=256)
def _traced(config_json: str, num_layers: int, rows: int, row_length: int, how: Computation) -> StepBytes:
    # These two measure once and remember the answer, which tensors without contents could not give.
    sums_in_float32("cpu", how.dtype)
    if how.on_cpu:
        cpu_product_dtype(how.dtype)
    settings = with_layers(json.loads(config_json), num_layers)
    if settings.get("first_k_dense_replace"):
        settings["first_k_dense_replace"] = 0  # the first layers would stand for those that have experts
    if not how.on_cpu:  # CUDA's kernel draws attention's dropout again in the backward pass; a CPU's keeps all weights
        settings |= {name: 0.0 for name in ATTENTION_DROPOUT if name in settings}
    config = AutoConfig.for_model(**settings)
    head_shape = look_at(config, config.model_type).head_shape
    # Fresh weights draw random numbers even where they are fake; training's own draws must not change.
    with random_numbers_apart(), FakeTensorMode(allow_non_fake_inputs=True):
        if how.adapter is None:
            with no_init_weights():  # some cannot be begun with one layer (RWKV)
                model = AutoModelForCausalLM.from_config(config, dtype=how.weights)
            model.tie_weights()
        else:
            model = _adapted(config, how.adapter)
        model.head_shape = head_shape
        use_document_attention(model, HowItRuns(packed=how.kernel != ROWS))
        model.train(how.dropout)
        if how.checkpointing:
            checkpoint_layers(model)
        for layer in layers_of(model) if how.sharded else ():
            for parameter in layer.parameters():
                if parameter.dim() > 1:  # a CPU cannot mix dtypes in a norm
                    parameter.data = parameter.data.to(how.dtype)
        for parameter in trained_parameters(model).values():
            if how.gives_back:
                parameter.register_post_accumulate_grad_hook(_give_back)
            else:
                parameter.grad = torch.zeros_like(parameter)
        resident = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]
        with plain_torch(model), _LiveBytes(resident) as live:
            return _pass(model, live, rows, row_length, how)


def _give_back(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _pass(model: PreTrainedModel, live: _LiveBytes, rows: int, row_length: int, how: Computation) -> StepBytes:
    body: list[int] = []

    def gradient_arrives(module: torch.nn.Module, arguments: Any, embedded: torch.Tensor) -> None:
        if embedded.requires_grad:
            embedded.register_hook(lambda gradient: body.append(live.restart()))

    model.get_input_embeddings().register_forward_hook(gradient_arrives)
    ids = torch.zeros(rows, row_length, dtype=torch.long)
    positions, targets = torch.zeros_like(ids), torch.zeros_like(ids)
    if how.kernel != ROWS:
        with nullcontext() if how.dtype == torch.float32 else torch.autocast("cpu", how.dtype):
            segments = KERNELS[how.kernel].traced(rows, row_length)
        arguments: dict[str, Any] = {"position_ids": positions, "segments": segments}
    else:
        arguments = {"attention_mask": torch.ones_like(ids)}
    own = weight_gradients_in_place("cpu", 1.0, returned=how.gives_back)
    with _ProductsOfExperts(), own if how.on_cpu and not how.sharded else nullcontext():
        with nullcontext() if how.dtype == torch.float32 else torch.autocast("cpu", how.dtype):
            output = body_of(model)(input_ids=ids, use_cache=False, **arguments)
            hidden = head_inputs(model, output.last_hidden_state).flatten(0, 1)
        del output
        kept = float(live.now)
        loss = linear_cross_entropy(hidden, head_of(model), targets.flatten(), how.dtype, how.chunk)
    del hidden
    loss.backward()
    if not model.get_input_embeddings().weight.requires_grad:  # below an adapter the way back ends in the first layer
        body.append(live.restart())
    assert len(body) == 1, "the gradient comes back to the embeddings once"
    head = head_of(model).weight
    of_head = 4.0 * head.numel() if head.requires_grad else 0.0
    return StepBytes(kept, body[0], live.peak, of_head, live.num_operations)
