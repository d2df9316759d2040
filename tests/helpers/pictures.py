"""Pictures and sounds for the tiny models that read them, so that their towers run too, and what texts do with them.

Every kind of model wants its pictures in another form. Which form, the arguments of its own methods say; how many
tokens of the text stand for a picture, its tower says when it is run.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Inputs = dict[str, Tensor]
Noise = Callable[..., Tensor]


def with_pictures(model: PreTrainedModel, inputs: Inputs, noise: Noise) -> Inputs:
    """`inputs` with a picture, or a sound, or both, in each text; as they were for a model that reads text alone."""
    arguments = _arguments(model)
    rows = len(inputs["input_ids"])
    for argument, form in FORMS.items():
        if argument in arguments:
            pictures, tokens = form(model, rows, noise)
            return _inserted(model, inputs, tokens) | pictures if pictures else inputs
    return inputs


def placeholder_ids(config: PreTrainedConfig) -> list[int]:
    """The tokens that stand for pictures and sounds, named by a configuration or by its parts."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    named = (getattr(part, f"{kind}_token_id", None) for part in parts for kind in ("image", "video", "audio"))
    return sorted({token for token in named if isinstance(token, int)})


def _arguments(model: PreTrainedModel) -> set[str]:
    """The arguments of the methods that run a tower alone; of the forward pass where there are none."""
    readers = list(filter(None, (_tower(model, "image"), _tower(model, "audio")))) or [model.forward]
    return {name for reader in readers for name in inspect.signature(reader).parameters}


def _tower(model: PreTrainedModel, kind: str) -> Callable[..., Any] | None:
    """The method that gives a picture's or a sound's place in the text its vectors."""
    for owner in (model, getattr(model, "model", None)):
        run = getattr(owner, f"get_{kind}_features", None)
        if run is not None and "args" not in inspect.signature(run).parameters:  # else it hands all on to the next
            return run
    return None


def _inserted(model: PreTrainedModel, inputs: Inputs, tokens: dict[int, int]) -> Inputs:
    """`inputs` with so many of each of these tokens after the first of each text."""
    ids = inputs["input_ids"]
    wanted = inspect.signature(model.forward).parameters
    placeholders = torch.tensor([token for token, count in tokens.items() for _ in range(count)], dtype=ids.dtype)
    where = torch.cat([torch.zeros(1), torch.ones(len(placeholders)), torch.zeros(ids.shape[1] - 1)]).long()
    inputs = inputs | {"input_ids": torch.cat([ids[:, :1], placeholders.expand(len(ids), -1), ids[:, 1:]], dim=1)}
    for name, row in {
        "attention_mask": torch.ones_like(where),
        "mm_token_type_ids": where,
        "token_type_ids": where,
    }.items():
        if name in wanted:
            inputs[name] = row.repeat(len(ids), 1)
    return inputs


# The pictures of so many texts, and how many of which token stand for the picture of one text.
Form = Callable[[PreTrainedModel, int, Noise], tuple[Inputs, dict[int, int]]]


def _counted(model: PreTrainedModel, rows: int, pictures: Inputs, kind: str = "image") -> tuple[Inputs, dict[int, int]]:
    """The pictures, and how many tokens stand for each: as many as the tower gives vectors."""
    run = _tower(model, kind)
    assert run is not None
    with torch.no_grad():
        output = run(**pictures)
    vectors = getattr(output, "pooler_output", None)
    vectors = output.last_hidden_state if vectors is None else vectors
    vectors = output.deepstack_features[0][1] if vectors is None else vectors  # Granite 4: for inner blocks alone
    parts = vectors if isinstance(vectors, (list, tuple)) else [vectors]
    count = sum(part.numel() // part.shape[-1] for part in parts)
    return pictures, {getattr(model.config, f"{kind}_token_id"): count // rows}


def _whole(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """One picture a text, as it is; as the rows of its patches where there is no tower to cut it up (Fuyu)."""
    config = model.config
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return _counted(model, rows, {"pixel_values": noise(rows, 4, config.num_channels * config.patch_size**2)})
    pictures = {"pixel_values": _pixels(vision, noise, rows)}
    if _tower(model, "image") is None:  # GIT: pictures go in front of the text, without tokens
        return pictures, {}
    return _counted(model, rows, pictures)


def _of_sizes(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """A picture with its size; where the config has a grid of sizes (LLaVA-NeXT), cut into tiles, after a small one."""
    vision = model.config.vision_config
    size = vision.image_size
    if not (grid := getattr(model.config, "image_grid_pinpoints", None)):
        pictures = {"pixel_values": _pixels(vision, noise, rows), "image_sizes": torch.full((rows, 2), size)}
        return _counted(model, rows, pictures)
    height, width = grid[0]
    tiles = 1 + (height // size) * (width // size)
    sizes = torch.tensor([[height, width]]).repeat(rows, 1)
    return _counted(model, rows, {"pixel_values": _pixels(vision, noise, rows, tiles), "image_sizes": sizes})


def _several(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """One of the several pictures that a text may have (Idefics); or one tile of it, and that it is there (Docling)."""
    vision = model.config.vision_config
    pictures = {"pixel_values": _pixels(vision, noise, rows, 1)}
    if vision.model_type == "granite_docling_vision":
        pictures["pixel_attention_mask"] = torch.ones(rows, 1, dtype=torch.bool)
    return _counted(model, rows, pictures)


def _strip(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """Patches of all pictures, side by side in one strip, and each picture's height and width (MiniCPM-V)."""
    vision = model.config.vision_config
    side = 4
    pixels = noise(1, vision.num_channels, vision.patch_size, rows * side**2 * vision.patch_size)
    sizes = torch.full((rows, 2), side, dtype=torch.int32)
    return _counted(model, rows, {"pixel_values": pixels, "target_sizes": sizes})


def _pooled(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """Patches of each picture, and which of them become one token (Molmo)."""
    vision = model.config.vision_config
    patches, tokens = vision.num_position_embeddings, 4
    grid = torch.tensor([[2, 2, 0, 0]]).repeat(rows, 1)
    return _counted(
        model,
        rows,
        {
            "pixel_values": noise(rows, patches, vision.num_channels * vision.patch_size**2),
            "image_token_pooling": torch.arange(rows * patches).view(rows * tokens, -1),
            "image_grids": grid,
        },
    )


def _grids(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """Patches of all pictures in one list, and how many of them each has in time, height and width (Qwen-VL, GLM-V)."""
    vision = model.config.vision_config
    height, width = 2 * vision.spatial_merge_size, 4 * vision.spatial_merge_size
    channels = next(
        getattr(vision, name) for name in ("in_channels", "in_chans", "num_channels") if hasattr(vision, name)
    )
    patch = channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, height, width]]).repeat(rows, 1)
    return _counted(model, rows, {"pixel_values": noise(rows * height * width, patch), "image_grid_thw": grid})


def _places(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """Patches of each picture and the place of each patch, and a spectrum of a sound (Gemma 4)."""
    vision = model.config.vision_config
    if vision is None:  # Gemma 4 Unified, which has no tower
        return {}, {}
    side = 2 * vision.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
    pixels = noise(rows, side**2, 3 * vision.patch_size**2)
    pictures = {"pixel_values": pixels, "image_position_ids": places.repeat(rows, 1, 1)}
    sounds = {"input_features": noise(rows, 32, model.config.audio_config.subsampling_conv_channels[0])}
    sounds["input_features_mask"] = torch.ones(rows, 32, dtype=torch.bool)
    tokens = _counted(model, rows, pictures)[1] | _counted(model, rows, sounds, "audio")[1]
    return pictures | sounds, tokens


def _tiles(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """A picture in tiles to which the text attends, in place of none of its tokens (Mllama)."""
    vision = model.config.vision_config
    tiles = vision.max_num_tiles
    shape = vision.supported_aspect_ratios.index([1, tiles]) + 1
    return {
        "pixel_values": _pixels(vision, noise, rows, 1, tiles),
        "aspect_ratio_ids": torch.full((rows, 1), shape),
        "aspect_ratio_mask": torch.ones(rows, 1, tiles, dtype=torch.long),
    }, {}


def _states(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """What the tower of pictures would give, for the text tower alone, which leaves blocks out without it (Mllama)."""
    if not hasattr(model.config, "cross_attention_layers"):
        return {}, {}
    return {"cross_attention_states": noise(rows, 4, model.config.hidden_size)}, {}


def _crops_and_sound(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """A picture, whole and as one crop, and a sound (Phi-4)."""
    vision, audio = model.config.vision_config, model.config.audio_config
    patches = vision.image_size // vision.patch_size
    side = (patches + 1) // 2
    frames = 2  # that are left of the sound
    return {
        "image_pixel_values": _pixels(vision, noise, rows, 2),
        "image_sizes": torch.full((rows, 2), vision.crop_size),
        "image_attention_mask": torch.ones(rows, 2, patches, patches),
        "audio_input_features": noise(rows, frames * audio.time_reduction, audio.input_size),
        "audio_embed_sizes": torch.full((rows,), frames),
    }, {vision.image_token_id: 2 * side * (side + 1) + 1, audio.audio_token_id: frames}


def _spectra(model: PreTrainedModel, rows: int, noise: Noise) -> tuple[Inputs, dict[int, int]]:
    """The spectrum of a sound, of the one length that there is (MOSS)."""
    audio = model.config.audio_config
    length = 2 * audio.max_source_positions
    sounds = {
        "input_features": noise(rows, audio.num_mel_bins, length),
        "input_features_mask": torch.ones(rows, length, dtype=torch.long),
        "padding_mask": torch.ones(rows, length, dtype=torch.long),
    }
    return _counted(model, rows, sounds, "audio")


# By the argument that gives a form away; the first that a model has decides.
FORMS: dict[str, Form] = {
    "image_pixel_values": _crops_and_sound,
    "image_position_ids": _places,
    "input_features_mask": _spectra,
    "aspect_ratio_ids": _tiles,
    "cross_attention_states": _states,
    "image_grid_thw": _grids,
    "target_sizes": _strip,
    "image_token_pooling": _pooled,
    "pixel_attention_mask": _several,
    "image_sizes": _of_sizes,
    "pixel_values": _whole,
}


def _pixels(vision: Any, noise: Noise, *many: int) -> Tensor:
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return noise(*many, getattr(vision, "num_channels", 3), height, width)
