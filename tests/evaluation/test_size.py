import json
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_compress.evaluation.size import parameter_count, stored_bytes

MakeLlama = Callable[..., LlamaForCausalLM]


def header_bytes(file):
    """What a safetensors file holds beside its tensors: eight bytes that give the header's length, and the header."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_model_takes_what_its_file_takes_but_for_the_header(make_llama, tmp_path, tied, dtype):
    model = make_llama(tied=tied).to(dtype)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert stored_bytes(tmp_path) == stored_bytes(str(tmp_path)) == file.stat().st_size
    assert stored_bytes(model) == file.stat().st_size - header_bytes(file)


def test_a_model_on_the_meta_device_takes_the_same(make_llama):
    model = make_llama(tied=True)
    with torch.device("meta"):
        bodiless = LlamaForCausalLM(model.config)
    assert stored_bytes(bodiless) == stored_bytes(model)


def test_parameters_that_share_memory_are_counted_once(make_llama):
    model = make_llama(tied=False)
    expected = stored_bytes(model) - model.lm_head.weight.numel() * 4
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data)
    assert stored_bytes(model) == expected


def test_shards_are_summed_and_strangers_are_not(make_llama, tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "optimizer.safetensors").write_bytes(b"x" * 1000)
    assert stored_bytes(tmp_path) == sum(shard.stat().st_size for shard in shards)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"names .*{shards[0].name}"):
        stored_bytes(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*save_pretrained"):
        stored_bytes(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        stored_bytes(tmp_path / "none")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        stored_bytes(tmp_path)


def test_parameters_are_counted_by_hand(make_llama):
    vocabulary, width, ffn, key_value = 64, 16, 32, 8
    block = 2 * width * width + 2 * width * key_value + 3 * width * ffn + 2 * width
    assert parameter_count(make_llama(layers=3, tied=True)) == vocabulary * width + 3 * block + width
    assert parameter_count(make_llama(layers=3, tied=False)) == 2 * vocabulary * width + 3 * block + width
