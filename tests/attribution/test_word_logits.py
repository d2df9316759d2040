"""Of words no more logits are made than are explained; relevance is the same, bit for bit, as by all of them."""

from dataclasses import replace
from functools import wraps

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import is_linear
from hf_compress.attribution import passes, scores
from hf_compress.attribution.composites import resolve
from hf_compress.attribution.rules import Share
from hf_compress.attribution.scores import relevance_sums_by_blocks
from hf_compress.attribution.targets import explained_words
from hf_compress.attribution.word_logits import HeadLogits
from hf_compress.calibration.data import Batch, DataOptions, prepare
from hf_compress.errors import CalibrationError
from tests.helpers.tiny import tiny_model

IDS = torch.randint(8, 90, (4, 7), generator=torch.Generator().manual_seed(1))
BATCHES = 2
MASK = (torch.arange(7) < torch.tensor([7, 4, 2, 7])[:, None]).long()


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)).eval()


def sums(model, target="label", composite="attnlrp"):
    """Σ |R| of all linear maps of the blocks."""
    stack = Anatomy(model).stack()
    inside = {f"{stack.path}.{path}": m for path, m in stack.blocks.named_modules() if is_linear(m)}
    batches = prepare({"input_ids": IDS, "attention_mask": MASK}, model, None, DataOptions(batch_size=2)).batches
    found = {}
    for part in relevance_sums_by_blocks(model, stack, batches, inside, target=target, composite=composite):
        found |= part.absolute
    assert len(found) == len(inside)
    return found


def by_all(model, target="label", **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_plain_head", lambda _: None)
        return sums(model, target, **settings)


def counting(model):
    """Calls of the head, as they come."""
    head, calls = model.get_output_embeddings(), []
    own = head.forward
    vars(head)["forward"] = lambda given: calls.append(given.shape) or own(given)
    return calls


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(values, expected[path]) for path, values in found.items())
    assert any(values.any() for values in found.values())


@pytest.mark.parametrize("target", ["label", "predicted", 5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "t5", "phi", "mixtral"])
def test_relevance_is_the_same_as_by_all_logits(name, target):
    """Heads with a bias (Phi), capped (Gemma 2) and scaled (Cohere) logits, an encoder-decoder."""
    model = tiny_t5() if name == "t5" else tiny_model(name)
    calls = counting(model)
    found = sums(model, target)
    checks = len(calls)  # whether the rules cover the model is told by all logits
    same(found, by_all(model, target))
    assert len(calls) == 2 * checks + BATCHES
    assert calls[-1][:2] == (2, 7)


def test_of_a_model_in_half_precision():
    model = tiny_model("llama").bfloat16()
    same(sums(model), by_all(model))


def hooked(model):
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: 2 * output)
    return "attnlrp"


def ruled(model):
    return replace(resolve("attnlrp"), linear=Share(1.0))


def writing(model, write):
    own = model.forward

    @wraps(own)  # by its signature it is known what the model takes
    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        write(output.logits)
        return output

    vars(model)["forward"] = forward
    return "attnlrp"


def doubles_its_logits(model):
    return writing(model, lambda logits: logits.mul_(2))


def never_says_some_words(model):
    """As Chameleon never says what stands for images."""

    def write(logits):
        logits[:, :, 8:50] = torch.finfo(logits.dtype).min

    return writing(model, write)


@pytest.mark.filterwarnings("ignore:Use of index_put_ on expanded tensors")
@pytest.mark.parametrize("change", [hooked, ruled, doubles_its_logits, never_says_some_words])
def test_a_head_that_is_not_plain_makes_all_of_them(change, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(scores, "check_conserved", lambda *_: None)  # there is no rule for some of these
    calls = counting(model)
    composite = change(model)
    found = sums(model, composite=composite)
    made = len(calls)
    same(found, by_all(model, composite=composite))
    assert len(calls) == 2 * made


def test_logits_that_are_not_finite(monkeypatch):
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(3e38)
    model.lm_head.weight.data.fill_(3e38)
    monkeypatch.setattr(scores, "check_conserved", lambda *_: None)  # which would find them before
    with pytest.raises(CalibrationError, match="gives NaN or infinite"):
        sums(model)


def test_a_sum_of_logits_is_no_number_of_float16():
    """Of 64 logits of 2,000 each."""
    model = tiny_model("llama").half()
    read = torch.zeros(2, 65, 64, dtype=torch.float16)
    read[:, :, 0] = 2000
    model.lm_head.weight.data[:, 0] = 1
    batch = Batch({"input_ids": torch.randint(8, 90, (2, 65))}, None)
    values, _ = explained_words(model, HeadLogits(read, model.lm_head), batch, "label")
    assert values.tolist() == [128_000, 128_000]
