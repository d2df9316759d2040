"""Packed linear maps that the kernel computes: what they give and hold, what they refuse, and what of a model stays."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_compress as hfc
from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.modules import kernels
from hf_compress.modules.compact import kept_dense
from hf_compress.modules.kernels import KernelLinear
from hf_compress.modules.packed import MixedPrecisionLinear, pack
from hf_compress.numerics import four_bit
from hf_compress.numerics.four_bit import digits_of
from tests.helpers.allocated import most_allocated
from tests.helpers.models import in_dtype

IDS = torch.randint(4, 60, (12, 8), generator=torch.Generator().manual_seed(5))
REMEDY = "can be neither saved, changed nor explained: load the model again for that"
KINDS = {  # (bits of every group, or the fewest and the most; symmetric; inputs; bias)
    "four bits": (4, 4, True, 96, False),
    "a mixture": (2, 8, True, 96, True),
    "with zeros": (1, 8, False, 96, False),
    "a row filled up": (2, 8, True, 70, True),
    "a row filled up, with zeros": (1, 4, False, 65, False),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(kind="a mixture", group_size=32, outputs=19):
    """A packed map in bfloat16."""
    fewest, most, symmetric, inputs, bias = KINDS[kind]
    shape, generator = (outputs, -(-inputs // group_size)), torch.Generator().manual_seed(1)
    bits = torch.randint(fewest, most + 1, shape, generator=generator)
    packing, tensors = pack(random(outputs, inputs), bits, group_size, symmetric)
    layer = MixedPrecisionLinear(packing, bias, inputs)
    layer.load_state_dict(tensors | ({"bias": random(outputs, seed=2)} if bias else {}))
    return layer.bfloat16()


def kernel(layer):
    return KernelLinear(layer, digits_of(*layer.multiples()))


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits.float()


@pytest.fixture(scope="module")
def compressed():
    """A Llama in bfloat16 with packed maps, some of their rows filled up; not to be changed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 60}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=48, pad_token_id=0))
    model = in_dtype(model, torch.bfloat16)
    return hfc.compress(model, hfc.LRPConfig(bits=4.5, group_size=32), IDS)


@pytest.fixture
def model(compressed):
    """One of its own, with the kernel."""
    own = copy.deepcopy(compressed)
    assert len(hfc.use_kernels(own)) == 14
    return own


# --- a map ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (40,), (70,), (2, 80), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [True, False], ids=["an order that is known", "another"])
def test_it_gives_what_the_packed_map_gives(kind, shape, known, monkeypatch):
    monkeypatch.setattr(kernels, "can_write_out", lambda outputs: known)
    layer = packed(kind)
    x = random(*shape, layer.in_features, seed=3).bfloat16()
    with torch.no_grad():
        got, before = kernel(layer)(x), layer(x)
    assert got.dtype == before.dtype
    assert got.shape == before.shape == (*shape, 19)
    exact = x.double() @ layer.unpacked().double().T + (0 if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(got.double(), exact, rtol=2**-6, atol=0.1)
    if x.numel() > 1000:
        assert (got - exact).norm() <= 2.5 * (before - exact).norm()


@pytest.mark.parametrize("known", [True, False], ids=["an order that is known", "another"])
@pytest.mark.parametrize("rows", [3, 70])
def test_a_matrix_that_is_kept_is_made_once(rows, known, monkeypatch):
    monkeypatch.setattr(kernels, "can_write_out", lambda outputs: known)
    layer, x = kernel(packed()), random(rows, 96, seed=3).bfloat16()
    made = []
    monkeypatch.setattr(
        KernelLinear, "_dense", lambda self, dtype, own=KernelLinear._dense: made.append(1) or own(self, dtype)
    )
    with torch.no_grad(), kept_dense(layer):
        got = [layer(x) for _ in range(3)]
    assert len(made) == (1 if known and rows > 64 else 0)
    with torch.no_grad():
        torch.testing.assert_close(got[0], layer(x), rtol=2**-6, atol=0.1)
        torch.testing.assert_close(layer.dense(torch.bfloat16), packed().dense(torch.bfloat16), rtol=2**-6, atol=0.02)


@pytest.mark.parametrize("kept", [True, False], ids=["a matrix", "a product"])
def test_columns_are_written_into_their_place(kept, monkeypatch):
    monkeypatch.setattr(four_bit, "_CACHED", 2**13)
    one, x = kernel(packed(outputs=1024)), random(512, 96, seed=3).bfloat16()
    if not one.can_write_out:
        pytest.skip("how this processor's kernel lays digits is not known")
    made = (lambda: one.dense(torch.bfloat16)) if kept else (lambda: one(x))
    with torch.no_grad():
        result = made()
        most = most_allocated(made)
    assert result.nbytes <= most <= 1.5 * result.nbytes


def test_the_packed_map_stays_what_it_was():
    layer, other = packed(), packed()
    one = kernel(layer)
    assert one.bias is layer.bias
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(("kind", "bits"), [("four bits", 4.5), ("with zeros", 9), ("a mixture", 9)])
def test_the_memory_is_that_of_digits_and_of_two_numbers_a_group(kind, bits, monkeypatch):
    monkeypatch.setitem(KINDS, kind, (*KINDS[kind][:3], 128, False))
    one = kernel(packed(kind, 64, outputs=32))
    held = sum(buffer.numel() * buffer.element_size() for buffer in one.buffers())
    assert 8 * held / (32 * 128) == bits
    assert one.packed_weights == 32 * 128


def test_its_text_tells_the_digits():
    assert repr(kernel(packed("four bits"))) == "KernelLinear(in_features=96, out_features=19, digits=1)"
    assert "digits=2" in repr(kernel(packed()))


def test_gradients_through_it_are_refused():
    one = kernel(packed())
    x = random(3, one.in_features).bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="not implemented"):
        one(x).sum().backward()


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_goes_on_as_before(compressed, model):
    before, after = logits(compressed), logits(model)
    assert (after - before).norm() <= 0.05 * before.norm()
    assert not torch.equal(after, before)
    assert parameter_count(model) == parameter_count(compressed)
    assert model.num_parameters() == compressed.num_parameters()
    exact = logits(copy.deepcopy(compressed).float())
    assert (after - exact).norm() <= 2.5 * (before - exact).norm()


def test_all_packed_maps_and_no_others_are_replaced(compressed):
    model = copy.deepcopy(compressed).train()
    model.model.layers[1].eval()
    modes = {path: part.training for path, part in model.named_modules()}
    packed_paths = [path for path, part in model.named_modules() if isinstance(part, MixedPrecisionLinear)]
    assert hfc.use_kernels(model) == packed_paths
    kinds = {path: type(part) for path, part in model.named_modules()}
    assert [path for path, kind in kinds.items() if kind is KernelLinear] == packed_paths
    assert MixedPrecisionLinear not in kinds.values()
    assert {path: part.training for path, part in model.named_modules()} == modes
    assert hfc.use_kernels(model) == []


def test_it_generates(model):
    got = model.generate(IDS[:2], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(got[:, :8], IDS[:2])
    with torch.inference_mode():  # without a cache
        again = model(got[:, :-1], use_cache=False).logits[:, 7:].float()
    chosen = again.gather(2, got[:, 8:, None])[..., 0]
    assert bool((chosen >= again.amax(-1) - 0.1 * again.std()).all())


def test_a_copy_computes_the_same(model):
    copied = copy.deepcopy(model)
    expected = logits(model)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
    assert torch.equal(logits(copied), expected)


def test_a_cast_of_the_model_is_no_obstacle(compressed, model):
    torch.testing.assert_close(logits(model.float()), logits(copy.deepcopy(compressed).float()), rtol=0.01, atol=0.01)


def test_saving_is_refused_and_leaves_nothing(model, tmp_path):
    path = next(path for path, part in model.named_modules() if isinstance(part, KernelLinear))
    for action in (
        lambda: model.state_dict(),
        lambda: model.save_pretrained(tmp_path / "plain"),
        lambda: hfc.save(model, tmp_path / "ours" / "model"),
        lambda: hfc.save_compressed_tensors(model, tmp_path / "ours" / "model"),
        lambda: hfc.compress(model, hfc.LRPConfig(bits=4), IDS),
        lambda: hfc.relevance(model, {"input_ids": IDS}),
    ):
        with pytest.raises(UnsupportedModelError, match=f"^{path} is in a form for this processor alone, .*{REMEDY}$"):
            action()
    assert not any(tmp_path.glob("plain/*.safetensors"))
    assert list(tmp_path.glob("ours/*")) == list(tmp_path.glob("ours/.*")) == []
    assert logits(model).isfinite().all()


# --- what is left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_refused(compressed, dtype):
    model = copy.deepcopy(compressed).to(dtype)
    before, parts = logits(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"in bfloat16 on a CPU alone, and the model is in {dtype} on cpu"):
        hfc.use_kernels(model)
    assert dict(model.named_modules()) == parts
    assert torch.equal(logits(model), before)


def test_matrices_are_kept_where_there_is_room(compressed):
    model, other = copy.deepcopy(compressed), copy.deepcopy(compressed)
    long = torch.randint(4, 60, (2, 40), generator=torch.Generator().manual_seed(6))
    made = []
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        own = KernelLinear._dense
        patch.setattr(KernelLinear, "_dense", lambda self, dtype: made.append(self) or own(self, dtype))
        paths = hfc.use_kernels(model, room=2**20)
        first, second = (model(long).logits.float() for _ in range(2))
        assert len(made) == len(paths) == 14
        assert torch.equal(first, second)
        hfc.use_kernels(other, room=1)  # for none
        torch.testing.assert_close(other(long).logits.float(), first, rtol=0.05, atol=0.1)
    again = copy.deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(again(long).logits.float(), first)
    with pytest.raises(ValueError, match="room"):
        hfc.use_kernels(model, room=-1)


def test_a_warning_tells_of_maps_that_the_kernel_cannot_do_with(caplog):
    narrow, fitting = packed(group_size=16), packed()
    model = nn.Sequential(narrow, fitting, nn.Linear(2, 2).bfloat16())
    with caplog.at_level(logging.WARNING, logger="hf_compress.modules.kernels"):
        assert hfc.use_kernels(model) == ["1"]
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "1 of 2 packed linear maps go on without the kernel"
    ]
    assert model[0] is narrow


def test_a_model_without_packed_maps(caplog):
    with caplog.at_level(logging.WARNING):
        assert hfc.use_kernels(nn.Sequential(nn.Linear(2, 2))) == []
    assert not caplog.records


def test_a_map_at_two_paths_stays_one():
    model = nn.Module()
    model.a = model.b = packed()
    assert hfc.use_kernels(model) == ["a", "b"]
    assert model.a is model.b
    assert isinstance(model.a, KernelLinear)


def test_what_is_asked_of_a_weight():
    """T5 casts what a map reads to the dtype of its weight, unless that is int8."""
    assert kernel(packed()).weight.dtype == torch.int8


def test_a_file_takes_what_it_would_without(compressed, model):
    assert stored_bytes(model) == stored_bytes(compressed)
