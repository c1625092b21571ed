"""Loading a causal model from the hub, a directory or a GGUF file, or making one with fresh weights.

Weights are float32 unless bfloat16 is asked for: transformers 5 would take the dtype of the file, and training in fp16
loses small updates.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cartilha.errors import UserError, first_line, log
from cartilha.machine.cpu import keep_freed_memory, settle_cpu_functions
from cartilha.machine.devices import seed_everything
from cartilha.model.adapters import Adapter, add_adapter, merge_adapter, save_adapter
from cartilha.model.boundaries import plain_torch
from cartilha.model.configuration import context_length, place_of, whole_config, with_layers
from cartilha.model.head import HeadShape, find_head_shape, head_of
from cartilha.model.longer_context import LongerContext
from cartilha.model.packed_or_rows import PACKED, HowItRuns, how_it_runs, is_known, use_document_attention
from cartilha.model.parts import OtherParts, auto_class, has_other_parts, split, text_config
from cartilha.model.recomputation import layers_of
from cartilha.model.router import find_router_loss, router_loss_of
from cartilha.model.rows import refuse_what_cannot_run
from cartilha.model.shards import is_stored_in_bfloat16, read_model
from cartilha.model_reference import adapter_base, resolve_model, unreadable
from cartilha.storage import refuse_lfs_pointer
from cartilha.tokens.tokenizer import TextTokenizer

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for packed documents."""

    model: PreTrainedModel  # float32 (or bfloat16) weights, attention within documents, evaluation mode (no dropout)
    reference: str  # the MODEL argument that it came from
    context_length: int  # most positions that the model takes
    num_parameters: int  # tied weights counted once
    commit: str | None = None  # of a hub model: the one that was read
    base_hash: str | None = None  # of the weights that an adapter leaves as they are
    other_parts: OtherParts | None = None  # of a model that reads more than text

    @property
    def others(self) -> dict[str, Any] | None:
        """What the parts that are not trained are called, their number of parameters and of bytes."""
        return self.other_parts.record() if self.other_parts else None

    def save(self, directory: Path) -> None:
        """Write the model as transformers loads it, with its other parts."""
        if self.other_parts is None:
            self.model.save_pretrained(directory)
        else:
            self.other_parts.save(directory, self.model)


def load_model(
    reference: str,
    device: torch.device,
    *,
    tokenizer: TextTokenizer | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    context: LongerContext | None = None,
) -> LoadedModel:
    """Load a MODEL argument with weights in `dtype` and perhaps a longer context; `seed` is for fresh weights.

    The tokenizer's ids must fit the model's rows, and `random:` models take their special ids from it. A UserError says
    that there is no such model, or what is wrong with its files, its architecture or its tokenizer.
    """
    transformers_logging.disable_progress_bar()  # for loading and saving; the console has our own
    model, parts, commit = _weights_of(reference, tokenizer, seed, dtype, context)
    return replace(prepare_model(model, reference, device, tokenizer), commit=commit, other_parts=parts)


def _weights_of(
    reference: str, tokenizer: TextTokenizer | None, seed: int, dtype: torch.dtype, context: LongerContext | None
) -> tuple[PreTrainedModel, OtherParts | None, str | None]:
    """The model of text, an adapter merged into its base; the parts beside it; and the commit of a hub model."""
    source, config = resolve_model(reference), whole_config(reference, tokenizer)
    if context is not None and not has_other_parts(config):
        config = context.applied(config, reference)
    elif context is not None:
        config.text_config = context.applied(text_config(config), reference)
    if source.kind == "random":
        seed_everything(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype), None, None
    place, parts = place_of(source), None
    commit = Path(place).name if source.kind == "hub" else None
    if (base := adapter_base(Path(place))) is not None:
        model, parts, _ = _weights_of(base, tokenizer, seed, torch.float32, context)
        merged = merge_adapter(model, Path(place), reference, weights_hash(model))
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(dtype)
        return merged, parts, commit
    model = _from_pretrained(reference, place, config, torch.float32 if has_other_parts(config) else dtype)
    if source.kind == "hub":
        model.config.name_or_path = source.name  # a saved model names it, and not a directory of this machine
    if has_other_parts(config):
        model, parts = split(model, place)
        parts.keep_as_stored()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        rest = parts.record()
        log.info(
            "%s reads more than text: its part for text is used alone, and the others (%s; %.1f M parameters) stay as "
            "they are.",
            *(reference, ", ".join(rest["names"]), rest["num_parameters"] / 1e6),
        )
    return model, parts, commit


def load_with_adapter(
    reference: str,
    device: torch.device,
    adapter: Adapter,
    *,
    tokenizer: TextTokenizer | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a model (see `load_model`) and freeze it below a new adapter, whose first weights follow from the seed.

    A base that is kept in fewer bits is made so in the host's memory. If its files have bfloat16, no float32 copy of it
    is made.
    """
    place, dtype = device, torch.float32
    if adapter.in_half:
        place = torch.device("cpu")
        source = resolve_model(reference)
        if source.kind in ("hub", "directory") and is_stored_in_bfloat16(Path(place_of(source))):
            dtype = torch.bfloat16
    loaded = load_model(reference, place, tokenizer=tokenizer, seed=seed, dtype=dtype)
    loaded = with_adapter(loaded, adapter, seed)
    torch.nn.Module.to(loaded.model, device)  # transformers' own is wrapped in a way that type checkers misread
    return loaded


def with_adapter(loaded: LoadedModel, adapter: Adapter, seed: int) -> LoadedModel:
    """The model, frozen in place, with a new adapter whose first weights follow from the seed."""
    base_hash = weights_hash(loaded.model, torch.float32)
    seed_everything(seed)
    add_adapter(loaded.model, adapter)
    number = loaded.num_parameters + sum(p.numel() for name, p in loaded.model.named_parameters() if ".lora_" in name)
    return replace(loaded, num_parameters=number, base_hash=base_hash)


def prepare_model(
    model: PreTrainedModel, reference: str, device: torch.device, tokenizer: TextTokenizer | None = None
) -> LoadedModel:
    """Check a model and switch it to attention within documents; see `load_model` for what is refused."""
    settle_cpu_functions()  # for GPUs, too: statistics of texts and new rows are computed on the CPU
    if not is_known(model.config):
        refuse_what_cannot_run(model)
    num_rows = len(head_of(model).weight)
    if tokenizer is not None and tokenizer.num_ids > num_rows:
        if tokenizer.num_reachable_ids > num_rows:
            raise UserError(
                f"The tokenizer has {tokenizer.num_ids} ids but {reference} has only {num_rows} rows: they do not "
                "belong together; prepare the store with this model's own tokenizer."
            )
        log.warning(
            "The tokenizer has %d ids and %s %d rows: the special tokens beyond them (%s) have none, which does no "
            "harm, since no text holds them.",
            *(tokenizer.num_ids, reference, num_rows),
            ", ".join(str(tokenizer.backend.id_to_token(i)) for i in range(num_rows, tokenizer.num_ids)),
        )
    if device.type == "cpu":
        keep_freed_memory()
    torch.nn.Module.to(model, device)  # transformers' own is wrapped in a way that type checkers misread
    model.eval()
    _settle(model)
    if reason := how_it_runs(model).reason:
        log.warning(
            "Models of the type %s run with one document per row, since %s: this is slower than packed rows, and the "
            "figures are the same.",
            *(model.config.model_type, reason),
        )
    if how_it_runs(model).boundaries:
        log.info("Documents are packed side by side: the kernels of the model's state were shown to keep them apart.")
    if loss := router_loss_of(model):
        log.info("Training adds the routers' own loss, times %g, as the configuration asks for it.", loss.factor)
    return LoadedModel(model, reference, context_length(model.config), model.num_parameters())


def _settle(model: PreTrainedModel) -> None:
    """Find out how the model's head and its attention are computed."""
    if model.dtype != torch.float32:  # whose rounding would hide it
        found = look_at(model.config, model.config.model_type)
        model.head_shape = found.head_shape  # type: ignore[assignment]  # torch types attributes as modules and tensors
        find_router_loss(model)
        use_document_attention(model, found.how)
        return
    if not is_known(model.config):
        with plain_torch(model):
            find_head_shape(model)
            find_router_loss(model)
    use_document_attention(model)


PROBE_IDS = 1024  # rows of a model that is looked at without its weights
PROBE_WIDTH = 32  # of its feed-forward layers and of each of its experts, of which there may be hundreds
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size")
MAX_PROBE_LAYERS = 8


@dataclass(frozen=True)
class Configured:
    """What a model is found to do by a look at a few of its layers, with fresh weights and few token ids."""

    head_shape: HeadShape
    how: HowItRuns
    has_bias: bool = False  # in the head
    recomputes: bool = True  # whether layers can be computed a second time instead of kept

    @property
    def line(self) -> str:
        """How the model runs, in a line."""
        packed = "documents packed side by side"
        parts = [packed if self.how.packed else f"one document per row, since {self.how.reason}", *self.how.needs]
        head = ["a bias"] * self.has_bias
        head += ["a scale"] * ((self.head_shape.input_scale, self.head_shape.scale) != (1.0, 1.0))
        head += [] if self.head_shape.cap is None else [f"a soft cap of {self.head_shape.cap:g}"]
        parts.append(f"a head with {' and '.join(head)}" if head else "a plain head")
        return "; ".join([*parts, f"--gradient_checkpointing is {'' if self.recomputes else 'not '}possible"])


def look_at(config: PretrainedConfig, reference: str) -> Configured:
    """What `load_model` would find, as far as the configuration shows it; refuses what that would refuse."""
    if is_known(config):
        return Configured(HeadShape(), PACKED)
    return _look_at(json.dumps(copy.deepcopy(config).to_dict(), sort_keys=True, default=str), reference)


@functools.lru_cache(maxsize=256)
def _look_at(config_json: str, reference: str) -> Configured:
    settings = json.loads(config_json)
    try:
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(_reduced(settings), dtype=torch.float32).eval()
        refuse_what_cannot_run(model)
        _settle(model)
        head = head_of(model)
        return Configured(head.shape, how_it_runs(model), head.bias is not None, bool(layers_of(model)))
    except UserError:
        raise
    except Exception as error:  # some models cannot be made smaller in this way
        log.info("Whether %s can be trained is seen when it is loaded (%s).", reference, first_line(error)[:200])
        return Configured(HeadShape(), HowItRuns(packed=False, reason="a smaller model of their kind cannot be made"))


def _reduced(settings: dict[str, Any]) -> PretrainedConfig:
    """The first layers, one of each kind that there is, with narrow feed-forward layers, and the first token ids."""
    kinds = settings.get("layer_types") or [None]
    num_layers = 1 + max(kinds.index(kind) for kind in set(kinds))
    settings = with_layers(settings, min(num_layers, MAX_PROBE_LAYERS))
    widths = {name: settings[name] for name in WIDTHS if isinstance(settings.get(name), int)}
    settings |= {name: min(width, PROBE_WIDTH) for name, width in widths.items()}
    if "output_router_logits" in settings:  # the first layers may have no experts
        settings["output_router_logits"] = False
    num_ids = min(settings["vocab_size"], PROBE_IDS)
    for name, value in settings.items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= num_ids:
            settings[name] = None
    return AutoConfig.for_model(**{**settings, "vocab_size": num_ids})


def save_model(loaded: LoadedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a trained model, or its adapter alone, as transformers and peft read it.

    The model is converted in place, so that nothing can be computed with it afterwards.
    """
    if loaded.base_hash is not None:
        save_adapter(loaded.model, loaded.reference, loaded.base_hash, folder, dtype)
        return
    torch.nn.Module.to(loaded.model, dtype)
    loaded.save(folder)


def weights_hash(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """A hash of all weights with their names and shapes, to see whether two runs begin with the same model.

    It is that of the weights as they are, or as they would be in another `dtype`.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        weights = parameter.detach().to("cpu", dtype)
        digest.update(f"{name} {list(weights.shape)} {weights.dtype}".encode())
        digest.update(weights.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _from_pretrained(reference: str, path: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    for weights in sorted(Path(path).glob("model*.safetensors*")) or sorted(Path(path).glob("pytorch_model*.bin*")):
        refuse_lfs_pointer(weights)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of weights is logged below
    try:
        # A model's own code is never run, and transformers must not ask for consent in the middle of a command.
        result: Any = None if has_other_parts(config) else read_model(Path(path), config, dtype)
        is_mapped = result is None
        if result is None:
            result = auto_class(config).from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except UNREADABLE as error:
        raise unreadable(reference, path, error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model: PreTrainedModel
    model, report = result
    if getattr(model.config, "auto_map", None):
        log.warning("%s comes with code of its own, which is not run: %s reads it.", reference, type(model).__name__)
    missing, unused = (sorted(report[name]) for name in ("missing_keys", "unexpected_keys"))
    names = ", ".join((missing or unused)[:3]) + (", ..." if len(missing or unused) > 3 else "")
    if missing:  # transformers would continue with random values
        raise UserError(f"{reference} lacks {len(missing)} of its model's weights ({names}); fetch its files again.")
    if unused:
        log.warning("%s has weights that %s does not use: %s.", reference, type(model).__name__, names)
    # Of weights that are mapped from their file, a change of that file would change the model, and a drive that goes
    # away or a file that becomes shorter would end the process with SIGBUS.
    for tensor in {*model.parameters(), *model.buffers()} if is_mapped else ():
        tensor.data = tensor.data.clone()
    return model
