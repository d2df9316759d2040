"""MKA (https://arxiv.org/abs/2406.16330): the paper's merging, written slowly from its equations, against the plan.

Outputs of every block are pooled over each sample's tokens, embedded, and compared (S); the most similar neighbours
(l, m) become one block with theta = alpha theta_l + (1 - alpha) theta_m, alpha = S_lm, over all parameters.
"""

import copy

import pytest
import torch
from transformers import Gemma3ForCausalLM

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import plan_for
from hf_compress.methods.mka import MKAConfig
from hf_compress.numerics.manifold import embed
from hf_compress.numerics.similarity import similarity_matrix
from hf_compress.plan.edits import MergeBlocks
from tests.helpers.changes import Trace
from tests.helpers.tiny import tiny_model

EMBEDDED = {"components": 3, "neighbors": 2}


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def pooled_outputs(model, calibration):
    """Mean output of every block over each sample's real tokens, the sample run by itself."""
    pooled = [[] for _ in blocks_of(model)]
    for batch in calibration:
        masks = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
        for row, mask, real in zip(batch.inputs["input_ids"], masks, batch.real, strict=True):
            handles = []
            for index, block in enumerate(blocks_of(model)):

                def keep(_, __, output, index=index, real=real):
                    stream = output if isinstance(output, torch.Tensor) else output[0]
                    kept = [stream[0, position].double() for position in range(stream.shape[1]) if real[position]]
                    pooled[index].append(sum(kept) / len(kept))

                handles.append(block.register_forward_hook(keep))
            with torch.no_grad():
                model(row[mask.bool()].long()[None])
            for handle in handles:
                handle.remove()
    return [torch.stack(rows) for rows in pooled]


def similarity(model, calibration, config):
    pooled = pooled_outputs(model, calibration)
    if config.similarity != "information":
        return similarity_matrix(pooled, config.similarity)
    embedded = [embed(states, config.manifold, config.components) for states in pooled]
    return similarity_matrix(embedded, "information", neighbors=config.neighbors)


def kind(model, block):
    """What may not be mixed here: parameters' shapes, and the window of the attention."""
    attention = getattr(block, "self_attn", None)
    shapes = [(name, parameter.shape) for name, parameter in block.named_parameters()]
    return shapes, getattr(attention, "is_sliding", None), getattr(attention, "layer_type", None)


def merge(model, pair, alpha):
    """Average the blocks `pair` and `pair` + 1 of `model`, and take the second out, by hand."""
    blocks = blocks_of(model)
    first, second = blocks[pair], blocks[pair + 1]
    with torch.no_grad():
        for (name, theta_l), (other, theta_m) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            assert name == other
            theta_l.copy_(alpha * theta_l.double() + (1 - alpha) * theta_m.double())
    kept = [block for block in blocks if block is not second]
    del blocks[len(kept) :]
    for index, block in enumerate(kept):
        blocks[index] = block
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        del model.config.layer_types[pair + 1]


def slow_merging(model, calibration, config, merges, threshold=None):
    """(the merged model, [(blocks, similarity, alpha)])"""
    model = copy.deepcopy(model)
    groups = [[index] for index in range(len(blocks_of(model)))]
    history = []
    matrix = None
    while len(history) < merges:
        if matrix is None or config.iterative:
            matrix = similarity(model, calibration, config)
        kinds = [kind(model, block) for block in blocks_of(model)]
        candidates = {}
        for index in range(len(groups) - 1):
            if kinds[index] != kinds[index + 1]:
                continue
            # Measured once: of what were neighbours at the start, the last of one group and the first of the next.
            rows = (index, index + 1) if config.iterative else (groups[index][-1], groups[index + 1][0])
            candidates[index] = matrix[rows].item()
        pair = max(candidates, key=lambda index: candidates[index])
        if threshold is not None and candidates[pair] < threshold:
            break
        alpha = candidates[pair] if config.alpha is None else config.alpha
        history.append((groups[pair] + groups[pair + 1], candidates[pair], alpha))
        merge(model, pair, alpha)
        groups[pair] += groups.pop(pair + 1)
    return model, history


def check(model, calibration, config, merges, threshold=None):
    expected, history = slow_merging(model, calibration, config, merges, threshold)
    before = Trace.of(model)
    plan = plan_for(config, CalibrationContext(model, calibration))
    assert before.difference(model) is None
    assert [entry["blocks"] for entry in plan.notes["merges"]] == [blocks for blocks, _, _ in history]
    for name, values in zip(("similarity", "alpha"), zip(*[entry[1:] for entry in history], strict=True), strict=True):
        assert [entry[name] for entry in plan.notes["merges"]] == pytest.approx(values, abs=1e-5)
    path = Anatomy(model).stack().path
    gone = {index for blocks, _, _ in history for index in blocks[1:]}
    assert plan.removed(path) == tuple(sorted(gone))
    assert all(isinstance(edit, MergeBlocks) for edit in plan.edits)
    kept = [index for index in range(len(blocks_of(model))) if index not in gone]
    merged = [edit.kept for edit in plan.edits]
    for place, index in enumerate(kept):
        for name, parameter in blocks_of(expected)[place].named_parameters():
            full = f"{path}.{index}.{name}"
            assert (full in plan.tensors) == (index in merged)
            actual = plan.tensors.get(full, dict(model.named_parameters())[full])
            torch.testing.assert_close(actual, parameter, atol=1e-6, rtol=1e-5)
    return plan


@pytest.mark.parametrize("iterative", [True, False])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3}, {"similarity": "cka"}, {"similarity": "cosine", "alpha": 0.5}])
def test_merging(model, calibration, iterative, options):
    config = MKAConfig(num_merges=3, variant="paper", iterative=iterative, **EMBEDDED, **options)
    plan = check(model, calibration, config, 3)
    matrix = torch.tensor(plan.notes["similarity"], dtype=torch.float64)
    torch.testing.assert_close(matrix, similarity(model, calibration, config), atol=1e-5, rtol=1e-4)


def test_other_manifolds(model, calibration):
    for manifold in ("pca", "none"):
        check(model, calibration, MKAConfig(num_merges=1, variant="paper", manifold=manifold, **EMBEDDED), 1)


def test_norms_and_biases_are_averaged_too(ids):
    """GPT-2 has all of them."""
    model = tiny_model("gpt2")
    calibration = prepare(ids, model, None, DataOptions(batch_size=4))
    plan = check(model, calibration, MKAConfig(num_merges=1, variant="paper", alpha=0.25, **EMBEDDED), 1)
    (edit,) = plan.edits
    names = {name.partition(f"h.{edit.kept}.")[2] for name in plan.tensors}
    assert {"ln_1.weight", "ln_1.bias", "attn.c_attn.bias", "mlp.c_proj.bias", "mlp.c_fc.weight"} <= names
    assert names == {name for name, _ in model.transformer.h[0].named_parameters()}


def test_the_earlier_block_has_the_weight_alpha(model, calibration):
    weights = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
    for alpha, offset in ((1.0, 0), (0.0, 1)):
        plan = plan_for(
            MKAConfig(num_merges=1, variant="paper", alpha=alpha, **EMBEDDED), CalibrationContext(model, calibration)
        )
        (edit,) = plan.edits
        assert torch.equal(plan.tensors[f"model.layers.{edit.kept}.mlp.up_proj.weight"], weights[edit.kept + offset])


def test_only_blocks_of_one_kind_are_merged(ids):
    """Gemma-3 with the windows s s f s f f: of five pairs of neighbours two may be merged, and then another."""
    config = tiny_model("gemma3_text").config
    config.num_hidden_layers = 6
    s, f = "sliding_attention", "full_attention"
    config.layer_types = [s, s, f, s, f, f]
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    calibration = prepare(ids, model, None)
    plan = check(model, calibration, MKAConfig(num_merges=2, variant="paper", alpha=0.5, **EMBEDDED), 2)
    assert sorted(entry["blocks"] for entry in plan.notes["merges"]) == [[0, 1], [4, 5]]
    with pytest.raises(ValueError, match=r"no two neighbouring blocks of the 4 in model\.layers are of one kind"):
        plan_for(MKAConfig(num_merges=3, variant="paper", **EMBEDDED), CalibrationContext(model, calibration))
    everything = plan_for(MKAConfig(threshold=0.0, variant="paper", **EMBEDDED), CalibrationContext(model, calibration))
    assert everything.removed("model.layers") == (1, 5)


def test_dense_blocks_and_mixtures_are_not_merged(ids):
    model = tiny_model("qwen3_moe")
    assert len({type(layer.mlp) for layer in model.model.layers[:2]}) == 2, "or this model shows nothing"
    context = CalibrationContext(model, prepare(ids, model, None))
    with pytest.raises(ValueError, match="are of one kind"):
        plan_for(MKAConfig(num_merges=1, variant="paper", **EMBEDDED), context)


def test_experts_and_routers_are_averaged_too(ids):
    model = tiny_model("mixtral")
    calibration = prepare(ids, model, None, DataOptions(batch_size=12))
    plan = check(model, calibration, MKAConfig(num_merges=1, variant="paper", **EMBEDDED), 1)
    assert any(tensor.ndim == 3 for tensor in plan.tensors.values())


def test_merging_stops_at_the_threshold(model, calibration):
    config = MKAConfig(num_merges=4, variant="paper", **EMBEDDED)
    _, history = slow_merging(model, calibration, config, 4)
    values = [value for _, value, _ in history]
    limit = (values[0] + min(values)) / 2
    expected = next(i for i, value in enumerate(values) if value < limit)
    bounded = MKAConfig(threshold=limit, variant="paper", **EMBEDDED)
    assert 0 < expected < 4
    plan = check(model, calibration, bounded, 4, threshold=limit)
    assert len(plan.notes["merges"]) == expected
    nothing = plan_for(MKAConfig(threshold=1.0, variant="paper", **EMBEDDED), CalibrationContext(model, calibration))
    assert nothing.edits == ()
    assert nothing.tensors == {}


def test_a_threshold_of_zero_leaves_one_block_and_a_single_block_is_refused(model, calibration, make_llama):
    plan = plan_for(MKAConfig(threshold=0.0, variant="paper", **EMBEDDED), CalibrationContext(model, calibration))
    assert plan.removed("model.layers") == (1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"no two neighbouring blocks of the 1 in model\.layers"):
        plan_for(
            MKAConfig(threshold=0.0, variant="paper", **EMBEDDED), CalibrationContext(make_llama(layers=1), calibration)
        )


def test_block_influence_as_a_similarity(model, calibration):
    """A block that turns the stream little is like the one before it."""
    from hf_compress.calibration.statistics import block_statistics

    influence = block_statistics(model, Anatomy(model).stack(), calibration).influence
    config = MKAConfig(num_merges=1, variant="paper", similarity="block_influence", alpha=0.5)
    plan = plan_for(config, CalibrationContext(model, calibration))
    least = min(range(1, 5), key=lambda index: influence[index].item())
    assert plan.removed("model.layers") == (least,)
    assert plan.notes["merges"][0]["similarity"] == pytest.approx(1 - influence[least].item(), abs=1e-6)


@pytest.mark.parametrize("similarity_value", [-0.4, 1.0])
def test_a_weight_is_a_share(model, calibration, monkeypatch, similarity_value):
    import hf_compress.methods.mka.average as average

    matrix = torch.full((5, 5), similarity_value, dtype=torch.float64)
    monkeypatch.setattr(average, "block_similarity", lambda *_: matrix)
    plan = plan_for(MKAConfig(num_merges=1, variant="paper"), CalibrationContext(model, calibration))
    assert plan.notes["merges"][0]["alpha"] == max(0.0, similarity_value)


def test_measured_once_a_fused_block_is_to_each_side_what_stood_there(model, calibration, monkeypatch):
    """0 and 1 become one; its likeness to 2 is that of 1 and 2, to be compared with that of 2 and 3."""
    import hf_compress.methods.mka.average as average

    neighbours = {(0, 1): 0.9, (1, 2): 0.5, (2, 3): 0.4, (3, 4): 0.3}
    matrix = torch.full((5, 5), 0.1, dtype=torch.float64).fill_diagonal_(1.0)
    for (first, second), value in neighbours.items():
        matrix[first, second] = matrix[second, first] = value
    monkeypatch.setattr(average, "block_similarity", lambda *_: matrix)
    plan = plan_for(MKAConfig(num_merges=3, variant="paper", iterative=False), CalibrationContext(model, calibration))
    merges = [(entry["blocks"], entry["similarity"]) for entry in plan.notes["merges"]]
    assert merges == [([0, 1], 0.9), ([0, 1, 2], 0.5), ([0, 1, 2, 3], 0.4)]
    assert torch.equal(torch.tensor(plan.notes["similarity"], dtype=torch.float64), matrix)
