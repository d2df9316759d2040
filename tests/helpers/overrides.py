"""What :mod:`tests.helpers.tiny` is told by hand: the small sizes, and the exceptions of single model types."""

from typing import Any

VOCABULARY = 128
DEPTH = 4
WIDTH = 64
HEADS = 4
HEAD_DIM = 16

# The value that an integer field of one of these (standard) names gets, where the configuration class sets an integer.
_NAMES = [
    (VOCABULARY, "vocab_size decoder_vocab_size audio_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (WIDTH, "hidden_size word_embed_proj_dim d_model embed_dim n_embd hidden_size_global lru_width"),
    (32, "embedding_size input_embedding_size output_embedding_size"),
    (96, "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim hidden_dim ffn_hidden_size d_inner d_ff dff"),
    (96, "dim_ff mlp_dim intermediate_size_mlp dense_intermediate_size feed_forward_size"),
    (48, "expert_ffn_hidden_size moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size"),
    (48, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    (16, "block_multiple_of"),
    (DEPTH, "num_hidden_layers encoder_layers decoder_layers num_layers num_encoder_layers num_decoder_layers"),
    (DEPTH, "depth n_layer"),
    # attention; latent; of other kinds in the same network
    (HEADS, "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads"),
    (HEADS, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads"),
    (HEAD_DIM, "head_dim dim_head d_head d_kv kv_channels attention_head_size swa_head_dim global_head_dim"),
    (16, "kv_lora_rank o_lora_rank qk_nope_head_dim v_head_dim index_head_dim"),
    (24, "q_lora_rank qk_head_dim"),
    (8, "rotary_dim qk_rope_head_dim hidden_size_per_layer_input"),
    (2, "index_n_heads"),
    # positions and windows: smaller than the probe, so that they are seen
    (64, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_target_positions"),
    (64, "original_max_position_embeddings"),
    (32, "max_source_positions"),
    (4, "sliding_window sliding_window_size attention_window_size local_attention window_size attention_chunk_size"),
    (4, "index_topk"),
    (2, "max_window_layers"),
    # experts
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "zero_expert_num num_experts_per_tok num_experts_per_token moe_topk n_group"),
    (1, "topk_group first_k_dense_replace num_dense_layers"),
    (16, "router_hidden_size"),
    # linear attention and state spaces
    (2, "linear_num_key_heads n_mamba_heads n_groups"),
    (4, "linear_num_value_heads linear_num_heads"),
    (16, "linear_head_dim mamba_head_dim mamba_headdim mamba_d_head"),
    (8, "linear_key_head_dim linear_value_head_dim chunk_size mamba_chunk_size mamba_d_state mamba_dt_rank"),
    (8, "mamba_num_heads mamba_n_heads state_size ssm_state_size time_step_rank"),
    (8, "adapter_rank laurel_rank gated_norm_rank"),
    # periods of a per-layer pattern
    (2, "layer_group_size attn_layer_period expert_layer_period global_attn_every_n_layers no_rope_layer_interval"),
    (1, "attn_layer_offset expert_layer_offset"),
    # pictures and sounds
    (16, "image_size num_position_embeddings num_mel_bins relative_attention_max_distance"),
    (8, "patch_size relative_attention_num_buckets"),
    (WIDTH, "out_hidden_size vision_output_dim projector_input_dim projector_output_dim"),
    (96, "alignment_intermediate_size"),
]
SIZES: dict[str, int] = {name: size for size, names in _NAMES for name in names.split()}

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_SLIDING_FULL = [_SLIDING, _FULL, _SLIDING, _FULL]
_LINEAR_FULL = [_LINEAR, _FULL, _LINEAR, _FULL]

_DENSE_SPARSE = ["dense", "sparse", "dense", "sparse"]

_GEMMA4_TEXT = {"global_head_dim": 32, "layer_types": _SLIDING_FULL}
_PICTURE_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_SPEECH = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16}
_HYBRID = {"layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"]}
_START = {"decoder_start_token_id": 0}
_MUSICGEN = {"pad_token_id": VOCABULARY, "bos_token_id": VOCABULARY}  # one past the codes, as in the real ones
_DOTS3_TEXT = {
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), HEADS),
    **dict.fromkeys(("swa_q_lora_rank", "swa_qk_nope_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("swa_kv_lora_rank", "swa_head_dim"), 24),
}

# Per model type (of a configuration or sub-configuration): fields set as they stand, after the sizes.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},  # the block-sparse form rewrites itself on short inputs
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "use_cache": False},  # the cache asks it for a depth it has not
    "cohere_compass_text": {
        "layer_types": _SLIDING_FULL,
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            _FULL: {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_group": 1, "n_group": 2, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _DOTS3_TEXT,
    "dots3_note_vision_encoder": {
        "pyramid_num_routed": [-1, -1, 2, 4],
        "adapter_in_dim": WIDTH,
        "adapter_out_dim": WIDTH,
    },
    "dots3_note_audio_encoder": {
        **dict.fromkeys(("adapter_input_size", "adapter_out_dim"), WIDTH),
        **dict.fromkeys(("downsample_hidden_size", "feature_size"), 16),
    },
    "gemma3": {"mm_tokens_per_image": 1},
    "gemma3n_text": {
        "layer_types": _SLIDING_FULL,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gemma4_audio": {
        "subsampling_conv_channels": [8, 4],
        "attention_context_left": 5,
        "output_proj_dims": WIDTH,
        "use_clipped_linears": False,
    },
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_unified_text": _GEMMA4_TEXT,
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 16},
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},
    "got_ocr2_vision": {"global_attn_indexes": [1, 3], "output_channels": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR_FULL},
    "hy_v4": {"indexer_types": ["full", "shared", "full", "shared"]},
    "idefics2_perceiver": {"resampler_n_latents": 2},
    "inkling_text": {"mlp_layer_types": _DENSE_SPARSE},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [8, 8]},
    "laguna": {"num_attention_heads_per_layer": [4, 2, 4, 2], "layer_types": _SLIDING_FULL},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "lfm2": {"full_attn_idxs": [1, 3], "layer_types": ["conv", _FULL, "conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "llama4_vision_model": {"intermediate_size": 4 * WIDTH},  # what is left of four patches that become one
    "llava_next": {"image_grid_pinpoints": [[16, 32], [32, 16]]},
    "longformer": {"attention_window": 8},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"decoder_sparse_step": 2},
    "qwen3_next": {"mlp_only_layers": [2]},
    "qwen4_exp_text": {
        "ple_layer_ids": [2],  # counted from one
        **dict.fromkeys(("eos_token_id", "indexer_n_heads", "indexer_compress_ratio", "split_ngram_parts"), 2),
        **dict.fromkeys(("indexer_head_dim", "hc_lowrank", "ple_embed_dim"), 16),
        "indexer_kv_heads": 1,
        "indexer_budget": 4,
        "ngram_vocab_size_base": 50,
    },
    "mellum": {"layer_types": _SLIDING_FULL, "mlp_layer_types": _DENSE_SPARSE},
    "minimax_m3_vl_text": {
        "layer_types": [_FULL, "minimax_m3_sparse", _FULL, "minimax_m3_sparse"],
        "mlp_layer_types": _DENSE_SPARSE,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "mllama_vision_model": {
        "intermediate_layers_indices": [1, 2],
        "num_global_layers": 2,
        "vision_output_dim": 3 * WIDTH,
    },
    "musicgen_decoder": _MUSICGEN,
    "musicgen_melody_decoder": _MUSICGEN,
    "nemotron": {"num_key_value_heads": 2},
    "paligemma": {"projection_dim": WIDTH},
    "phi4_multimodal_vision": {"crop_size": 16},
    "phi4_multimodal_audio": {
        **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), WIDTH),
        "num_blocks": DEPTH,
        "chunk_size": -1,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 16,  # longer than probe and answer: its cached hashing does not run in 5.23
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "mobilebert": {"normalization_type": "layer_norm"},  # without it, random weights explode
    "mpnet": {"relative_attention_num_buckets": 32},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "swin": {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "image_size": 32,
        "patch_size": 4,
    },
    "yolos": {"image_size": [32, 32], "num_detection_tokens": 4},
    "audio-spectrogram-transformer": {"max_length": 32},
    **dict.fromkeys(("glm4v_text", "qwen2_vl_text", "qwen2_5_vl_text"), _PICTURE_ROPE),
    "qwen2_5_vl_vision": {"window_size": 32, "fullatt_block_indexes": [1, 3]},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0, 2]},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0, 2]},
    "vipllava": {"vision_feature_layer": [-2, 1]},
    **dict.fromkeys(("hubert", "wav2vec2", "wavlm"), _SPEECH),
    **dict.fromkeys(("t5", "longt5", "switch_transformers"), _START),
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "xlstm": {"qk_dim_factor": 1.0},  # both inner widths are rounded up to a multiple of 64
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys(("zamba", "zamba2"), _HYBRID),
    "zaya": {
        "num_experts_per_tok": 1,
        "sliding_window": 4,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
}

# Model types whose class takes a part of the configuration that Transformers registers for them.
PARTS: dict[str, str] = {"musicgen": "decoder", "musicgen_melody": "decoder"}

# Towers that a default configuration leaves out: per model type, the field and the model type of its part.
TOWERS: dict[str, dict[str, str]] = {"gemma4": {"vision_config": "gemma4_vision", "audio_config": "gemma4_audio"}}

# Model types that cannot be built here, and why.
_ASSISTANT = "a draft model: it must share the keys and values of every layer, which its own kv_sharing_modes refuses"
CANNOT: dict[str, str] = {"gemma4_assistant": _ASSISTANT, "gemma4_unified_assistant": _ASSISTANT}
