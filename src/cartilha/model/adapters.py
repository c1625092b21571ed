"""LoRA adapters (arXiv:2106.09685): small matrices beside frozen linear layers, by peft.

An adapter is trained in the model itself (`add_adapter`), and saved as peft saves it. When it is loaded, it is merged
into its base's weights, so that all that comes after deals with a plain model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cartilha.errors import UserError, first_line, import_extra
from cartilha.model.head import head_of
from cartilha.model_reference import ADAPTER_WEIGHTS, adapter_base, resolve_model
from cartilha.option_groups import AdapterOptions, BaseKind
from cartilha.storage import refuse_lfs_pointer

# The product of an adapter's matrices is multiplied by alpha / rank, so that one learning rate suits all ranks
# (arXiv:2106.09685, section 4.1). With alpha = 2 * rank, rank 64 learnt far less than rank 16 (docs/adapters.md).
ALPHA = 32.0
ACTIVE = "default"  # how peft calls the one adapter of a model
PREFIX = "base_model.model."  # of names in an adapter's file
BASE_WEIGHTS = "base_weights"  # in its metadata: the hash of the weights that it belongs to

# Of a weight, with the scale that 64 of them share, itself kept in 8 bits (arXiv:2305.14314).
BYTES_OF_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Adapter:
    """What is trained instead of a model's weights."""

    rank: int
    embeddings: bool = False  # token embeddings and head are trained, too, in full
    base: BaseKind = "float32"  # how the frozen weights of the linear layers are kept

    @classmethod
    def of(cls, config: AdapterOptions) -> Adapter | None:
        """The adapter that a command is asked for, if any."""
        return None if config.lora is None else cls(config.lora, config.lora_embeddings, config.lora_base)

    @property
    def in_half(self) -> bool:
        """Whether frozen weights are kept in fewer than 32 bits, which a step in float32 cannot multiply with."""
        return self.base != "float32"

    @property
    def traced(self) -> Adapter:
        """The adapter whose step is traced for a plan: products with 4 bits are computed in bfloat16."""
        return replace(self, base="bfloat16") if self.base == "4bit" else self


def _peft() -> Any:
    return import_extra("peft", "A LoRA adapter", "adapters")


def add_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Freeze a model in place and put adapters on all linear layers but the head; they begin as zero.

    `trained_parameters` then has those of the adapters, and those of the embeddings if they are trained. The frozen
    layers compute in the dtype of the forward pass, so a base in half precision needs autocast.
    """
    peft = _peft()
    model.requires_grad_(False)
    settings = peft.LoraConfig(r=adapter.rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings(action="ignore"):  # it corrects its own settings for the layers of GPT-2
            peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise UserError(
            f"Models of the type {model.config.model_type} take no LoRA adapter ({first_line(error)}); train without "
            "--lora."
        ) from error
    for layer in _adapted_layers(model):
        _keep_as(layer, adapter.base)
    kept = {id(layer.base_layer.weight) for layer in _adapted_layers(model)}
    for parameter in model.parameters():  # where the base was read in half precision
        parameter.data = parameter.data if id(parameter) in kept else parameter.data.float()
    if adapter.embeddings:
        head = head_of(model)
        for weight in (model.get_input_embeddings().weight, head.weight, head.bias):
            if weight is not None:
                weight.requires_grad_(True)
    names = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    # torch types attributes as modules and tensors
    model.trained_names, model.own_adapter = names, adapter  # type: ignore[assignment]


def _adapted_layers(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


def _keep_as(layer: Any, base: BaseKind) -> None:
    """Keep a layer's frozen weight in another type; the adapter's matrices stay float32."""
    weight = layer.base_layer.weight
    if base == "bfloat16":
        weight.data = weight.data.bfloat16()
    elif base == "4bit":
        bits = import_extra("bitsandbytes", "A base of 4 bits", "quantization")
        old = layer.base_layer
        if not isinstance(old, torch.nn.Linear):
            raise UserError("This model's linear layers cannot be kept in 4 bits; use --lora_base bfloat16.")
        options = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": True}
        new = bits.nn.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, **options)
        options.pop("compute_dtype")
        new.weight = bits.nn.Params4bit(weight.data.bfloat16(), requires_grad=False, **options)
        new.bias = old.bias
        layer.base_layer = new.to(weight.device)


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name, tied ones once: all of them, unless the model has an adapter."""
    names: Any = getattr(model, "trained_names", None)
    return {name: value for name, value in model.named_parameters() if names is None or name in names}


def adapter_of(model: torch.nn.Module) -> Adapter | None:
    """The adapter that `add_adapter` has put on this model."""
    found: Adapter | None = getattr(model, "own_adapter", None)
    return found


def frozen_size(model: PreTrainedModel) -> tuple[int, int]:
    """How many weights are frozen below an adapter, and the bytes that they take."""
    adapter, trained = adapter_of(model), trained_parameters(model)
    linear = {id(layer.base_layer.weight): layer for layer in _adapted_layers(model)}
    number, size = 0, 0.0
    for name, weight in model.named_parameters():
        if name not in trained:
            layer = linear.get(id(weight))
            count = layer.in_features * layer.out_features if layer else weight.numel()
            in_4_bits = layer is not None and adapter is not None and adapter.base == "4bit"
            number, size = number + count, size + count * (BYTES_OF_4_BITS if in_4_bits else weight.element_size())
    return number, round(size)


def save_adapter(model: PreTrainedModel, base: str, base_hash: str, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapter of a model as peft reads it; `base` is the MODEL that it was added to."""
    source = resolve_model(base)
    settings: Any = model.peft_config[ACTIVE]
    settings.inference_mode = True
    settings.base_model_name_or_path = base
    if source.kind == "hub":
        settings.base_model_name_or_path, settings.revision = source.name, source.revision
    elif source.path is not None and not base.startswith("package:"):
        settings.base_model_name_or_path = str(source.path.resolve())
    settings.save_pretrained(folder)
    tensors = {
        PREFIX + name.replace(f".{ACTIVE}.", "."): value.detach().to("cpu", dtype).contiguous()
        for name, value in trained_parameters(model).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt", BASE_WEIGHTS: base_hash})


def merge_adapter(model: PreTrainedModel, folder: Path, reference: str, base_hash: str) -> PreTrainedModel:
    """The plain model in which an adapter's products are added to the weights of its base (float32).

    A UserError says that the adapter is damaged, or that it belongs to another model.
    """
    peft, path = _peft(), folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{reference} has an adapter_config.json and no {ADAPTER_WEIGHTS}; fetch the adapter again.")
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get(BASE_WEIGHTS, base_hash)
        if recorded != base_hash:
            raise ValueError("its base had other weights")
        settings = peft.PeftConfig.from_pretrained(folder)
        settings.inference_mode = True
        with warnings.catch_warnings(action="ignore"):  # what they are about is checked here
            adapted = peft.get_peft_model(model, settings)
            report = peft.set_peft_model_state_dict(adapted, load_file(path))
            lacking = [name for name in report.missing_keys if "lora_" in name]
            for name in [*lacking, *report.unexpected_keys]:
                raise ValueError(f"{name} is {'missing' if name in lacking else 'unknown'}")
            plain: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise UserError(
            f"The adapter {reference} does not belong to {adapter_base(folder)} "
            f"({first_line(error)[:200]}); name its own base in adapter_config.json (base_model_name_or_path)."
        ) from error
    return plain
