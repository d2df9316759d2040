"""Models with adapters, or with what is left of them: refused with a remedy, and the remedy works."""

import copy
import re

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.anatomy.adapters import check_no_adapters
from tests.helpers.language import tiny_llama
from tests.helpers.runs import Snapshot, same, state_of

IDS = torch.randint(4, 60, (16, 12), generator=torch.Generator().manual_seed(7))
DROP = hfc.DropBlocksConfig(num_blocks=1, criterion="last")
KINDS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "lora and a head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def advice(model):
    """The code that the error tells to run."""
    with pytest.raises(TypeError, match="in a wrapper of PEFT's") as refused:
        check_no_adapters(model)
    return re.search("`(.*)`", str(refused.value))[1]


@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_stay_when_adapters_are_deleted(kind, tmp_path):
    model = tiny_llama(3)
    untouched = copy.deepcopy(model)
    model.add_adapter(KINDS[kind])
    model.delete_adapter("default")
    before = Snapshot(model)
    for attempt in (
        lambda: hfc.compress(model, DROP),
        lambda: hfc.make_plan(model, DROP),
        lambda: hfc.analyze(model, IDS),
        lambda: hfc.heal(model, untouched, IDS),
        lambda: hfc.save(model, tmp_path / "out"),
        lambda: hfc.save_compressed_tensors(model, tmp_path / "out"),
    ):
        with pytest.raises(TypeError, match=r"proj is in a wrapper of PEFT's \(\w+\).*put the layers back by"):
            attempt()
        assert before.matches(model)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2 if "head" in kind else 1):  # one for each kind of wrapper
        exec(advice(model), {"model": model})
    assert same(state_of(untouched), state_of(model))
    hfc.compress(model, DROP)
    hfc.save(model, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_that_were_added_can_be_merged_first(kind):
    model = tiny_llama(3)
    model.add_adapter(KINDS[kind])
    wanted = logits(model)
    with pytest.raises(TypeError, match=r"carries adapters \(default\).*call merge\(\).*delete_adapter\('default'\)"):
        hfc.compress(model, DROP)
    for part in model.modules():
        if hasattr(part, "base_layer"):
            part.merge()
    model.delete_adapter("default")
    exec(advice(model), {"model": model})
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    hfc.compress(model, DROP)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_peft_model_must_be_merged_first(kind, tmp_path):
    wrapped = get_peft_model(tiny_llama(3), KINDS[kind])
    for attempt in (hfc.compress, lambda model, _: hfc.save(model, tmp_path / "out")):
        for model in (wrapped, wrapped.base_model):
            with pytest.raises(TypeError, match=r"PeftModel: call model\.merge_and_unload\(\) and take"):
                attempt(model, DROP)
        with pytest.raises(TypeError, match=r"carries adapters \(default\).*merge_and_unload\(\) of its PeftModel"):
            attempt(wrapped.get_base_model(), DROP)
    assert len(hfc.compress(wrapped.merge_and_unload(), DROP).model.layers) == 2
    assert len(hfc.compress(get_peft_model(tiny_llama(3), KINDS[kind]).unload(), DROP).model.layers) == 2


def test_learned_prompts_cannot_be_merged():
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    wrapped = get_peft_model(tiny_llama(3), prompts)
    with pytest.raises(TypeError, match=r"learned prompts .* cannot be merged: take model\.get_base_model\(\)"):
        hfc.compress(wrapped, DROP)
    hfc.compress(wrapped.get_base_model(), DROP)
