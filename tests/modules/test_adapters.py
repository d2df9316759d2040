"""PEFT's adapters beside packed and sparse linear maps: trained, saved, loaded and taken off as on any model."""

import copy
from functools import cache

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_compress import LRPConfig, compress
from hf_compress.anatomy.parts import is_linear
from hf_compress.modules.compact import CompactLinear
from hf_compress.storage.save import own_memory
from tests.helpers.changes import same
from tests.helpers.language import tiny_llama
from tests.helpers.models import in_dtype

IDS = torch.randint(4, 60, (24, 24), generator=torch.Generator().manual_seed(0))
FORMS = {
    "packed": LRPConfig(bits=7, group_size=8),
    "sparse": LRPConfig(sparsity=0.5),
    "sparse and packed": LRPConfig(sparsity=0.5, bits=6, group_size=8),
    "split": LRPConfig(variant="paper", split=(8, 4), prune=False),
}
TARGETS = {"some": ["q_proj", "v_proj"], "all": "all-linear"}


@cache
def _made(form, dtype):
    return compress(in_dtype(tiny_llama(3), dtype), FORMS[form], IDS)


def made(form, dtype=torch.float32):
    return copy.deepcopy(_made(form, dtype))


@torch.no_grad()
def logits(model):
    return model(IDS[:2]).logits


def trained(model, targets="all-linear"):
    """With adapters, after two steps of which the second reaches all of them."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    own = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(own, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(IDS[:4], labels=IDS[:4]).loss.backward()
        optimizer.step()
    assert all(bool(parameter.grad.any()) for parameter in own)
    return adapted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("targets", TARGETS)
def test_trained_saved_loaded_and_taken_off(form, dtype, targets, tmp_path):
    model = made(form, dtype)
    model.save_pretrained(tmp_path / "model")
    plain, before = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = trained(model, TARGETS[targets])
    bases = [module.get_base_layer() for module in adapted.modules() if hasattr(module, "get_base_layer")]
    assert len(bases) == 3 * (2 if targets == "some" else 7)
    assert all(isinstance(base, CompactLinear) for base in bases)
    own = logits(adapted)
    assert not torch.equal(own, plain)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    own_memory(again)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter")), own)
    model = adapted.unload()
    assert torch.equal(logits(model), plain)
    assert all(same(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_gradients_go_through_to_what_lies_before(form):
    """The embeddings get the gradient that they would get from the same maps, written out."""
    model = made(form)
    dense = copy.deepcopy(model)
    for path, module in model.named_modules():
        if isinstance(module, CompactLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = module.unpacked().detach().clone()
            dense.set_submodule(path, plain)
    for one in (model, dense):
        one(IDS[:4], labels=IDS[:4]).loss.backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_merged_in_silence(form):
    adapted = trained(made(form))
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="size of tensor"):
            copy.deepcopy(adapted).merge_and_unload(safe_merge=safe)
    scaled = get_peft_model(made(form), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="adapters cannot be merged into it; load the model again"):
        logits(scaled.merge_and_unload())


def test_a_linear_map_by_class_is_no_plain_one():
    module = made("packed").model.layers[0].mlp.up_proj
    assert isinstance(module, torch.nn.Linear)
    assert not is_linear(module)
