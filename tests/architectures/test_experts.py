"""Experts of every family that has them in tensors: taken apart, rounded, and loaded again."""

import pytest
import torch

from hf_compress.api.compress import compress
from hf_compress.methods.lrp import LRPConfig
from hf_compress.modules.experts import SeparateExperts
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.storage.save import save
from tests.helpers.tiny import tiny_model

FAMILIES = [
    *("afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v32", "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint"),
    *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid"),
    *("granitemoeshared", "hunyuan_v1_moe", "hy_v3", "inkling_text", "jamba", "kimi_linear", "kolibri1", "laguna"),
    *("lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "nemotron_h"),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp"),
    *("qwen4_exp_text", "solar_open", "zaya"),
]
IDS = torch.randint(3, 90, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_rounded_and_load(name, tmp_path):
    """`save` compares what is loaded with what there is, bit for bit."""
    model = tiny_model(name)
    inputs = {"input_ids": IDS, "attention_mask": (torch.arange(12) < torch.tensor([[8], *[[12]] * 5])).long()}
    compress(model, LRPConfig(bits=4.5, group_size=16), inputs)
    mixtures = [module for module in model.modules() if isinstance(module, SeparateExperts)]
    assert mixtures
    for expert in (expert for mixture in mixtures for expert in mixture.experts):
        assert all(isinstance(linear, MixedPrecisionLinear) for linear in (expert.up, expert.down))
    save(model, tmp_path / "out")
