"""Sparse linear maps against the dense ones that they stand for, and against every bit of a mask read by itself."""

import pytest
import torch
from torch.nn import functional

from hf_compress.errors import PlanError
from hf_compress.modules.packed import MixedPrecisionLinear, Packing, pack
from hf_compress.modules.sparse import SparseLinear, pack_mask, pack_row, row_length
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import pack_linear, sparsify_linear
from hf_compress.rewrite.edits.packed import SparsifyLinear
from tests.helpers.models import refusing, saved_and_loaded
from tests.helpers.round_trip import build, inputs, logits

OUTPUTS, INPUTS = 5, 13  # 65 weights: neither a mask of whole bytes nor groups of whole rows
SIZES = [(5, 13), (1, 1), (3, 8), (7, 3), (16, 16), (1, 65)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(outputs, inputs, share=0.4, seed=1):
    """A mask with at least one weight that stays."""
    mask = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < share
    mask[-1, -1] = True
    return mask


def parts_of(values, mask, rest):
    return [values[mask], values[~mask]] if rest else [values[mask]]


def counts_of(mask, rest):
    return [len(part) for part in parts_of(mask, mask, rest)]


def dense(values, mask, rest):
    return values if rest else values * mask


def row_layer(values, bits, symmetric=True, gram=None):
    """Packed by rows, in groups of 8 of which the last may have to be filled up."""
    packing, tensors = pack(values, bits, 8, symmetric, gram)
    layer = MixedPrecisionLinear(packing, False, values.shape[1])
    layer.load_state_dict(tensors)
    return layer


def sparse(values, mask, rest=False, bias=None, bits=None, group_size=8, symmetric=True):
    """The layer that stores these weights; `bits` of every group, or one number for all."""
    parts, packing = parts_of(values, mask, rest), None
    tensors = {"mask": pack_mask(mask), "weight": torch.cat(parts)}
    if bits is not None:
        groups = row_length(len(parts[0]), len(parts[1]) if rest else 0, group_size) // group_size
        bits = torch.full((groups,), bits) if isinstance(bits, int) else bits
        packing, packed = pack_row(parts, bits, group_size, symmetric)
        tensors |= packed
    outputs, inputs = values.shape
    layer = SparseLinear(inputs, outputs, len(parts[0]), bias is not None, packing, rest)
    layer.load_state_dict(tensors | ({} if bias is None else {"bias": bias}))
    return layer


def bytes_in(module):
    """Of all that is stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


@pytest.mark.parametrize("shape", SIZES)
def test_a_mask_is_stored_bit_by_bit(shape):
    """Row by row, the first bit of a byte the lowest, the last byte filled up with zeros."""
    for share in (0.0, 0.5, 1.0):
        mask = some(*shape, share=share)
        packed = pack_mask(mask)
        assert packed.dtype == torch.uint8
        expected = [0] * -(-mask.numel() // 8)
        for place, one in enumerate(mask.flatten().tolist()):
            expected[place // 8] += one << (place % 8)
        assert packed.tolist() == expected


def test_a_transposed_mask_is_read_by_rows():
    mask = some(5, 13)
    assert torch.equal(pack_mask(mask.T), pack_mask(mask.T.contiguous()))


# --- as a linear map --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("shape", SIZES)
def test_it_is_the_masked_matrix(shape, rest):
    values, mask, bias = normal(*shape), some(*shape), normal(shape[0], seed=2)
    for share in (0.4, 1.0):
        mask = some(*shape, share=share)
        layer, x = sparse(values, mask, rest, bias), normal(2, 3, shape[1], seed=3)
        expected = dense(values, mask, rest)
        assert torch.equal(layer.unpacked(), expected)
        assert torch.equal(layer(x), functional.linear(x, expected, bias))
        assert layer.weight.shape == ((values.numel(),) if rest else (int(mask.sum()),))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_model_casts_what_is_not_packed(dtype, bits):
    values, mask = normal(OUTPUTS, INPUTS), some(OUTPUTS, INPUTS)
    layer = sparse(values, mask, bias=normal(OUTPUTS), bits=bits)
    before = layer.unpacked()
    layer.to(dtype)
    assert torch.equal(layer.unpacked(), before if bits else before.to(dtype))
    x = normal(4, INPUTS, seed=3).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), functional.linear(x, before.to(dtype), normal(OUTPUTS).to(dtype)))


@pytest.mark.parametrize("rest", [False, True])
def test_gradients_are_those_of_the_weights_stored(rest):
    values, mask, x = normal(OUTPUTS, INPUTS), some(OUTPUTS, INPUTS), normal(4, INPUTS, seed=3)
    layer, upstream = sparse(values, mask, rest, bias=normal(OUTPUTS)), normal(4, OUTPUTS, seed=4)
    given = x.clone().requires_grad_()
    (layer(given) * upstream).sum().backward()
    slope = upstream.T @ x
    torch.testing.assert_close(layer.weight.grad, torch.cat(parts_of(slope, mask, rest)))
    torch.testing.assert_close(given.grad, upstream @ dense(values, mask, rest))
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_training_keeps_zeros_zero():
    values, mask = normal(OUTPUTS, INPUTS), some(OUTPUTS, INPUTS)
    layer = sparse(values, mask)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(3):
        layer(normal(4, INPUTS, seed=seed)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = layer.unpacked().detach()
    assert torch.equal(after[~mask], torch.zeros(int((~mask).sum())))
    assert bool((after[mask] != values[mask]).all())


# --- packed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("shape", SIZES)
def test_packed_values_are_those_of_rows_packed_apart(shape, rest, symmetric):
    """Each kind is a row of its own, filled up with zeros: what one holds does not move the other's."""
    values = normal(*shape)
    mask = some(*shape)
    layer = sparse(values, mask, rest, bits=4, symmetric=symmetric)
    expected = torch.zeros(shape)
    for where, kept in ((mask, True), (~mask, rest)):
        if not kept or not where.any():
            continue
        row = values[where][None]
        expected[where] = row_layer(row, torch.full((1, -(-row.shape[1] // 8)), 4), symmetric).unpacked()[0]
    assert torch.equal(layer.unpacked(), expected)
    x = normal(3, shape[1], seed=3)
    assert torch.equal(layer(x), functional.linear(x, expected))
    assert [name for name, _ in layer.named_parameters()] == []


def test_both_kinds_get_bits_of_their_own():
    values, mask = normal(16, 16), some(16, 16)
    first, second = -(-int(mask.sum()) // 8), -(-int((~mask).sum()) // 8)
    bits = torch.tensor([8] * first + [3] * second)
    layer = sparse(values, mask, rest=True, bits=bits)
    gaps = (layer.unpacked() - values).abs()
    assert float(gaps[mask].max()) < 0.05 < float(gaps[~mask].max())
    assert layer.bits.tolist() == bits.tolist()
    assert layer.packing.planes == (first + second,) * 3 + (first,) * 5


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("shape", SIZES)
def test_bytes_are_the_mask_and_what_is_kept(shape, rest):
    mask = some(*shape)
    count = mask.numel() if rest else int(mask.sum())
    mask_bytes, halves = (mask.numel() + 7) // 8, sparse(normal(*shape), mask, rest, normal(shape[0])).half()
    assert bytes_in(sparse(normal(*shape), mask, rest)) == mask_bytes + 4 * count
    assert bytes_in(halves) == mask_bytes + 2 * (count + shape[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("group_size", [8, 16, 64])
def test_packed_bytes_are_bits_of_whole_groups_and_a_few_a_group(group_size, rest, symmetric):
    mask = some(OUTPUTS, INPUTS)
    counts = counts_of(mask, rest)
    groups = sum((count + group_size - 1) // group_size for count in counts)
    bits = torch.arange(groups) % 5 + 2
    layer = sparse(normal(OUTPUTS, INPUTS), mask, rest, bits=bits, group_size=group_size, symmetric=symmetric)
    expected = (65 + 7) // 8 + int(bits.sum()) * group_size // 8 + groups * (2 + 1 + (0 if symmetric else 1))
    assert bytes_in(layer) == expected


def test_its_text_tells_the_share():
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:2, :4] = True
    assert "in_features=8, out_features=4, ones=25.0%, rest=False" in repr(sparse(normal(4, 8), mask))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("rest", [False, True])
def test_it_comes_back_from_its_state_dict(rest, bits):
    """Made anew, and on meta, as Transformers makes it."""
    layer = sparse(normal(OUTPUTS, INPUTS), some(OUTPUTS, INPUTS), rest, normal(OUTPUTS), bits, symmetric=False)
    packing = layer.packing if bits else None
    again = SparseLinear(INPUTS, OUTPUTS, layer.kept, True, packing, rest)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.unpacked(), layer.unpacked())
    empty = SparseLinear(INPUTS, OUTPUTS, layer.kept, True, packing, rest, device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = normal(2, INPUTS, seed=3)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(
    ("name", "path"), [("Llama", "model.layers.1.mlp.down_proj"), ("GPT-2", "transformer.h.1.attn.c_attn")]
)
def test_a_draft_stores_the_same_map_in_a_model(name, path, rest, bits, tmp_path):
    """Of either layout of a weight; GPT-2's has a bias."""
    model, other = build(name), build(name)
    weight = model.get_submodule(path).weight.detach()
    weight = weight if name == "Llama" else weight.T
    mask = some(*weight.shape)
    given = torch.randint(2, 9, (sum(-(-count // 16) for count in counts_of(mask, rest)),)) if bits else None
    apply(sparsify_linear(model, path, mask, None, given, 16, rest=rest), model)
    module = model.get_submodule(path)
    assert type(module) is SparseLinear
    stored = module.unpacked().detach()
    torch.testing.assert_close(stored, dense(weight, mask, rest), atol=0.15 if bits else 0, rtol=0)
    with torch.no_grad():
        other.get_submodule(path).weight.copy_(stored if name == "Llama" else stored.T)
    torch.testing.assert_close(logits(model), logits(other))
    saved_and_loaded(model, tmp_path / "out", inputs(model))


def test_a_draft_takes_other_values():
    model, path = build("Llama"), "model.layers.1.mlp.down_proj"
    mask, values = some(32, 64), normal(32, 64)
    apply(sparsify_linear(model, path, mask, values), model)
    assert torch.equal(model.get_submodule(path).unpacked(), values * mask)


# --- rows filled up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_filled_up_to_whole_groups(symmetric):
    """What fills them up is 0, which every grid has; so it is as if the row ended there."""
    values, bits = normal(3, 21), torch.randint(2, 9, (3, 3), generator=torch.Generator().manual_seed(2))
    layer, longer = row_layer(values, bits, symmetric), row_layer(functional.pad(values, (0, 3)), bits, symmetric)
    assert (layer.packing, layer.packing.inputs) == (longer.packing, 24)
    assert all(torch.equal(tensor, longer.state_dict()[name]) for name, tensor in layer.state_dict().items())
    assert layer.unpacked().shape == (3, 21)
    torch.testing.assert_close(layer.unpacked(), values, atol=1.5, rtol=0)
    x = normal(2, 21, seed=5)
    assert torch.equal(layer(x), functional.linear(x, layer.unpacked()))
    assert (layer.in_features, layer.out_features) == (21, 3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gram_makes_up_for_errors_also_where_rows_are_filled_up(symmetric):
    x = normal(100, 5, seed=3) @ normal(5, 21, seed=4) + 0.1 * normal(100, 21, seed=5)
    values, bits, gaps = normal(6, 21), torch.full((6, 3), 3), []
    for gram in (None, x.T @ x):
        gaps.append(float((row_layer(values, bits, symmetric, gram)(x) - x @ values.T).square().sum()))
    assert gaps[1] < 0.6 * gaps[0]


def test_a_packed_map_of_odd_width_comes_back_from_files(tmp_path):
    """BERT's 32 inputs in groups of 24."""
    model, path = build("BERT"), "bert.encoder.layer.1.attention.self.query"
    apply(pack_linear(model, path, torch.full((32, 2), 5), 24), model)
    assert type(model.get_submodule(path)) is MixedPrecisionLinear
    saved_and_loaded(model, tmp_path / "out", inputs(model))


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "packing", "rest", "message"),
    [
        (0, None, False, "kept is 0; expected 1 to the number of weights, 65"),
        (66, None, False, "kept is 66; expected 1 to the number of weights, 65"),
        (-1, None, True, "kept is -1"),
        (20, Packing(1, 16, 8, (2, 2)), False, "1 × 16 values does not hold 20 and 0 in a row"),
        (20, Packing(1, 32, 8, (4, 4)), False, "1 × 32 values does not hold 20 and 0 in a row"),
        (20, Packing(1, 24, 8, (3, 3)), True, "1 × 24 values does not hold 20 and 45 in a row"),
        (20, Packing(1, 64, 8, (8, 8)), True, "1 × 64 values does not hold 20 and 45 in a row"),
        (20, Packing(3, 8, 8, (3, 3)), False, "3 × 8 values does not hold 20 and 0 in a row"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kept, packing, rest, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear(INPUTS, OUTPUTS, kept, False, packing, rest)


PATH = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (SparsifyLinear(PATH, 2049), "down_proj: kept is 2049; expected 1 to .* 2048"),
        (SparsifyLinear(PATH, 64, (2, 2)), "down_proj: planes must .* the first all 1"),
        (SparsifyLinear(PATH, 64, (1, 1), 12), "down_proj: group_size must be a multiple"),
        (SparsifyLinear(PATH, 64, (1,)), "1 bit would have no positive value"),
        (SparsifyLinear(PATH, 64), "down_proj"),  # without its tensors
        (SparsifyLinear("model.layers.1.input_layernorm", 5), "input_layernorm"),
    ],
)
def test_an_edit_that_does_not_fit_the_model_leaves_it_alone(edit, message):
    model = build("Llama")
    with refusing(model, PlanError, message):
        apply(Plan((edit,)), model)


def test_then_takes_a_map_as_the_first_plan_leaves_it():
    """`+` would refuse two values for one tensor; `then` takes the later one, and keeps all edits and notes."""
    first = Plan((SparsifyLinear("a", 1),), {"a.weight": normal(2), "a.bias": normal(1)}, {"first": 1, "both": 1})
    second = Plan((SparsifyLinear("b", 2),), {"a.weight": normal(3), "b.weight": normal(4)}, {"both": 2})
    both = first.then(second)
    assert both.edits == first.edits + second.edits
    assert {name: tensor.shape[0] for name, tensor in both.tensors.items()} == {
        "a.bias": 1,
        "a.weight": 3,
        "b.weight": 4,
    }
    assert both.notes == {"first": 1, "both": 2}
    assert first.tensors["a.weight"].shape == (2,), "the plans themselves are as they were"
    assert Plan().then(second).tensors.keys() == second.tensors.keys()
    with pytest.raises(PlanError, match=r"both plans give values for \['a\.weight'\]"):
        first + second
