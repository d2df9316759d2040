"""Statistics of blocks against slow loops over real tokens alone."""

import math
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_compress.calibration.statistics as module
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Calibration, DataOptions, prepare
from hf_compress.calibration.marks import Marks
from hf_compress.calibration.memory import WorkingMemory
from hf_compress.calibration.statistics import Earlier, block_statistics, pool
from hf_compress.errors import CalibrationError
from hf_compress.numerics.aside import Spare
from hf_compress.rewrite.blocks import remove_blocks
from tests.helpers.ffns import hooked
from tests.helpers.language import WORDS
from tests.helpers.models import leftovers
from tests.helpers.tiny import tiny_base_model, tiny_model, tiny_seq2seq_model


def token_streams(model, stack, ids):
    """The stream of one unpadded sample before the first block and after every block, [depth][position]."""
    seen = []
    hooks = [stack.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _, __, output: seen.append(output)) for block in stack.blocks]
    with torch.no_grad(), hooked(*hooks):
        model(torch.tensor([ids]))
    return [stream[0].double() for stream in seen]


@pytest.fixture
def samples(model, stack, texts):
    """Per text: streams and the positions between `<s>` and `</s>`."""
    bos, eos = WORDS.index("<s>"), WORDS.index("</s>")
    rows = [[bos, *(WORDS.index(word) for word in text.split()), eos] for text in texts]
    return [(token_streams(model, stack, row), range(1, len(row) - 1)) for row in rows]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_states_are_of_real_tokens_alone(model, stack, calibration, samples, pooling):
    pooled = block_statistics(model, stack, calibration, pooling).pooled
    assert len(pooled) == len(stack)
    for block, states in enumerate(pooled):
        assert states.shape == (12, model.config.hidden_size)
        assert states.dtype == torch.float32
        for row, (streams, positions) in zip(states, samples, strict=True):
            stream = streams[block + 1]
            mean = sum(stream[position] for position in positions) / len(positions)
            expected = mean if pooling == "mean" else stream[positions[-1]]
            torch.testing.assert_close(row.double(), expected, atol=1e-5, rtol=1e-4)


def angle(first, second):
    cosine = sum(a * b for a, b in zip(first.tolist(), second.tolist(), strict=True))
    cosine /= math.sqrt(sum(a * a for a in first.tolist())) * math.sqrt(sum(b * b for b in second.tolist()))
    return cosine, math.acos(max(-1.0, min(1.0, cosine))) / math.pi


def test_block_influence_is_one_minus_the_mean_cosine(model, stack, calibration, samples):
    influence = block_statistics(model, stack, calibration).influence
    for block in range(len(stack)):
        values = [1 - angle(s[block][p], s[block + 1][p])[0] for s, positions in samples for p in positions]
        assert influence[block].item() == pytest.approx(sum(values) / len(values), abs=1e-6)


@pytest.mark.parametrize("span", [1, 2, 4, 5])
def test_change_is_the_mean_angle_over_a_span(model, stack, calibration, samples, span):
    change = block_statistics(model, stack, calibration, span=span).change
    assert change.shape == (len(stack) - span + 1,)
    for start in range(len(change)):
        values = [angle(s[start][p], s[start + span][p])[1] for s, positions in samples for p in positions]
        assert change[start].item() == pytest.approx(sum(values) / len(values), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_statistics_do_not_depend_on_the_batch_size(model, stack, framing_tokenizer, texts, calibration, batch_size):
    one = block_statistics(model, stack, calibration)
    other = block_statistics(model, stack, prepare(texts, model, framing_tokenizer, DataOptions(batch_size=batch_size)))
    torch.testing.assert_close(torch.stack(other.pooled), torch.stack(one.pooled), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.influence, one.influence, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(other.change, one.change, atol=1e-6, rtol=1e-4)


def test_padding_on_either_side_is_no_matter():
    """What stands at masked positions never enters, and samples with no real token give no row."""
    stream = torch.arange(24.0).reshape(3, 4, 2)
    real = torch.tensor([[True, True, False, False], [False, False, True, True], [False] * 4])
    expected = torch.stack([stream[0, :2].mean(dim=0), stream[1, 2:].mean(dim=0)])
    assert torch.equal(pool(stream, real, "mean"), expected)
    assert torch.equal(pool(stream, real, "last"), torch.stack([stream[0, 1], stream[1, 3]]))


def last_states(model, stack, **inputs):
    """What the last block gives."""
    seen = []
    with torch.no_grad(), hooked(stack.blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output))):
        model(**inputs)
    return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


def test_every_position_of_a_picture_counts():
    model = tiny_base_model("vit")
    stack, size = Anatomy(model).stack(), model.config.image_size
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    pooled = block_statistics(model, stack, prepare(images, model, None, DataOptions(batch_size=2))).pooled
    expected = last_states(model, stack, pixel_values=images).mean(dim=1)
    torch.testing.assert_close(pooled[-1], expected, atol=1e-5, rtol=1e-4)


def test_a_decoder_is_pooled_over_the_tokens_it_was_given(ids):
    """Position 0 holds the start token, and position i the token i - 1."""
    model = tiny_seq2seq_model("t5")
    stack = Anatomy(model).stack("decoder")
    shifted = torch.cat([torch.full((12, 1), model.config.decoder_start_token_id), ids[:, :-1]], dim=1)
    pooled = block_statistics(model, stack, prepare(ids, model, None)).pooled
    expected = last_states(model, stack, input_ids=ids, decoder_input_ids=shifted)[:, 1:].mean(dim=1)
    torch.testing.assert_close(pooled[-1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_block(model, stack, calibration, value):
    with torch.no_grad():
        stack.blocks[3].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(CalibrationError, match=r"block model\.layers\.3 gives NaN or infinite activations"):
        block_statistics(model, stack, calibration)
    assert leftovers(model) == []


def test_a_stream_a_batch_is_held_and_no_more(model, stack, calibration, monkeypatch):
    """However many blocks there are; for angles over two blocks, two."""
    alive: list[weakref.ref] = []
    held: list[int] = []
    own = module._Collector.add

    def counting(self, index, passed):
        own(self, index, passed)
        alive.append(weakref.ref(passed.after))
        held.append(sum(ref() is not None for ref in alive))

    monkeypatch.setattr(module._Collector, "add", counting)
    many = Calibration([*calibration.batches] * 5)
    statistics = block_statistics(model, stack, many, span=2)
    assert len(held) == len(stack) * len(many)
    assert max(held) <= 2 * len(many) + 1
    assert all(states.numel() == many.samples * model.config.hidden_size for states in statistics.pooled)
    assert all(states.untyped_storage().nbytes() == states.numel() * 4 for states in statistics.pooled)


# --- passes after merges ----------------------------------------------------------------------------------------------


def llama(layers):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 60}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, initializer_range=0.3, **sizes)).eval()


def blocks_run(stack, run):
    """The blocks that run meanwhile, by their numbers, and what comes of it."""
    ran = set()
    hooks = [block.register_forward_hook(lambda *_, index=i: ran.add(index)) for i, block in enumerate(stack.blocks)]
    with hooked(*hooks):
        return run(), ran


def alike(one, other):
    return (
        all(torch.equal(*pair) for pair in zip(one.pooled, other.pooled, strict=True))
        and torch.equal(one.influence, other.influence)
        and torch.equal(one.change, other.change)
    )


@pytest.mark.parametrize(
    ("build", "merges", "begin"),
    [
        (lambda: llama(6), (4, 2, 2, 0), (4, 2, 2, 0)),
        (lambda: llama(20), (17, 10, 4, 4), (15, 9, 3, 3)),
        (lambda: tiny_model("gemma2"), (2, 1), (2, 1)),
        (lambda: tiny_model("olmoe"), (2, 0), (2, 0)),
        (lambda: tiny_base_model("deberta-v2"), (2, 1), (2, 1)),
    ],
    ids=["every block", "every third block", "two kinds of masks", "experts", "states beside the stream"],
)
def test_a_pass_after_a_merge_begins_where_that_was(build, merges, begin):
    model = build()
    stack = Anatomy(model).stack()
    ids = torch.randint(3, 60, (7, 9), generator=torch.Generator().manual_seed(3))
    calibration, earlier = prepare(ids, model, None, DataOptions(batch_size=3)), Earlier()
    assert alike(
        block_statistics(model, stack, calibration, earlier=earlier), block_statistics(model, stack, calibration)
    )
    with Undo() as undo:
        for merged, start in zip(merges, begin, strict=True):
            for parameter in stack.blocks[merged].parameters():
                parameter.data *= 0.7
            remove_blocks(model, stack, [merged + 1], undo)
            earlier.merged(merged)
            found, ran = blocks_run(stack, lambda: block_statistics(model, stack, calibration, earlier=earlier))
            assert ran == set(range(start, len(stack)))
            assert alike(found, block_statistics(model, stack, calibration))


def test_a_pass_after_a_merge_of_an_encoder_decoder():
    """T5's first block gives all others its position bias."""
    model = tiny_seq2seq_model("t5")
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(3))
    calibration = prepare(ids, model, None, DataOptions(batch_size=2))
    for path in ("encoder.block", "decoder.block"):
        stack, earlier = Anatomy(model).stack(path), Earlier()
        block_statistics(model, stack, calibration, earlier=earlier)
        with Undo() as undo:
            remove_blocks(model, stack, [len(stack) - 1], undo)
            earlier.merged(len(stack) - 1)
            again = block_statistics(model, stack, calibration, earlier=earlier)
            assert alike(again, block_statistics(model, stack, calibration))


def test_a_pass_after_a_merge_of_blocks_that_add_to_their_stream_in_place():
    model = llama(6)
    stack, earlier = Anatomy(model).stack(), Earlier()
    calibration = prepare(torch.arange(3, 39).view(4, 9), model, None, DataOptions(batch_size=2))
    for block in stack.blocks:
        own = block.forward
        block.forward = lambda hidden, *args, own=own, **kwargs: own(hidden.add_(0.5), *args, **kwargs)
    with Undo() as undo:
        block_statistics(model, stack, calibration, earlier=earlier)
        for merged in (3, 3, 2):
            remove_blocks(model, stack, [merged + 1], undo)
            earlier.merged(merged)
            again = block_statistics(model, stack, calibration, earlier=earlier)
            assert alike(again, block_statistics(model, stack, calibration))


@pytest.mark.parametrize(
    ("streams", "start"), [(6, 3), (3, 2), (2, 1), (1, 0), (0, 0)], ids=["all", "to 2", "to 1", "the first", "none"]
)
@pytest.mark.parametrize("told", [True, False], ids=["seen before", "told half-way"])
def test_a_pass_after_a_merge_begins_as_late_as_there_was_room_for(streams, start, told, monkeypatch):
    """A depth is kept whole, or not at all; and without room for the first stream it comes from the model again."""
    model, data = llama(6), torch.arange(3, 39).view(4, 9)
    stack, calibration = Anatomy(model).stack(), prepare(data, model, None, DataOptions(batch_size=2))
    one = 2 * 9 * model.config.hidden_size * 4
    spare, puts = Spare((2 * streams + 1) * one), []
    monkeypatch.setattr(WorkingMemory, "spare", lambda memory: spare)
    own = spare.put
    monkeypatch.setattr(spare, "put", lambda tensor: puts.append(None) or own(tensor))
    if not told:
        fits = spare.fits
        monkeypatch.setattr(spare, "fits", lambda size: size > one or fits(size))
    with Undo() as undo:
        earlier = Earlier()
        block_statistics(model, stack, calibration, earlier=earlier)
        assert len(puts) == 2 * streams or not told, "nothing is written in vain"
        for merged, begin in ((3, start), (1, min(1, start))):
            remove_blocks(model, stack, [merged + 1], undo)
            earlier.merged(merged)
            found, ran = blocks_run(stack, lambda: block_statistics(model, stack, calibration, earlier=earlier))
            assert ran == set(range(begin, len(stack)))
            assert alike(found, block_statistics(model, stack, calibration))
    assert all(runner._waiting is None for runner in earlier.sweep.runners), "no forward waits for ever"


def test_marks_are_where_all_processes_have_them(monkeypatch):
    """One had room for fewer depths; one has no batch at all."""
    marks, stream = Marks(), torch.zeros(1, 2, 3)
    for index in range(4):
        marks.keep(index, 6, 0, 1, stream)
    monkeypatch.setattr("hf_compress.calibration.marks.told", lambda depths: [depths, [0, 1, 3], None])
    marks.changed(2, 1)
    assert marks.start == 1
    assert marks.at_start(0) is not None
    idle = Marks()
    monkeypatch.setattr("hf_compress.calibration.marks.told", lambda depths: [[0, 1, 2, 3], [0, 1, 3], depths])
    idle.changed(2, 0)
    assert idle.start == 1
