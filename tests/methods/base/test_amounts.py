"""How much a method takes out: in one word for all, in each one's own, and never in two."""

from dataclasses import fields

import pytest
import torch

from hf_compress.api.compress import compress
from hf_compress.calibration.data import DataOptions
from hf_compress.methods.base.amounts import Amount
from hf_compress.methods.base.settings import CompressionConfig, config_class, method_names
from tests.helpers.tiny import tiny_model

SHAPES = {name: one.shape for name, one in tiny_model("llama").state_dict().items()}
METHODS = {name: config_class(name) for name in method_names()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_ratio_and_keeps_it_as_given(method: str) -> None:
    config = METHODS[method](ratio=0.3)
    assert config.amount == Amount("ratio", 0.3)
    assert CompressionConfig.from_dict(config.to_dict()) == config
    assert {name: value for name, value in config.to_dict().items() if name == "ratio"} == {"ratio": 0.3}
    words = [field.name for field in fields(config) if field.metadata.get("group") == "amount"]
    assert len(words) > 1
    assert all(config.to_dict()[word] is None for word in words if word != "ratio")


def test_a_ratio_is_what_the_papers_words_leave() -> None:
    for share in (0.1, 0.3, 0.7, 0.9):
        rest = round(1 - share, 1)
        assert METHODS["illc"](ratio=share).kept == METHODS["illc"](gamma=rest).kept == rest
        assert METHODS["adaptive_compress"](ratio=share).kept == rest
        assert METHODS["adaptive_compress"](retention_final=rest).kept == rest
        assert METHODS["lrp"](ratio=share).removed == METHODS["lrp"](sparsity=share).removed == share
    assert METHODS["illc"](head_gamma=0.5).kept == METHODS["illc"](width=3).kept == 1
    assert METHODS["adaptive_compress"]().kept == 0.95


@pytest.mark.parametrize(
    ("method", "ratio", "word"),
    [
        ("adaptive_compress", 0.5, {"retention_final": 0.5}),
        ("drop_blocks", 0.5, {"num_blocks": 2}),
        ("illc", 0.25, {"gamma": 0.75}),
        ("layer_collapse", 0.5, {"num_layers": 2}),
        ("lrp", 0.25, {"sparsity": 0.25}),
        ("mka", 0.5, {"num_merges": 2}),
    ],
)
def test_the_model_is_the_same_in_either_word(method: str, ratio: float, word: dict[str, float]) -> None:
    ids = torch.randint(4, 90, (32, 12), generator=torch.Generator().manual_seed(7))
    first, second = (
        compress(tiny_model("llama"), METHODS[method](**amount), ids, options=DataOptions(batch_size=8)).state_dict()
        for amount in ({"ratio": ratio}, word)
    )
    assert first.keys() == second.keys()
    assert {name: one.shape for name, one in first.items()} != SHAPES
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("method", "word", "message"),
    [
        ("mka", "gamma", "mka has no setting 'gamma' (say how much by ratio= or num_merges=); it has ratio, "),
        ("mka", "num_layers", "(say how much by ratio= or num_merges=)"),
        ("drop_blocks", "sparsity", "(say how much by ratio= or num_blocks=)"),
        ("illc", "retention_final", "(say how much by gamma= or width= or ratio=)"),
        ("lrp", "gamma", "(say how much by sparsity= or ratio=)"),
        ("adaptive_compress", "width", "(say how much by retention_final= or ratio=)"),
        ("mka", "variannt", "mka has no setting 'variannt' (did you mean 'variant'?); it has ratio, "),
        ("mka", "zeal", "mka has no setting 'zeal'; it has ratio, "),
    ],
)
def test_a_word_of_another_method(method: str, word: str, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        METHODS[method](**{"ratio": 0.5, word: 0.5})
    assert message in str(caught.value)
    if word not in ("variannt", "zeal"):  # which may be a newer version's
        with pytest.raises(TypeError) as caught:
            CompressionConfig.from_dict({"method": method, "ratio": 0.5, word: 0.5})
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("total", "ratio", "expected"),
    [(12, 0.25, 3), (12, 0.5, 6), (4, 0.01, 1), (10, 0.25, 3), (6, 0.25, 2), (24, 0.1, 2), (2, 0.5, 1), (32, 0.9, 29)],
)
def test_a_ratio_is_rounded_to_the_nearest_number_of_blocks(total: int, ratio: float, expected: int) -> None:
    assert Amount("ratio", ratio).of_blocks(total) == Amount("ratio", ratio).of(total) == expected


@pytest.mark.parametrize(
    ("total", "amount"), [(4, Amount("sparsity", 0.95)), (4, Amount("num", 4)), (1, Amount("ratio", 0.5))]
)
def test_some_block_must_be_left(total: int, amount: Amount) -> None:
    asked = f"{amount.word}={amount.value}"
    with pytest.raises(ValueError, match=f"{asked} takes . of {total} blocks and leaves none; at most {total - 1} can"):
        amount.of_blocks(total)
