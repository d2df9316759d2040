"""Tiny random models of several families, changed in several ways at once, in vLLM: does it say what Transformers says?

    python benchmarks/vllm_families.py                    # 15 families; some minutes
    python benchmarks/vllm_families.py --only gemma3      # those whose names begin so

Dense models get FFNs of several widths, a linear FFN, one of low rank, bottlenecks, a block with fewer heads and packed
weights; mixtures narrower experts and bottlenecks. Each is one `hfc.export(to="vllm")`, or the error that it raises.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from common import VLLM, write_result
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import narrow_attention

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
GEMMA = {"query_pre_attn_scalar": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {},
    "olmo2": {},
    "cohere": {},
    "starcoder2": {},
    "gpt_neox": {"num_key_value_heads": 4},  # which it does not have, but vLLM would read
    "opt": {"num_key_value_heads": 4, "ffn_dim": 256, "word_embed_proj_dim": 128},
    "gpt2": {"n_embd": 128, "n_layer": 5, "n_head": 4, "n_positions": 256},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}
DENSE = (
    hfc.ILLCConfig(ratio=0.3, allocation="adaptive"),
    hfc.LayerCollapseConfig(num_layers=1),
    hfc.LayerCollapseConfig(num_layers=1, rank=16),
    hfc.AdaptiveCompressConfig(),
    hfc.LRPConfig(bits=6, group_size=32),
)
MIXTURE = (hfc.ILLCConfig(ratio=0.3), hfc.AdaptiveCompressConfig())


def random_model(family: str) -> PreTrainedModel:
    own = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"vocab_size": 256} if family == "gpt2" else SIZES
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | SPECIAL | own)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform predictions, so that a wrong part shows
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def fewer_heads(model: PreTrainedModel) -> str:
    """Take a key and value head out of one block, with the queries that read it; what came of it."""
    try:
        apply(narrow_attention(Block(model, Anatomy(model).stack(), 1), [0]), model)
    except hfc.UnsupportedModelError:
        return "heads in one matrix"
    return "fewer heads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="FAMILY")
    parser.add_argument("--vllm", default=str(VLLM), metavar="PYTHON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    data = torch.randint(2, 250, (16, 24), generator=torch.Generator().manual_seed(0))
    lines, results = ["| family | heads | vLLM |", "|---|---|---|"], {}
    with TemporaryDirectory() as folder:
        for family in tqdm([family for family in FAMILIES if family.startswith(tuple(args.only))]):
            model = random_model(family)
            mixture = "num_experts_per_tok" in FAMILIES[family]
            heads = fewer_heads(model)
            for config in MIXTURE if mixture else DENSE:
                hfc.compress(model, config, data)
            place = hfc.save(model, Path(folder) / family)
            try:
                told = str(hfc.export(place, Path(folder) / "out", "vllm", overwrite=True, python=args.vllm).agreement)
            except hfc.UnsupportedModelError as error:
                told = f"refused: {' '.join(str(error).split())[:300]}"
            results[family] = told
            lines.append(f"| {family} | {heads} | {told} |")
            print(lines[-1], flush=True)
    write_result("vllm_families", "\n".join(lines), results)


if __name__ == "__main__":
    main()
