"""Models that read more than text (Gemma 3, Qwen 3.5, Mistral 3, LLaVA, ...): their decoder of text is trained alone.

transformers loads the whole model. Its decoder and its head, the same modules, become a causal model of text, which
must give the logits of the whole. The other parts stay as the files have them, and what is saved is the whole model.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
)

from cartilha.errors import UserError, first_line
from cartilha.machine.memory import is_out_of_memory
from cartilha.model.boundaries import plain_torch
from cartilha.model.head import body_of, find_head_shape, head_of
from cartilha.model_reference import PROCESSOR_FILES
from cartilha.storage import read_json, write_json

PROBE_TOKENS = 16
SAME_LOGITS = 1e-4  # of their spread
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them

_AUTO_CLASSES: tuple[tuple[Any, Any], ...] = (
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
)


def has_other_parts(config: PretrainedConfig) -> bool:
    """Whether models of this configuration have other parts beside a decoder of text."""
    return "text_config" in config.sub_configs and getattr(config, "text_config", None) is not None


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the decoder of text, which is `config` itself where there are no other parts.

    A UserError refuses models that have other parts, and a decoder that transformers cannot make alone.
    """
    if not has_other_parts(config):
        return config
    text: PretrainedConfig = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # transformers ties by the whole model's
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if type(text) not in MODEL_MAPPING:
            raise _no_text_alone(config, "their decoder of text cannot be made without them")
        AutoModelForCausalLM.register(type(text), _plain(type(text)), exist_ok=True)
    return text


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads a whole model of this configuration."""
    if has_other_parts(config):
        for mapping, loader in _AUTO_CLASSES:
            if type(config) in mapping:
                return loader
    return AutoModelForCausalLM


def count_other_parameters(config: PretrainedConfig) -> int:
    """Parameters of the parts that are not trained, 0 where there are none; nothing is allocated."""
    if not has_other_parts(config):
        return 0
    with torch.device("meta"):
        whole = auto_class(config).from_config(config)
        return int(whole.num_parameters()) - int(AutoModelForCausalLM.from_config(text_config(config)).num_parameters())


@dataclass(frozen=True)
class OtherParts:
    """The parts of a loaded model that are not trained, on the host, in the dtype that they are stored in."""

    whole: PreTrainedModel  # its decoder and its head are those that are trained
    place: str  # the directory that it was loaded from
    rest: dict[str, Tensor]  # what a file has of them, by the names in the whole
    names: dict[str, str]  # of the text's tensors: those in the whole to those in the causal model of text

    @classmethod
    def of(cls, whole: PreTrainedModel, model: PreTrainedModel, place: str) -> OtherParts:
        """The parts of `whole` that the causal model of text does not have."""
        own = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
        all_of_it = whole.state_dict(keep_vars=True)
        rest = {name: tensor for name, tensor in all_of_it.items() if id(tensor) not in own}
        return cls(whole, place, rest, {name: own[id(all_of_it[name])] for name in all_of_it.keys() - rest.keys()})

    def keep_as_stored(self) -> None:
        """Copy the other parts from their mapped files, in the files' dtype, which loses nothing.

        Where the files have several dtypes they stay float32, which loses nothing either.
        """
        found = set()
        for path in Path(self.place).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        dtypes = [STORED[name] for name in found if name in STORED]
        for tensor in self.rest.values():
            to_stored = tensor.is_floating_point() and len(dtypes) == 1
            tensor.data = tensor.data.to(dtypes[0] if to_stored else tensor.dtype, copy=True)

    def record(self) -> dict[str, Any]:
        """What they are called and how large they are."""
        weights = {name: rest for name, rest in self.rest.items() if isinstance(rest, torch.nn.Parameter)}
        names = dict.fromkeys(name.removeprefix("model.").partition(".")[0] for name in weights)
        return {
            "names": list(names),
            "num_parameters": sum(weight.numel() for weight in weights.values()),
            "bytes": sum(weight.nbytes for weight in weights.values()),
        }

    def save(self, directory: Path, model: PreTrainedModel) -> None:
        """Write the whole, with this model of text in it, and the files that say how images and sounds are read."""
        own = model.state_dict()
        trained = {name: own[of_text] for name, of_text in self.names.items()}
        self.whole.save_pretrained(directory, state_dict={**self.rest, **trained})
        for name in PROCESSOR_FILES:
            if (source := Path(self.place) / name).is_file():
                shutil.copyfile(source, directory / name)
        # transformers takes the dtype of the first weight, which may be that of another part.
        values, dtype = read_json(directory / "config.json"), str(model.dtype).removeprefix("torch.")
        values["text_config"]["dtype"] = values["dtype"] = dtype
        write_json(directory / "config.json", values)


def split(whole: PreTrainedModel, place: str) -> tuple[PreTrainedModel, OtherParts]:
    """The causal model of text in a whole model in float32, and the rest of it, which shares the text's modules.

    A UserError refuses a whole model that cannot read text alone, or whose logits no model of text gives.
    """
    config = text_config(whole.config)
    parts = (module for module in whole.modules() if isinstance(module, PreTrainedModel) and module is not whole)
    part = next((module for module in parts if type(module.config) is type(config)), None)
    if part is None:
        raise _no_text_alone(whole.config, "they have no decoder of text of their own")
    if whole.base_model is not whole:
        find_head_shape(whole)  # for a model of text that transformers does not have
    ids = _plain_ids(whole)
    expected = _logits(whole, ids)
    for model in _candidates(part, whole):
        found = _logits(model.eval(), ids)
        if float((found - expected).abs().max()) <= SAME_LOGITS * float(expected.std()):
            find_head_shape(model)  # which refuses a model whose text sees what comes after it (PaliGemma)
            return model, OtherParts.of(whole, model, place)
    raise _no_text_alone(whole.config, "their decoder of text gives other figures alone")


def resize(model: PreTrainedModel, parts: OtherParts | None, num_rows: int) -> None:
    """Give a model, and the whole that it is a part of, so many rows for tokens; new ones have no meaning yet."""
    holder = model if parts is None else parts.whole
    holder.resize_token_embeddings(num_rows, mean_resizing=False)
    if parts is not None:
        model.set_output_embeddings(holder.get_output_embeddings())
        model.config.vocab_size = num_rows


def _no_text_alone(config: PretrainedConfig, reason: str) -> UserError:
    return UserError(
        f"Models of the type {config.model_type} read more than text, and their text alone cannot be trained here, "
        f"since {reason}; choose a decoder of text such as opt, gpt2, llama or qwen3."
    )


def _candidates(part: PreTrainedModel, whole: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Causal models of text that share the whole's modules: transformers' own, then one with the whole's head."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(part.config)]
    if type(part) is kind:
        yield part
        return
    for one in (kind, _plain(type(part.config))):
        with torch.device("meta"):
            model = one(part.config)
        model.head_shape = head_of(whole).shape  # which transformers' own class need not ask for
        if type(body_of(model)) is not type(part):
            continue
        setattr(model, model.base_model_prefix, part)
        model.set_output_embeddings(whole.get_output_embeddings())
        if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            yield model


def _plain_ids(whole: PreTrainedModel) -> Tensor:
    """A few token ids that stand for text, and not for the place of an image or a sound."""
    marks = [value for name, value in whole.config.to_dict().items() if name.endswith(("_token_id", "_token_index"))]
    num_ids = len(head_of(whole).weight)
    spread = dict.fromkeys(7919 * place % num_ids for place in range(1, 10 * PROBE_TOKENS))
    return torch.tensor([[i for i in spread if i not in marks][:PROBE_TOKENS]], device=whole.device)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    try:
        with plain_torch(model):
            logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except Exception as error:  # models of other people may do anything here
        if is_out_of_memory(error):
            raise
        raise _no_text_alone(
            model.config, f"a few tokens of text end in an error ({first_line(error)[:120]})"
        ) from error
    return logits


def _plain(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """A causal model of text, for decoders that transformers has only as a part of others."""

    class TextDecoder(PreTrainedModel, GenerationMixin):
        base_model_prefix = "model"
        _can_set_experts_implementation_cached_value = True
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.model = AutoModel.from_config(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(
            self, input_ids: Tensor | None = None, logits_to_keep: int = 0, **settings: Any
        ) -> CausalLMOutputWithPast:
            output, shape = self.model(input_ids=input_ids, **settings), head_of(self).shape
            logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:] * shape.input_scale)
            return CausalLMOutputWithPast(logits=shape.finish(logits), past_key_values=output.get("past_key_values"))

    TextDecoder.config_class = config_class
    return TextDecoder
