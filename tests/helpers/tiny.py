"""A tiny random model of every architecture that Transformers knows, made from its configuration class alone."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.overrides import CANNOT, DEPTH, OVERRIDES, PARTS, SIZES, TOWERS, VOCABULARY
from tests.helpers.pictures import placeholder_ids, with_pictures

CAUSAL_LM_TYPES: list[str] = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

ENCODER_TYPES: list[str] = [
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert"),
    *("ibert", "layoutlm", "longformer", "mobilebert", "modernbert", "mpnet", "nystromformer", "roberta"),
    *("roformer", "xlm-roberta"),
    *("beit", "clip_vision_model", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dpt"),
    *("ijepa", "siglip_vision_model", "swin", "vit", "vit_mae", "vit_msn", "yolos"),
    *("audio-spectrogram-transformer", "hubert", "wav2vec2", "wavlm"),
]
SEQ2SEQ_TYPES: list[str] = [
    *("bart", "bigbird_pegasus", "blenderbot", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "mvp", "pegasus"),
    *("plbart", "prophetnet", "switch_transformers", "t5", "t5gemma", "umt5", "whisper"),
]
VISION_LANGUAGE_TYPES: list[str] = [
    *("aya_vision", "cohere2_vision", "fuyu", "gemma3", "gemma4", "glm4v", "got_ocr2", "idefics2", "idefics3"),
    *("internvl", "llama4", "llava", "llava_next", "mistral3", "mllama", "paligemma", "qwen2_5_vl"),
    *("qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava"),
]


class CannotBuild(Exception):
    """Why a model type cannot be built here, in one line."""


# --- configurations ---------------------------------------------------------------------------------------------------


# Fields of a configuration and of its parts, by their model types: {"qwen2": {"use_sliding_window": True}}.
Settings = dict[str, dict[str, Any]]


def tiny_config(model_type: str, settings: Settings | None = None) -> PreTrainedConfig:
    """The default configuration of a model type, shrunk, with these settings of it and of its parts."""
    if model_type in CANNOT:
        raise CannotBuild(CANNOT[model_type])
    return _shrink(CONFIG_MAPPING[model_type], {}, settings or {})


def _shrink(kind: type[PreTrainedConfig], ids: dict[int, int], settings: Settings) -> PreTrainedConfig:
    exceptions = copy.deepcopy(OVERRIDES.get(kind.model_type, {}) | settings.get(kind.model_type, {}))
    default = kind()
    kwargs: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = default.__dict__.get(field.name)
        if isinstance(value, PreTrainedConfig):
            kwargs[field.name] = exceptions.get(field.name) or _shrink(type(value), ids, settings)
        elif field.name in exceptions:
            kwargs[field.name] = exceptions[field.name]
        elif _is_token_id(field.name):
            kwargs[field.name] = _inside(value, ids)
        elif (size := _size(field, default)) is not None:
            kwargs[field.name] = size
    for name, part in TOWERS.get(kind.model_type, {}).items():
        kwargs[name] = _shrink(CONFIG_MAPPING[part], ids, settings)
    kwargs = exceptions | kwargs  # some exceptions are no fields: arguments from which the class derives others
    config = kind(**kwargs)
    if patterns := {k: v for k, v in _patterns(default, config).items() if k not in exceptions}:
        config = kind(**kwargs | patterns)
    _fit_rope(config)
    return config


def _fit_rope(config: PreTrainedConfig) -> None:
    """The sections of a rotary embedding for pictures, in their old proportions, made to fill the small head."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or not rope.get("mrope_section"):
        return
    head = config.__dict__.get("head_dim") or config.hidden_size // config.num_attention_heads
    pairs, old = int(head * rope.get("partial_rotary_factor", 1.0)) // 2, rope["mrope_section"]
    new = [pairs * size // sum(old) for size in old]
    config.rope_parameters = rope | {"mrope_section": [pairs - sum(new[1:]), *new[1:]]}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_id(name: str) -> bool:
    return name.endswith(("_token_id", "_token_ids", "_token_index", "_token_indices"))


def _inside(value: Any, ids: dict[int, int]) -> Any:
    """Special token ids moved into the vocabulary, from its end downward; the same id always to the same place."""
    if isinstance(value, list):
        return [_inside(item, ids) for item in value]
    if not _is_int(value) or value < VOCABULARY:
        return value
    return ids.setdefault(value, VOCABULARY - 1 - len(ids))


def _size(field: dataclasses.Field[Any], default: PreTrainedConfig) -> int | None:
    """The small value of a field that has a size in it, or None to leave the field to its class."""
    name, value = field.name, default.__dict__.get(field.name)
    if name == "head_dim" and value is None:  # some classes read it without a fallback
        return SIZES["head_dim"]
    if not _is_int(field.default):
        return None
    standard = next((k for k, own in default.attribute_map.items() if own == name and k in SIZES), name)
    if standard in ("num_key_value_heads", "num_kv_heads"):
        heads = default.__dict__.get("num_attention_heads")
        return 1 if value == 1 else SIZES["num_attention_heads"] if value == heads else SIZES[standard]
    if standard in ("n_group", "topk_group") and value == 1:
        return 1
    return SIZES.get(standard, SIZES.get(name))


def _patterns(default: PreTrainedConfig, config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The per-layer lists that the class does not derive for the new depth, or derives without one of the kinds."""
    depth = getattr(default, "num_hidden_layers", None)
    if not _is_int(depth) or depth <= DEPTH:
        return {}
    names = [field.name for field in dataclasses.fields(default)]
    lists = {name: value for name in names if _is_per_layer(value := default.__dict__.get(name), depth)}
    short = {name: config.__dict__[name] for name in lists}
    if all(len(short[name]) == DEPTH and _kinds(short[name]) >= _kinds(lists[name]) for name in lists):
        return {}
    keep = _representatives(list(zip(*[map(repr, values) for values in lists.values()], strict=True)))
    return {name: [values[i] for i in keep] for name, values in lists.items() if isinstance(values[0], str)}


def _kinds(values: list[Any]) -> int:
    return len(set(map(repr, values)))


def _is_per_layer(value: Any, depth: int) -> bool:
    return isinstance(value, list) and len(value) == depth and value != list(range(depth))


def _representatives(kinds: list[Any]) -> list[int]:
    """Indices of DEPTH layers that show the runs of a pattern in their order."""
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    keep = starts[:DEPTH]
    if missing := [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind not in {kinds[i] for i in keep}]:
        keep = sorted([*keep[: max(1, DEPTH - len(missing))], *missing][:DEPTH])
    rest = (i for i in range(len(kinds)) if i not in keep)
    while len(keep) < DEPTH:
        keep.append(next(rest))
    return sorted(keep)


# --- models -----------------------------------------------------------------------------------------------------------


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A causal language model in evaluation mode and float32, with weights in which every parameter matters."""
    return tiny_of(AutoModelForCausalLM, model_type, seed)


def tiny_base_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The same of a model without a head."""
    return tiny_of(AutoModel, model_type, seed)


def tiny_seq2seq_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The same of an encoder-decoder."""
    return tiny_of(AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM, model_type, seed)


def tiny_vision_language_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The same of a model that reads pictures and writes text."""
    return tiny_of(AutoModelForImageTextToText, model_type, seed)


def tiny_kind(kind: type[PreTrainedModel], model_type: str, **fields: Any) -> PreTrainedModel:
    """The same of a class itself, with these fields of its configuration."""
    torch.manual_seed(0)
    model = kind(tiny_config(model_type, {model_type: fields}))
    randomise(model, 0)
    return model.eval()


def tiny_of(auto: Any, model_type: str, seed: int, settings: Settings | None = None) -> PreTrainedModel:
    """The same by the auto class that knows it, with other settings than the default ones."""
    config = tiny_config(model_type, settings)
    if auto is AutoModelForCausalLM and getattr(config, "is_decoder", True) is False:
        config.is_decoder = True  # else BERT and its kin read both ways and keep no cache
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = _from_config(auto, config)
        except ImportError as missing:
            raise CannotBuild(f"needs a package: {' '.join(str(missing).split())[:120]}") from missing
    randomise(model, seed)
    if model.can_generate() and (written := placeholder_ids(config)):
        # Phi-4 would look for a picture where it writes such a token
        model.generation_config.suppress_tokens = written
    return model.eval()


def _from_config(auto: Any, config: PreTrainedConfig) -> PreTrainedModel:
    if config.model_type in PARTS:
        model = auto._model_mapping[type(config)]._from_config(getattr(config, PARTS[config.model_type]))
        model.generation_config.update(decoder_start_token_id=model.config.bos_token_id, num_return_sequences=1)
        return model
    return auto.from_config(config, dtype=torch.float32)


# Parameters with a meaning of their own, which noise may only move a little; and untrained ones that tell layers apart.
_DELICATE = ("A_log", "dt_", "time_", "lambda", "a_param", "recurrent_param", "decay", "scale", "gate_multiplier")
_UNTRAINED = ("correction_bias", "expert_bias", "layer_scalar")


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Noise on every trained parameter: matrices anew, vectors (norms, biases, gates) around where they start."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        own = name.rsplit(".", 1)[-1]
        if not tensor.is_floating_point() or not (tensor.requires_grad or own.endswith(_UNTRAINED)):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2 or not tensor.requires_grad or any(word in own for word in _DELICATE):
            tensor.add_(0.1 * noise)
        else:
            tensor.copy_(0.2 * noise)


# --- inputs -----------------------------------------------------------------------------------------------------------


BATCH, LENGTH = 2, 8


def tiny_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the forward pass needs for two texts of eight tokens, with pictures and sounds where it reads those too."""
    config, wanted = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if model.main_input_name == "pixel_values" and "input_ids" not in wanted:
        return {"pixel_values": noise(BATCH, config.num_channels, *_pair(config.image_size))}
    if "input_values" in wanted:
        spectral = hasattr(config, "num_mel_bins")
        return {"input_values": noise(BATCH, *((config.max_length, config.num_mel_bins) if spectral else (4000,)))}
    inputs: dict[str, Tensor] = {}
    if "input_features_mask" in wanted and "input_ids" not in wanted:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        return {"input_features": noise(BATCH, LENGTH, config.input_size), "input_features_mask": mask}
    if model.main_input_name == "input_features":
        inputs["input_features"] = noise(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        books = getattr(config, "num_codebooks", 1) if "musicgen" in config.model_type else 1
        inputs["input_ids"] = _usual_ids(config, BATCH * books, generator)
        if "attention_mask" in wanted:
            inputs["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
        inputs = with_pictures(model, inputs, noise)
    if config.is_encoder_decoder and "decoder_input_ids" in wanted:
        inputs["decoder_input_ids"] = _usual_ids(config, BATCH, generator)
    return inputs


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if _is_int(size) else (size[0], size[1])


def _usual_ids(config: PreTrainedConfig, rows: int, generator: torch.Generator) -> Tensor:
    """Token ids away from the special ones."""
    special = set(special_ids(config))
    usual = torch.tensor([i for i in range(8, config.get_text_config(decoder=True).vocab_size) if i not in special])
    return usual[torch.randint(len(usual), (rows, LENGTH), generator=generator)]


def special_ids(config: PreTrainedConfig) -> Iterator[int]:
    """Every special token id that a configuration or one of its parts names."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from special_ids(value)
        elif _is_token_id(name):
            yield from (item for item in (value if isinstance(value, list) else [value]) if _is_int(item))
