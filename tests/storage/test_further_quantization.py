"""A plain result is open to every other tool: here bitsandbytes' int8 weights, which run on a CPU."""

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_compress.api.compress import compress
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.storage.save import save
from tests.helpers.round_trip import build, change, logits

EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("edit", ["remove a block", "narrow every FFN"])
def test_a_plain_result_can_be_quantized(edit, tmp_path):
    model = change(build("Llama"), edit)
    quantized = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "out"), quantization_config=EIGHT_BITS)
    assert isinstance(quantized.model.layers[0].mlp.up_proj, Linear8bitLt)
    assert torch.allclose(logits(quantized), logits(model), atol=0.1)
    with pytest.raises(UnsupportedModelError, match="the model is quantized: compress it first"):
        compress(quantized, DropBlocksConfig(num_blocks=1, criterion="last"))


def test_a_recorded_result_cannot_and_says_so(tmp_path):
    folder = save(change(build("Llama"), "bottleneck"), tmp_path / "out")
    with pytest.raises(ValueError, match="quantized with StructureConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=EIGHT_BITS)
