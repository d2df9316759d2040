"""Settings other than the default ones by which the place of a block matters, and the tiny models that have them.

Found by reading every `configuration_*.py` of Transformers for lists of block indices, runs, periods and lists with an
entry a block, and every `modeling_*.py` for what it computes from a block's index.
"""

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForDepthEstimation,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from tests.helpers import tiny

_USUAL = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM)


@dataclass(frozen=True)
class Variant:
    """One model type with settings that are not its defaults.

    Attributes:
        auto: the auto class that builds it.
        model_type: of the whole model.
        settings: fields of its configuration and of its parts, by their model types.
    """

    auto: Any
    model_type: str
    settings: tiny.Settings

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The tiny model, as those of :mod:`tests.helpers.tiny`."""
        return tiny.tiny_of(self.auto, self.model_type, seed, self.settings)

    def __str__(self) -> str:
        fields = [f"{name}={value}" for part in self.settings.values() for name, value in part.items()]
        head = "" if self.auto in _USUAL else f"({self.auto.__name__})"
        return f"{self.model_type}{head}[{','.join(fields)}]".replace(" ", "")


_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_SLIDING_ENDS = [_SLIDING, _FULL, _FULL, _SLIDING]
_BOTH_ENDS = [{"layer_types": _SLIDING_ENDS}]
_FULL_SECOND = [_SLIDING, _FULL, _SLIDING, _SLIDING]
_DENSE_ENDS = ["dense", "sparse", "sparse", "dense"]
_SLIDES = {"use_sliding_window": True, "max_window_layers": 1}


def _of(auto: Any, table: dict[str, list[dict[str, Any]]], part: str = "") -> list[Variant]:
    """A variant for each of several settings of each model type; of its part of this model type, where one is named."""
    return [Variant(auto, name, {part or name: fields}) for name, several in table.items() for fields in several]


CAUSAL = _of(
    AutoModelForCausalLM,
    {
        # numbers computed from the index of a block, or from how many there are
        "gpt2": [
            {"scale_attn_by_inverse_layer_idx": True},
            {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "attn_implementation": "eager"},
        ],
        "minicpm3": [{"scale_depth": None}, {"scale_depth": 2.0}],
        "rwkv": [{"rescale_every": 2}],
        # runs of blocks
        "qwen2": [_SLIDES],
        "qwen2_moe": [_SLIDES | {"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [], "decoder_sparse_step": 2}],
        "qwen3": [_SLIDES],
        "qwen3_moe": [{"mlp_only_layers": [0, 3], "decoder_sparse_step": 1}, {"decoder_sparse_step": 3}],
        "qwen3_next": [{"mlp_only_layers": [0], "decoder_sparse_step": 2}],
        "flint": [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}],
        "dots1": [_SLIDES, {"first_k_dense_replace": 3}],
        "deepseek_v2": [{"first_k_dense_replace": 2}],
        "deepseek_v3": [{"first_k_dense_replace": 0}, {"first_k_dense_replace": 3}],
        "glm4_moe": [{"first_k_dense_replace": 3}],
        "afmoe": [{"num_dense_layers": 3}, {"global_attn_every_n_layers": 3}],
        "beam": [{"mlp_layer_types": _DENSE_ENDS}],
        "lfm2_moe": [{"num_dense_layers": 2}],
        "ernie4_5_moe": [
            {"moe_layer_start_index": 2},
            {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
            {"moe_layer_start_index": 0, "moe_layer_interval": 2},
        ],
        "gemma4_text": [
            {"hidden_size_per_layer_input": 0},
            {"num_kv_shared_layers": 2},
            {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
        ],
        # periods
        "bailing_hybrid": [{"layer_group_size": 3}],
        "jamba": [{"attn_layer_period": 3, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 0}],
        "modernbert-decoder": [{"global_attn_every_n_layers": 2}],
        "exaone4": [{"sliding_window_pattern": 2}, {"sliding_window_pattern": "LGLL", "layer_types": _FULL_SECOND}],
        "smollm3": [{"no_rope_layer_interval": 3}, {"no_rope_layers": [0, 1, 1, 0]}],
        "llama4_text": [
            {"interleave_moe_layer_step": 1, "moe_layers": [0, 3]},
            {"no_rope_layers": [1, 0, 0, 1]},
            {"no_rope_layer_interval": 3},
        ],
        "cohere2_moe": [{"first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": 2}],
        "inkling_text": [
            {"local_layer_ids": [0, 3]},
            {"local_layer_ids": [1, 2], "num_mtp_layers": 4, "mtp_local_layer_ids": [0, 2]},
        ],
        # short forms
        "gpt_neo": [{"attention_types": [[["local"], 1], [["global", "local"], 1], [["global"], 1]]}],
        "recurrent_gemma": [
            {"block_types": ["recurrent", "attention"]},
            {"block_types": ["attention", "recurrent"] * 2},
        ],
        # lists with an entry a block, some of other stacks
        **dict.fromkeys(("gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3"), _BOTH_ENDS),
        "granite_swa": [{"layer_types": _SLIDING_ENDS, "layer_rope_theta": [1e4, 0, 1e4, 1e5]}],
        "granitemoe_swa": [{"layer_types": _SLIDING_ENDS, "layer_rope_theta": [0, 1e4, 0, 1e4]}],
        "laguna": [{"num_attention_heads_per_layer": [2, 4, 4, 2], "layer_types": _SLIDING_ENDS}],
        "glm_moe_dsa": [{"indexer_types": ["full", "shared", "shared", "full"]}],
        "hy_v4": [{"indexer_types": ["full", "full", "shared", "shared"]}],
        "nemotron_h": [{"mtp_layers_block_type": [_FULL, "moe", _FULL, "moe"], "num_nextn_predict_layers": 4}],
        # lists of block indices
        "bamba": [{"attn_layer_indices": [0, 2]}, {"attn_layer_indices": [0, 1, 2, 3]}],
        "lfm2": [{"full_attn_idxs": [0, 3], "layer_types": None}],
        "zamba2": [{"num_mem_blocks": 2, "layers_block_type": ["hybrid", _LINEAR, "hybrid", "hybrid"]}],
        "qwen4_exp_text": [{"ple_layer_ids": [1, 3]}],
    },
) + _of(
    AutoModelForCausalLM, {"phi4_multimodal": [{"feature_layer": -1}, {"feature_layer": 2}]}, "phi4_multimodal_vision"
)

_WINDOWS = [{"out_indices": [1, 3]}, {"out_indices": [-2, -1]}]
_LISTENERS = ("hubert", "wav2vec2", "wavlm", "data2vec-audio", "sew", "whisper")
_BACKBONES = ("beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "pixio", "vitdet")

ENCODERS = [
    *_of(
        AutoModel,
        {
            "deberta-v2": [{"conv_kernel_size": 3}],
            "modernbert": [{"global_attn_every_n_layers": 2}],
            "longformer": [{"attention_window": [8, 4, 8, 4]}],
            "imagegpt": [{"scale_attn_by_inverse_layer_idx": True}],
            "vitdet": [{"window_block_indices": [0, 2], "residual_block_indices": [1]}, {"window_block_indices": [3]}],
            "sam_vision_model": [{"global_attn_indexes": [1, 3]}, {"global_attn_indexes": [0]}],
            "sam_hq_vision_model": [{"global_attn_indexes": [1, 3]}],
            "esmc": [{}],
            "sapiens2": [{"num_key_value_heads_per_layer": [4, 2, 2, 4]}],
            "fun_asr_nano_encoder": [{"num_timestamp_prediction_layers": 1}, {"num_timestamp_prediction_layers": 2}],
        },
    ),
    *_of(AutoModelForAudioClassification, {name: [{"use_weighted_layer_sum": True}] for name in _LISTENERS}),
    *_of(
        AutoModelForSemanticSegmentation,
        {
            "beit": [{"num_hidden_layers": 5, "out_indices": [1, 2, 3, 5]}],
            "data2vec-vision": [{"num_hidden_layers": 5, "out_indices": [1, 2, 3, 5]}],
            "dpt": [{"num_hidden_layers": 5, "backbone_out_indices": [0, 1, 2, 4]}],
        },
    ),
    *_of(AutoModelForDepthEstimation, {"dpt": [{"num_hidden_layers": 5, "backbone_out_indices": [0, 1, 2, 4]}]}),
    *_of(AutoBackbone, dict.fromkeys(_BACKBONES, _WINDOWS)),
    *_of(
        AutoBackbone,
        {
            "lw_detr_vit": [
                {"image_size": 32, "num_windows": 4, "window_block_indices": [0, 2], "out_indices": [2, 4]}
            ],
            "rf_detr_dinov2": [{"out_indices": [2, 4], "num_windows": 2}],
        },
    ),
]

SEQ2SEQ = _of(
    AutoModelForSeq2SeqLM,
    {
        "bart": [{"encoder_layers": 3}, {"decoder_layers": 2}],
        "led": [{"attention_window": [8, 4, 8, 4]}],
        "longt5": [{"encoder_attention_type": "transient-global"}],
        "mvp": [{"use_prompt": True, "prompt_length": 4, "prompt_mid_dim": 16}],
        "nllb-moe": [{"encoder_sparse_step": 2, "decoder_sparse_step": 2}, {"encoder_sparse_step": 3}],
        "pegasus_x": [{"stagger_local_blocks": True, "block_size": 4}],
        "switch_transformers": [
            {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
            {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 4},
        ],
        "t5": [{"num_decoder_layers": 2}],
    },
)

_TAPS = [{"vision_feature_layer": layer} for layer in (2, -3, -5)]
_SEVERAL_TAPS = [{"vision_feature_layer": [-1, 1]}, {"vision_feature_layer": [0, 1, 2, 4]}]
_DEEPSTACK = [{"deepstack_visual_indexes": taps} for taps in ([1, 2, 3], [3], [1, 2])]

# By what is set: the settings of the whole where no part is named, else those of that part.
_SEVERAL = {
    "": {
        **dict.fromkeys(("llava", "llava_next", "vipllava", "llava_onevision"), _TAPS + _SEVERAL_TAPS),
        **dict.fromkeys(("aya_vision", "internvl", "mistral3", "qianfan_ocr"), _TAPS),
    },
    "qwen3_vl_vision": {"qwen3_vl": _DEEPSTACK},
    "qwen3_vl_moe_vision": {"qwen3_vl_moe": _DEEPSTACK},
    "cohere_compass_vision": {"cohere_compass": _DEEPSTACK},
    "qwen3_vl_moe_text": {"qwen3_vl_moe": [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}]},
    "qwen2_5_vl_vision": {"qwen2_5_vl": [{"fullatt_block_indexes": kinds} for kinds in ([0], [0, 1, 2, 3], [])]},
    "mllama_vision_model": {"mllama": [{"intermediate_layers_indices": taps} for taps in ([0, 3], [-1, 0])]},
    "mllama_text_model": {"mllama": [{"cross_attention_layers": places} for places in ([0], [1, 2], [0, 1, 2, 3])]},
    "got_ocr2_vision": {"got_ocr2": [{"global_attn_indexes": [0]}, {"global_attn_indexes": [0, 1, 2, 3]}]},
    "mistral_large4_text": {
        "mistral_large4": [
            {"kv_source_layers": [0, 0, 2, 2], "no_rope_layers": [1] * 4},
            {"no_rope_layers": [1, 0, 1, 1]},
        ]
    },
    "gemma4_text": {"gemma4": [{"hidden_size_per_layer_input": 0}, {"num_kv_shared_layers": 2}]},
    "gemma4_unified_text": {"gemma4_unified": [{"num_kv_shared_layers": 2}]},
    "exaone4_5_vision": {"exaone4_5": [{"window_size": 32, "fullatt_block_indexes": [0, 2]}]},
    "granite_docling_vision": {
        "granite_docling": [
            {"image_size": 32, "scale_factor": 2, "deepstack_visual_indexes": taps} for taps in ([0, 2], [1, 2, 3])
        ]
    },
}

VISION_LANGUAGE = [
    *(variant for part, table in _SEVERAL.items() for variant in _of(AutoModelForImageTextToText, table, part)),
    Variant(
        AutoModelForImageTextToText,
        "granite4_vision",
        {
            "granite4_vision": {
                "downsample_rate": "1/2",
                "image_grid_pinpoints": [[16, 32]],
                "deepstack_layer_map": [[1, 0], [-2, 2]],
                "spatial_target_layers": [1, 3, 4, 5],
            },
            "granite4_vision_text": {"num_hidden_layers": 6},
        },
    ),
    *(
        Variant(
            AutoModelForImageTextToText,
            "molmo2",
            {
                "molmo2": {"image_patch_id": 120},
                "molmo2_vision": {"image_size": [32, 32], "num_position_embeddings": 16},
                "molmo2_adapter": {"vision_feature_layer": taps, "text_hidden_size": 64},
                "molmo2_text": scaled,
            },
        )
        for taps in ([2, 1], [-1, 0])
        for scaled in ({}, {"rope_scaling_layers": [0, 2]})
    ),
    *_of(
        AutoModelForImageTextToText,
        {
            "minicpmv4_6": [{"image_token_id": 120, "insert_layer_id": place} for place in (0, 1, 2)],
            "minicpmv4_7": [{"image_token_id": 120, "insert_layer_id": 1}],
            "aria": [{"projector_patch_to_query_dict": {4: 2}, **taps} for taps in _TAPS],
            "blip-2": [{"image_token_index": 120}],
        },
    ),
]

VARIANTS: list[Variant] = [*CAUSAL, *ENCODERS, *SEQ2SEQ, *VISION_LANGUAGE]
BY_NAME: dict[str, Variant] = {str(variant): variant for variant in VARIANTS}
