"""Changes of a model that engines are asked about, and where vLLM is."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import narrow_attention

CHANGES = {
    "as it was": None,
    "depth": hfc.DropBlocksConfig(num_blocks=1, criterion="last"),
    "several widths": hfc.ILLCConfig(ratio=0.3, allocation="adaptive"),
    "packed": hfc.LRPConfig(bits=6, group_size=16),
    "sparse": hfc.LRPConfig(sparsity=0.5),
    "linear": hfc.LayerCollapseConfig(num_layers=1),
    "bottleneck": hfc.AdaptiveCompressConfig(),
}
VLLM = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"


def fewer_heads(model, index=1, groups=(0,)):
    """Keep some of the heads of keys and values in one block alone."""
    apply(narrow_attention(Block(model, Anatomy(model).stack(), index), groups), model)


def wide_llama(layers=3):
    """A model whose heads are as wide as vLLM's kernels want."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=300,
        num_hidden_layers=layers,
        initializer_range=0.2,
        max_position_embeddings=48,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def vllm_python():
    """The interpreter that has vLLM; skips the test where there is none."""
    if not VLLM.exists() or not VLLM.parents[1].joinpath(".installed").exists():
        pytest.skip(f"no vLLM in {VLLM.parents[1].name}: make vllm")
    return str(VLLM)
