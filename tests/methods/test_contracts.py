"""What holds for every method: one row in the table buys a method all of these tests.

A plan leaves the model as it was, and is what `compress` carries out; the same seed gives the same; what is saved, or
trained, stopped and resumed, is the same bit for bit; bad input is refused, and a refusal or an interruption leaves
nothing behind; and neither what a caller has switched on nor the state that a model is in changes what comes out.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

import hf_compress as hfc
from hf_compress.anatomy import undo
from hf_compress.calibration.capture import hooked
from hf_compress.errors import CalibrationError
from hf_compress.methods.base.settings import CompressionConfig, method_names
from hf_compress.rewrite.apply import apply
from hf_compress.storage.save import own_memory
from tests.helpers.changes import same
from tests.helpers.language import tiny_llama, word_tokenizer, words
from tests.helpers.models import in_dtype, leftovers, refusing
from tests.helpers.plans import Before
from tests.helpers.runs import arguments, figures, state_of, token_rows

IDS = torch.randint(4, 60, (24, 24), generator=torch.Generator().manual_seed(0))
OPTIONS = hfc.DataOptions(batch_size=6)
TEXTS = [words(12, seed=seed) for seed in range(12)]
ADAPTIVE = {"layers": [1], "updates": 2, "warmup_steps": 1, "decay_steps": 1}


@dataclass(frozen=True)
class Row:
    """A method, as it is set.

    Attributes:
        config: its settings.
        refused: other settings that make no sense, and what is said of them.
        data: whether it needs calibration data.
        samples: with fewer texts than so many it is refused.
    """

    config: CompressionConfig
    refused: tuple[tuple[dict, str], ...] = ()
    data: bool = True
    samples: int = 1


def no_choice(name):
    return {name: "magic"}, f"{name} must be one of .*; got 'magic'"


def no_share(name):
    return {name: 1.5}, f"{name} .*got 1\\.5"


ROWS = {
    "merged": Row(hfc.MKAConfig(num_merges=1), (no_choice("variant"), no_share("ratio")), samples=4),
    "averaged": Row(hfc.MKAConfig(num_merges=1, variant="paper", components=3), (no_choice("similarity"),), samples=4),
    "dropped": Row(hfc.DropBlocksConfig(num_blocks=1), (no_choice("criterion"), no_share("ratio"))),
    "dropped by loss": Row(hfc.DropBlocksConfig(num_blocks=1, criterion="perplexity")),
    "dropped by angle": Row(hfc.DropBlocksConfig(num_blocks=1, criterion="angular")),
    "dropped at random": Row(hfc.DropBlocksConfig(num_blocks=1, criterion="random"), data=False),
    "the last dropped": Row(hfc.DropBlocksConfig(num_blocks=1, criterion="last"), data=False),
    "collapsed": Row(
        hfc.LayerCollapseConfig(num_layers=1), (no_choice("variant"), no_choice("criterion"), no_share("ratio"))
    ),
    "collapsed by loss": Row(hfc.LayerCollapseConfig(num_layers=1, criterion="loss", rank=4)),
    "narrowed": Row(
        hfc.ILLCConfig(gamma=0.5, head_gamma=0.5), (no_choice("variant"), no_choice("target"), no_share("gamma"))
    ),
    "clustered": Row(hfc.ILLCConfig(gamma=0.5, variant="paper"), (no_choice("clustering"),)),
    "sparse": Row(hfc.LRPConfig(sparsity=0.5), (no_choice("variant"), no_choice("score"), no_share("sparsity"))),
    "sparse by relevance": Row(hfc.LRPConfig(sparsity=0.5, score="relevance", granularity="row")),
    "sparse at random": Row(hfc.LRPConfig(sparsity=0.5, score="random")),
    "sparse in few bits": Row(hfc.LRPConfig(sparsity=0.5, bits=7, group_size=8, score="magnitude")),
    "narrow in few bits": Row(hfc.LRPConfig(granularity="neuron", sparsity=0.25, bits=7, group_size=8, score="wanda")),
    "packed": Row(hfc.LRPConfig(bits=7, group_size=8), (no_choice("allocation"), no_share("bits"))),
    "packed by relevance": Row(hfc.LRPConfig(bits=7, group_size=8, allocation="relevance")),
    "split": Row(hfc.LRPConfig(variant="paper", split=(8, 4), prune=False)),
} | {
    variant: Row(hfc.AdaptiveCompressConfig(variant=variant, **ADAPTIVE), (no_choice("mode"),))
    for variant in ("default", "paper", "pca", "linear", "topk", "batchtopk")
}
# One of each method, where a variant would tell no more.
FIRST = list({row.config.method: name for name, row in reversed(ROWS.items())}.values())


def test_every_method_has_its_row():
    assert {row.config.method for row in ROWS.values()} == set(method_names())


@cache
def plain(name):
    """What a method makes of the model in the usual surroundings."""
    return compressed(name, tiny_llama(4)).state_dict()


def compressed(name, model, ids=IDS, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return hfc.compress(model, ROWS[name].config, ids, options=OPTIONS)


def check_same(name, model):
    found, expected = model.state_dict(), plain(name)
    assert list(found) == list(expected)
    assert not [key for key in found if not same(found[key], expected[key])]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_a_plan_changes_nothing_and_is_what_compress_carries_out(name):
    """With another state of the global generator, which is left alone, too."""
    model = tiny_llama(4)
    before, generator = Before.of(model), torch.get_rng_state()
    plan = hfc.make_plan(model, ROWS[name].config, IDS, options=OPTIONS)
    before.check(model)
    assert leftovers(model) == []
    assert not hasattr(model, "compression_report")
    assert torch.equal(torch.get_rng_state(), generator)
    apply(plan, model)
    check_same(name, model)


@pytest.mark.parametrize("name", ["narrowed", "clustered", "sparse", "packed"])
def test_compressed_streams_do_not_go_past_the_last_block(name):
    """Nothing is there to see them."""
    model = tiny_llama(4)
    calls = [0] * 4

    def count(index):
        def counted(*_):
            calls[index] += 1

        return counted

    with hooked(layer.mlp.register_forward_hook(count(index)) for index, layer in enumerate(model.model.layers)):
        hfc.make_plan(model, ROWS[name].config, IDS, options=OPTIONS)
    assert calls[2] - calls[3] == len(IDS) // OPTIONS.batch_size


@pytest.mark.parametrize(
    ("name", "dtype", "tied"),
    [*((name, torch.float32, False) for name in ROWS), *((name, torch.bfloat16, True) for name in FIRST)],
)
def test_the_saved_model_is_the_one_in_memory(name, dtype, tied, tmp_path):
    model = in_dtype(tiny_llama(4, tied=tied), dtype)
    assert compressed(name, model) is model
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {dtype}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "plain")
    hfc.save(model, tmp_path / "checked")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for folder in ("plain", "checked"):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / folder)
        own_memory(loaded)
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert torch.equal(loaded.generate(IDS[:2], **options), model.generate(IDS[:2], **options))
    report = model.compression_report
    assert report.config == ROWS[name].config.to_dict()
    assert hfc.CompressionReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("name", FIRST)
def test_a_run_that_is_stopped_and_resumed_ends_as_without_the_stop(name, tmp_path):
    def trainer(folder, *others):
        settings = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
        callback = hfc.CompressionCallback(ROWS[name].config, IDS)
        args = arguments(tmp_path / folder, **settings)
        return Trainer(tiny_llama(4), args, train_dataset=token_rows(), callbacks=[callback, *others])

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise InterruptedError

    whole, resumed = trainer("whole"), trainer("stopped")
    whole.train()
    with pytest.raises(InterruptedError):
        trainer("stopped", Stop()).train()
    resumed.train(resume_from_checkpoint=True)
    first, second = state_of(whole.model), state_of(resumed.model)
    assert first.keys() == second.keys()
    assert [key for key in first if not same(first[key], second[key])] == []
    assert figures(whole) == figures(resumed)
    assert len(figures(whole)) == 4
    model, report = whole.model.eval(), whole.model.compression_report
    assert report.after.parameters == model.num_parameters()
    assert (report.after.parameters < report.before.parameters) == (name != "default"), "bottlenecks are added"
    whole.save_model(tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    own_memory(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


# --- bad input and interruptions: the model as it was -----------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_settings_that_make_no_sense(name):
    config = ROWS[name].config
    for settings, message in ROWS[name].refused:
        others = {"num_merges": None, "num_blocks": None, "num_layers": None} if "ratio" in settings else {}
        others = {key: value for key, value in others.items() if hasattr(config, key)}
        with pytest.raises(ValueError, match=message):
            replace(config, **others | settings)


BAD_DATA = {
    "none": (None, True, "needs calibration data: pass calibration="),
    "empty": ([], True, "calibration data is empty"),
    "one string": ("a text", True, "not one string"),
    "no tokenizer": (TEXTS, False, "pass tokenizer="),
    "other ids": (torch.full((12, 8), 999), True, "999.*the model knows 0 to 63"),
    "too few": (TEXTS[:3], True, "calibration samples are too few.*at least"),
    "unknown": (object(), True, "cannot be a object"),
}


def refused(model, name, error, message, data=IDS, tokenizer=None, **settings):
    """It says why, and the model is as it was."""
    with refusing(model, error, message):
        hfc.compress(model, replace(ROWS[name].config, **settings), data, tokenizer, OPTIONS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, kind in product(ROWS, BAD_DATA)
        if ROWS[name].data and (kind != "too few" or ROWS[name].samples > 3)
    ],
)
def test_bad_data(name, kind):
    data, tokenized, message = BAD_DATA[kind]
    tokenizer = word_tokenizer(add_special=False) if tokenized else None
    refused(tiny_llama(4), name, CalibrationError, f"(?s){message}", data, tokenizer)


@pytest.mark.parametrize("name", ROWS)
def test_models_that_are_not_as_they_should_be(name):
    refused(
        tiny_llama(4), name, ValueError, "no residual stack 'model.h'; this model has model.layers", stack="model.h"
    )
    model = tiny_llama(4)
    model.model.layers[2].self_attn.o_proj.weight.data[0, 0] = float("inf")
    refused(model, name, ValueError, r"model\.layers\.2\.self_attn\.o_proj\.weight holds NaN or infinity")
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(hfc.UnsupportedModelError, match=r"such as model\.embed_tokens\.weight, are on the meta device"):
        hfc.compress(empty, ROWS[name].config, IDS)


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].data])
def test_activations_that_are_not_finite(name):
    """Of weights that are: the stream overflows in the second block."""
    model = tiny_llama(4)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    refused(model, name, ValueError, "NaN or infinit")


@pytest.mark.parametrize("aside", [False, True], ids=["", "old weights set aside"])
@pytest.mark.parametrize("name", ROWS)
def test_an_interruption_leaves_the_model_as_it_was(name, aside, monkeypatch):
    """At the beginning, in the middle, and at the end, when the change is checked: wherever a module is called."""
    if aside:
        monkeypatch.setattr(undo, "_LARGE", 1)
    model, calls, limit = tiny_llama(4), 0, float("inf")

    def count(*_):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt

    handle = register_module_forward_pre_hook(count)
    try:
        compressed(name, tiny_llama(4))
        total = calls
        before = Before.of(model)
        for share in (0.02, 0.5, 0.9, 0.999):
            calls, limit = 0, int(total * share)
            with pytest.raises(KeyboardInterrupt):
                compressed(name, model)
            before.check(model)
            assert leftovers(model) == []
            assert not hasattr(model, "compression_report")
    finally:
        handle.remove()


# --- what is around it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_where_old_weights_are_set_aside(name, monkeypatch):
    put = []
    monkeypatch.setattr(undo, "_LARGE", 1)
    own = undo.Undo.set_aside

    def counted(self, used, elsewhere):
        own(self, used, lambda tensor: put.append(tensor) or elsewhere(tensor))

    monkeypatch.setattr(undo.Undo, "set_aside", counted)
    model = compressed(name, tiny_llama(4))
    check_same(name, model)
    by_blocks = "merged", "averaged", "narrow", "cluster", "sparse", "packed", "split"
    assert bool(put) == name.startswith(by_blocks)
    elsewhere = [key for key, tensor in model.state_dict().items() if tensor.untyped_storage().filename]
    assert not elsewhere, "only old ones"


@pytest.mark.parametrize("name", ROWS)
def test_whatever_the_caller_has_switched_on(name, tmp_path):
    model = tiny_llama(4)
    with ExitStack() as around:
        around.callback(torch.set_default_dtype, torch.float32)
        torch.set_default_dtype(torch.bfloat16)
        for one in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
            around.enter_context(one)
        with torch.device("meta"):
            compressed(name, model, IDS.clone())
        assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        hfc.save(model, tmp_path / "saved")
    check_same(name, model)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    own_memory(loaded)
    for one in (model, loaded):
        one(IDS[:2]).logits.sum().backward()
        assert one.lm_head.weight.grad is not None


@pytest.mark.parametrize("name", ROWS)
def test_whatever_state_the_model_is_in(name):
    model = tiny_llama(4).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 3.0) if number % 3 == 0 else None
        parameter.requires_grad_(number % 2 == 0)
    own = {id(parameter): (number, parameter) for number, parameter in enumerate(model.parameters())}
    compressed(name, model)
    check_same(name, model)
    assert model.training
    assert model.is_gradient_checkpointing
    for path, parameter in model.named_parameters():
        if id(parameter) in own:
            number, _ = own[id(parameter)]
            assert parameter.requires_grad == (number % 2 == 0), path
            assert (parameter.grad is not None) == (number % 3 == 0), path
            assert parameter.grad is None or bool((parameter.grad == 3).all()), path


@pytest.mark.parametrize("name", ROWS)
def test_all_that_transformers_collects_is_what_the_loaded_model_gives(name, tmp_path):
    asked = {"output_hidden_states": True, "output_attentions": True}
    model = tiny_llama(4)
    model.set_attn_implementation("eager")
    model(IDS, **asked)  # puts hooks that collect on the blocks, and for good
    compressed(name, model)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    own_memory(loaded)
    twin = copy.deepcopy(model)
    expected = loaded(IDS, **asked)
    for one in (model, twin, model):
        given = one(IDS, **asked)
        for what in ("hidden_states", "attentions"):
            assert len(given[what]) == len(expected[what]) == model.config.num_hidden_layers + (what[0] == "h")
            assert all(torch.equal(a, b) for a, b in zip(given[what], expected[what], strict=True)), what
