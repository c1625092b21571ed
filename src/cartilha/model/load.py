"""Loading a causal model from the hub, a directory, a GGUF file or nothing: float32 master weights, always asked for.

transformers 5 would load `facebook/opt-125m` in fp16, as its file has it; training that loses small updates.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from cartilha.errors import HubUnreachableError, UserError, first_line, missing_extra
from cartilha.machine.cpu import keep_freed_memory, settle_cpu_functions
from cartilha.machine.devices import seed_everything
from cartilha.model.attention import knows_attention, use_document_attention
from cartilha.model.head import Head, HeadError, HeadShape, head_of
from cartilha.model.rows import prove_rows
from cartilha.model_reference import (
    RANDOM_MODELS,
    ModelSource,
    conversion_directory,
    resolve_model,
    unreachable_message,
)
from cartilha.storage import new_directory, refuse_lfs_pointer
from cartilha.tokens.tokenizer import TextTokenizer

log = logging.getLogger("cartilha")


NO_CAUSAL_MODEL = "cannot be loaded as a causal language model"
UNREADABLE = (ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError, EOFError)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for packed documents.

    Attributes:
        model: Float32 weights, attention within documents, evaluation mode (no dropout).
        ref: The MODEL argument that it came from.
        context_length: Most positions that the model takes.
        num_parameters: Tied weights counted once.
    """

    model: PreTrainedModel
    ref: str
    context_length: int
    num_parameters: int


def load_model(ref: str, device: torch.device, *, tokenizer: TextTokenizer | None = None, seed: int = 0) -> LoadedModel:
    """Load a MODEL argument with float32 weights.

    Args:
        ref: Hub id, directory, GGUF file, `package:NAME` or `random:ARCH`.
        device: Where the model is put.
        tokenizer: Its ids must fit the model's rows; `random:` models take their special ids from it.
        seed: Of fresh weights.

    Raises:
        UserError: No such model, damaged files, an unsupported architecture, or a tokenizer with ids beyond the rows.
        HubUnreachableError: A hub model cannot be had.
    """
    source = resolve_model(ref)
    is_random = source.kind == "random"
    model = _random_model(source, tokenizer, seed) if is_random else _from_pretrained(ref, _place(source))
    return prepare_model(model, ref, device, tokenizer)


def prepare_model(
    model: PreTrainedModel, ref: str, device: torch.device, tokenizer: TextTokenizer | None = None
) -> LoadedModel:
    """Check a model and switch it to attention within documents; see `load_model` for what is refused."""
    transformers_logging.disable_progress_bar()  # of loading and saving; ours are in the console
    settle_cpu_functions()  # beside a GPU, too: texts' statistics and new rows are computed on the CPU
    use_document_attention(model)
    num_rows = len(_head_of(model, ref).weight)
    if tokenizer is not None and tokenizer.num_ids > num_rows:
        if tokenizer.num_reachable_ids > num_rows:
            raise UserError(
                f"The tokenizer has {tokenizer.num_ids} ids but {ref} has only {num_rows} rows: they do not belong "
                "together; prepare the store with this model's own tokenizer."
            )
        log.warning(
            "The tokenizer has %d ids and %s %d rows: the special tokens beyond them (%s) have none, which does no "
            "harm, since no text holds them.",
            *(tokenizer.num_ids, ref, num_rows),
            ", ".join(str(tokenizer.backend.id_to_token(i)) for i in range(num_rows, tokenizer.num_ids)),
        )
    if device.type == "cpu":
        keep_freed_memory()
    torch.nn.Module.to(model, device)  # transformers' own is wrapped in a way that type checkers misread
    model.eval()
    if not knows_attention(model.config):
        prove_rows(model)
        log.warning(
            "The attention of models of the type %s is not known here: each document is computed in a row of its own, "
            "which is slower than packed rows; the figures are the same.",
            model.config.model_type,
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return LoadedModel(model, ref, context_length(model.config), num_parameters)


def _head_of(model: PreTrainedModel, ref: str) -> Head:
    try:
        return head_of(model)
    except HeadError as error:
        raise UserError(f"Models like {ref} are not supported, since {error}; choose another model.") from error


NO_LIMIT = 1 << 20  # positions of models that count distances instead; windows of an evaluation stay 2,048 by default
PROBE_IDS = 1024  # rows that a model is given to be looked at without its weights


def configured_head_shape(config: PretrainedConfig, ref: str) -> HeadShape:
    """The shape of the head, as far as one layer of the model with fresh weights and few token ids tells.

    Raises:
        UserError: `load_model` would refuse a model of this configuration; in its words.
    """
    if knows_attention(config):
        return HeadShape()
    try:
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(_reduced(config), dtype=torch.float32)
        use_document_attention(model)
        _head_of(model, ref)
        return prove_rows(model.eval())
    except UserError:
        raise
    except Exception as error:  # it may not be made smaller in this way
        log.info("Whether %s can be trained is seen when it is loaded (%s).", ref, first_line(error)[:200])
        return HeadShape()


def _reduced(config: PretrainedConfig) -> PretrainedConfig:
    """The same model with one layer and few ids; lists with an entry a layer are cut, too."""
    settings = config.to_dict()
    names = [name for name in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(settings.get(name), int)]
    num_layers = settings[names[0]] if names else -1
    num_ids = min(settings["vocab_size"], PROBE_IDS)
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == num_layers:
            settings[name] = value[:1]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= num_ids:
            settings[name] = None
    return AutoConfig.for_model(**{**settings, **dict.fromkeys(names, 1), "vocab_size": num_ids})


def context_length(config: PretrainedConfig) -> int:
    """Most positions that a model of this configuration takes; `NO_LIMIT` where it does not say (BLOOM, with ALiBi)."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return NO_LIMIT


def weights_hash(model: PreTrainedModel) -> str:
    """A hash of all weights, by name and shape: says whether two models begin alike."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _from_pretrained(ref: str, path: str) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    _configuration(ref, path)
    for weights in sorted(Path(path).glob("model*.safetensors*")) or sorted(Path(path).glob("pytorch_model*.bin*")):
        refuse_lfs_pointer(weights)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what its report of weights says is said below
    try:
        # Code that comes with a model is never run, and transformers must not ask in the middle of a command.
        result: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except OSError as error:
        if Path(path).is_dir():
            raise UserError(f"{ref} holds no model that can be loaded ({first_line(error)[:200]}).") from error
        raise HubUnreachableError(unreachable_message(ref)) from error
    except UNREADABLE as error:
        raise UserError(f"{ref} {NO_CAUSAL_MODEL} ({_reason(error)}).") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, report = result
    assert isinstance(model, PreTrainedModel)
    if getattr(model.config, "auto_map", None):
        log.warning("%s comes with code of its own, which is not run: %s reads it.", ref, type(model).__name__)
    missing, unused = (sorted(report[name]) for name in ("missing_keys", "unexpected_keys"))
    names = ", ".join((missing or unused)[:3]) + (", ..." if len(missing or unused) > 3 else "")
    if missing:  # transformers would give them random values and go on
        raise UserError(f"{ref} lacks {len(missing)} of its model's weights ({names}); fetch its files again.")
    if unused:
        log.warning("%s has weights that %s does not use: %s.", ref, type(model).__name__, names)
    _take_into_memory(model)
    return model


@torch.no_grad()
def _take_into_memory(model: PreTrainedModel) -> None:
    """Copy the weights out of the file that they are mapped from.

    Whoever writes into that file would change the model, and a drive that goes away, or a shorter file, end the process
    (SIGBUS) at the next weight that is looked at.
    """
    for tensor in {*model.parameters(), *model.buffers()}:
        tensor.data = tensor.data.clone()


def _reason(error: Exception) -> str:
    """Transformers' reason; of a model with code of its own it says how to run that, which is not done here."""
    if "custom code" in str(error):
        return "it needs code that comes with it, which is never run: choose a model of a type that transformers knows"
    return first_line(error)[:200]


def model_config(ref: str, tokenizer: TextTokenizer | None = None) -> PretrainedConfig:
    """The configuration of a MODEL argument, without its weights.

    Raises:
        UserError: No such model, or one that cannot be read.
        HubUnreachableError: A hub model cannot be had.
    """
    source = resolve_model(ref)
    return _random_config(source, tokenizer) if source.kind == "random" else _configuration(ref, _place(source))


def _place(source: ModelSource) -> str:
    """What transformers loads a model from: a directory or a hub id."""
    return str(_converted_gguf(source) if source.kind == "gguf" else source.path or source.name)


def _configuration(ref: str, place: str) -> PretrainedConfig:
    """The configuration; one of quantised weights is refused, for they do not train."""
    refuse_lfs_pointer(Path(place) / "config.json")
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not Path(place).is_dir() and isinstance(error, OSError):
            raise HubUnreachableError(unreachable_message(ref)) from error
        what = "holds no model that can be loaded" if isinstance(error, OSError) else NO_CAUSAL_MODEL
        raise UserError(f"{ref} {what} ({_reason(error)}).") from error
    assert isinstance(config, PretrainedConfig)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else vars(quantization)
        raise UserError(
            f"The weights of {ref} are quantised (quant_method {settings.get('quant_method')}), and such weights are "
            "neither trained nor scored here; use the model that they were made from."
        )
    return config


def _random_model(source: ModelSource, tokenizer: TextTokenizer | None, seed: int) -> PreTrainedModel:
    """Fresh weights in a known shape; embedding rows and special ids follow the tokenizer."""
    config = _random_config(source, tokenizer)
    seed_everything(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


def _random_config(source: ModelSource, tokenizer: TextTokenizer | None) -> PretrainedConfig:
    makers = dict(zip(RANDOM_MODELS, (_tiny_llama, _tiny_opt, _opt_125m, _smollm2_135m), strict=True))
    config: PretrainedConfig = makers[source.name]()
    if tokenizer is not None:
        config.bos_token_id, config.eos_token_id = tokenizer.prefix_id, tokenizer.end_id
        config.pad_token_id = tokenizer.pad_id
        if not source.name.startswith("tiny"):
            # OPT keeps seven spare rows above its tokenizer; other vocabularies are rounded up to full tiles of eight.
            rows = -(-tokenizer.num_ids // 8) * 8
            config.vocab_size = max(rows, config.vocab_size) if config.vocab_size - rows < 64 else rows
    elif source.name.startswith("tiny"):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 256, 257, 258
    return config


def _tiny_llama() -> Any:
    return LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def _tiny_opt() -> Any:
    return OPTConfig(
        vocab_size=259,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )


def _opt_125m() -> Any:
    return OPTConfig(vocab_size=50272, pad_token_id=1, bos_token_id=2, eos_token_id=2)


def _smollm2_135m() -> Any:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )


def _converted_gguf(source: ModelSource) -> Path:
    """A directory with the GGUF's weights in plain float32, made once and kept in the user's cache."""
    assert source.path is not None
    directory = conversion_directory(source.path) / "model"
    if not (directory / "config.json").is_file():
        log.warning(
            "Converting %s to float32 weights, once; they are kept in the cache (%s).", source.path.name, directory
        )
        model = convert_gguf(source.path)
        try:
            with new_directory(directory) as temporary:
                model.save_pretrained(temporary)
        except OSError as error:
            raise UserError(
                f"The float32 weights of {source.ref} cannot be written to {directory} ({error}); "
                "free some space there or name another place in the environment variable CARTILHA_CACHE."
            ) from error
    return directory


def convert_gguf(path: Path) -> PreTrainedModel:
    """The model in a GGUF file as a plain float32 model.

    `save_pretrained` refuses a model that carries GGUF's quantisation settings, so the weights are copied into a fresh
    model of the same shape. Special ids become those of our tokenizer: `<|endoftext|>` where a chat model names marks.

    Raises:
        UserError: The `demo` extra is missing, or the file or its architecture cannot be read.
    """
    from cartilha.tokens.tokenizer import gguf_tokenizer

    tokenizer = gguf_tokenizer(path)
    transformers_logging.disable_progress_bar()
    try:
        quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ImportError, ValueError, KeyError, OSError) as error:
        if "accelerate" in str(error):
            raise missing_extra("Reading GGUF models", "demo") from error
        raise UserError(f"{path} cannot be loaded as a causal language model ({first_line(error)[:200]}).") from error
    settings = quantized.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "unk_token_id"):
        settings.pop(name, None)
    config = AutoConfig.for_model(**settings)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    assert isinstance(model, PreTrainedModel)
    return model
