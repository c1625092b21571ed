"""How a model runs: packed, where a proof shows that no document sees another, else with one document per row.

Types are proven by the tests, and each model again with a few tokens when it is loaded. Two documents side by side,
under our attention, must give what each gives alone under transformers' own. A window may be longer than these tokens,
so it is not left to figures: the masks that transformers asks for are recorded, and each layer must pass the same
window to the attention function. `boundaries` has the proof for models with a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from cartilha.errors import first_line
from cartilha.model import boundaries
from cartilha.model.attention import ATTENTION_NAME, CAPPED, FALLBACK, KERNELS, SINKS, Kernel, document_attention
from cartilha.model.boundaries import NotPacked
from cartilha.model.head import body_of, head_of
from cartilha.model.long_rope import choose_by_document

# Types whose variants tests/peer/test_loss_peer.py compares with transformers; they need no proof when they are loaded.
KNOWN_TYPES = ("opt", "llama", "gpt2", "gpt_neox", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "olmo2", "phi3")

# Types that tests/peer/test_every_type.py compares with transformers, with windows and blocks shorter than the text.
# They are proven again when they are loaded. Others are not tried: what begins beyond a proof's few tokens is unknown.
PROVABLE_TYPES = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "cohere", "cohere2",
    "cohere2_moe", "cohere_compass_text", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3",
    "gpt_bigcode", "gpt_oss", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared",
    "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder",
    "jais2", "jetmoe", "kolibri1", "laguna", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2",
    "ministral", "ministral3", "mixtral", "modernbert-decoder", "moshi", "nanochat", "olmo", "olmo3", "olmoe",
    "persimmon", "phi", "phi4_multimodal", "qwen2_moe", "qwen3_moe", "seed_oss", "solar_open", "starcoder2",
    "vaultgemma", "whisper", "youtu",
)  # fmt: skip

PROOF_LENGTHS = (45, 19)  # of the two documents
SAME_STATES = 1e-4  # of the states' spread; what another document leaks moves them by far more
_PROOF_NAME = "cartilha_proof"

# What a layer may pass to an attention function beside what `document_attention` honours: none of it changes a figure.
_HARMLESS = {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "segments", "position_ids", "use_cache",
             "position_embeddings", "cache_position", "output_attentions", "output_hidden_states", "return_dict",
             "output_router_logits", "deterministic", "training", "is_causal", "seq_idx",
             *boundaries.CUMULATIVE_LENGTHS}  # fmt: skip


@dataclass(frozen=True)
class HowItRuns:
    """Packed, or why not; and what its layers ask of a kernel beside causal attention (`attention.CAPPED`, `SINKS`)."""

    packed: bool
    reason: str | None = None
    needs: frozenset[str] = frozenset()
    own_attention: str | None = None  # transformers' implementation, for generation
    boundaries: str | None = None  # which of `boundaries.CUMULATIVE_LENGTHS` its kernels are given, if any


PACKED = HowItRuns(packed=True)


def is_known(config: PretrainedConfig) -> bool:
    """Whether models of this configuration run packed, and have a plain head, without another proof."""
    return config.model_type in KNOWN_TYPES


def how_it_runs(model: PreTrainedModel) -> HowItRuns:
    """What `use_document_attention` found for this model."""
    found: Any = getattr(model, "how_it_runs", None)
    assert isinstance(found, HowItRuns), "use_document_attention comes first"
    return found


def runs_packed(model: PreTrainedModel) -> bool:
    """Whether the model computes packed documents; if not, `rows` computes one document per row."""
    return how_it_runs(model).packed


def use_document_attention(model: PreTrainedModel, how: HowItRuns | None = None) -> None:
    """Have a model, in place, attend within documents, if it can; `how` is found by proof where it is not given."""
    if how is None:
        how = _found(model)
    how = replace(how, own_attention=model.config._attn_implementation)
    model.how_it_runs = how  # type: ignore[assignment]  # torch types attributes as modules and tensors
    if how.packed:
        model.set_attn_implementation(ATTENTION_NAME)
        choose_by_document(model)


def _found(model: PreTrainedModel) -> HowItRuns:
    if is_known(model.config):
        return PACKED
    if model.config.model_type in PROVABLE_TYPES:
        return prove(model)
    found = prove_told(model) if model.config.model_type in boundaries.TOLD_TYPES else None
    if found is not None and found.packed:
        return found
    has_state = getattr(model, "_is_stateful", False)
    reason = "they carry a state from token to token" if has_state else "no test shows that packed documents stay apart"
    if found is not None and model.device.type == "cuda":  # where something could be installed
        reason = f"{reason} ({found.reason})"
    return HowItRuns(packed=False, reason=reason)


@contextmanager
def transformers_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the model uses transformers' attention: for generation, and where there are no boundaries."""
    how = how_it_runs(model)
    if how.packed:
        assert how.own_attention is not None
        model.set_attn_implementation(how.own_attention)
    try:
        yield
    finally:
        if how.packed:
            model.set_attn_implementation(ATTENTION_NAME)


@torch.no_grad()
def prove(model: PreTrainedModel, told: str | None = None) -> HowItRuns:
    """Find out whether a model gives packed documents the states that each has alone.

    With `told`, the name under which its kernels get boundaries, also in training, and the gradients.
    """
    own, was_training = model.config._attn_implementation, model.training
    model.eval()
    try:
        needs = _asked_of_the_kernel(model, told)
        _compare(model, own) if told is None else _compare_told(model, own, told)
    except Exception as error:  # models of other people may do anything here
        reason = str(error) if isinstance(error, NotPacked) else f"packed documents end in {first_line(error)[:120]}"
        return HowItRuns(packed=False, reason=reason)
    finally:
        model.set_attn_implementation(own)
        model.train(was_training)
    return HowItRuns(packed=True, needs=needs)


def prove_told(model: PreTrainedModel) -> HowItRuns:
    """Find out whether the model's fast kernels, told where documents begin, keep them apart."""
    found = HowItRuns(packed=False)
    for name in boundaries.CUMULATIVE_LENGTHS:
        found = replace(prove(model, name), boundaries=name)
        if found.packed:
            break
    return found


def _probe_ids(model: PreTrainedModel, lengths: tuple[int, ...]) -> Tensor:
    num_ids = len(head_of(model).weight)
    return (torch.arange(sum(lengths), device=model.device) * 7919 + 1)[None] % num_ids


def probe_states(model: PreTrainedModel) -> Tensor:
    """The last hidden states of a proof's documents side by side, under `document_attention`."""
    ids = _probe_ids(model, PROOF_LENGTHS)
    states: Tensor = body_of(model)(input_ids=ids, **_packed_arguments(model, PROOF_LENGTHS)).last_hidden_state
    return states


def _packed_arguments(model: PreTrainedModel, lengths: tuple[int, ...], told: str | None = None) -> dict[str, Any]:
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])[None]
    segments = KERNELS[FALLBACK].of(lengths, sum(lengths), model.device)
    more = boundaries.told(np.array(lengths), told, model.device) if told else {}
    return {"position_ids": positions, "use_cache": False, "segments": segments, **more}


def _compare(model: PreTrainedModel, own: str) -> None:
    """Raise where a document beside another one has other states than alone under the model's own attention."""
    ids = _probe_ids(model, PROOF_LENGTHS)
    model.set_attn_implementation(own)
    alone = [
        body_of(model)(input_ids=piece, attention_mask=torch.ones_like(piece), use_cache=False).last_hidden_state
        for piece in ids.split(PROOF_LENGTHS, dim=1)
    ]
    _switch(model, ATTENTION_NAME)
    beside = probe_states(model)
    expected = torch.cat(alone, dim=1)
    if not float((beside - expected).abs().max()) <= SAME_STATES * float(expected.std()):
        raise NotPacked("documents side by side would see each other")


def _compare_told(model: PreTrainedModel, own: str, told: str) -> None:
    lengths = boundaries.PROOF_LENGTHS

    def ours() -> dict[str, Any]:
        _switch(model, ATTENTION_NAME)
        return _packed_arguments(model, lengths, told)

    boundaries.compare(model, _probe_ids(model, lengths), lambda: model.set_attn_implementation(own), ours)


def _switch(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise NotPacked("their attention cannot be replaced")


def _asked_of_the_kernel(model: PreTrainedModel, told: str | None) -> frozenset[str]:
    """What the layers pass to the attention function, or an error where that is not all that transformers would do."""
    record = _Record()
    AttentionInterface.register(_PROOF_NAME, record.attend)
    AttentionMaskInterface.register(_PROOF_NAME, record.mask)
    _switch(model, _PROOF_NAME)
    ids = _probe_ids(model, PROOF_LENGTHS)
    with boundaries.plain_torch(model):
        body_of(model)(input_ids=ids, **_packed_arguments(model, (ids.shape[1],)))
    if not record.num_calls and not told:
        raise NotPacked("their layers do not attend through transformers' interface")
    return frozenset(record.needs)


@dataclass
class _Record:
    """An attention function and a mask function that write down what transformers asks of them."""

    num_calls: int = 0
    needs: set[str] = field(default_factory=set)
    windows: dict[int, int | None] = field(default_factory=dict)  # by the address of a mask's memory
    masks: list[Tensor] = field(default_factory=list)  # kept, so that no address is given twice

    def mask(self, *, mask_function: Callable[..., Tensor], local_size: int | None = None, **asked: Any) -> Tensor:
        """A mask that stands for a window, which may be far longer than the mask."""
        _refuse_other_masks(mask_function, local_size)
        mask = torch.ones(asked["batch_size"], 1, asked["q_length"], asked["kv_length"], dtype=torch.bool)
        self.masks.append(mask)
        self.windows[mask.untyped_storage().data_ptr()] = local_size
        return mask

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **layer: Any
    ) -> tuple[Tensor, None]:
        """Attention as `document_attention` computes it, if it is told all that transformers' own would do."""
        address = attention_mask.untyped_storage().data_ptr() if isinstance(attention_mask, Tensor) else None
        if address not in self.windows:
            raise NotPacked("their masks are not those of transformers' interface")
        if self.windows[address] != layer.get("sliding_window"):
            raise NotPacked(
                f"a window of {self.windows[address]} tokens would reach the kernel as {layer.get('sliding_window')}"
            )
        unknown = [name for name, given in layer.items() if name not in _HARMLESS and given is not None]
        if unknown or layer.get("is_causal") is False:
            raise NotPacked(f"their layers ask for more than a window ({', '.join(unknown) or 'the future'})")
        if not isinstance(layer.get("segments"), Kernel):
            raise NotPacked("the documents' boundaries do not reach the layers")
        self.num_calls += 1
        self.needs |= {need for need, name in ((CAPPED, "softcap"), (SINKS, "s_aux")) if layer.get(name) is not None}
        return document_attention(module, query, key, value, None, **layer)


def _refuse_other_masks(mask_function: Callable[..., Tensor], window: int | None) -> None:
    """Refuse a mask that is no causal one with this window, also where that is beyond any text of a proof."""
    nothing = torch.zeros((), dtype=torch.long)
    reach = window or max(PROOF_LENGTHS)
    for query in {0, 1, reach - 1, reach, reach + 1, 3 * reach + 2}:
        keys = torch.arange(max(0, query - reach - 3), query + 4)
        keys = torch.cat([torch.arange(min(3, int(keys[0]))), keys])
        seen = mask_function(nothing, nothing, torch.tensor(query), keys)
        expected = keys <= query if window is None else (keys <= query) & (keys > query - window)
        if not torch.equal(torch.as_tensor(seen).expand(len(keys)), expected):
            raise NotPacked("a token would see others than those of a window")
