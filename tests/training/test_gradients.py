"""The terms' gradients, in one step of several micro-batches as in one batch: against differences and a slow oracle."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, Trainer

from hf_compress import CompressionCallback, DropBlocksConfig, LayerCollapseConfig, compress
from hf_compress.training.objective import item_weight, shifts_labels
from tests.helpers.language import WORDS, tiny_llama
from tests.helpers.marks import only_quick
from tests.helpers.runs import CALIBRATION, Gradients, arguments, dense_rows, tiny_dense, token_rows
from tests.helpers.tiny import tiny_seq2seq_model

ALPHA = 0.3
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(kind, labels):
    torch.manual_seed(0)
    config = BertConfig(**BERT, vocab_size=len(WORDS), num_labels=labels, initializer_range=0.4)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return kind(config).eval()


def bert_rows(labels):
    rows = token_rows(ignored=True)
    return [row | {"labels": torch.where(row["labels"] < 0, -100, row["labels"] % labels)} for row in rows]


CASES = {
    "causal": (lambda: tiny_llama(3), lambda: token_rows(ignored=True)),
    "masked": (lambda: bert(BertForMaskedLM, len(WORDS)), lambda: bert_rows(len(WORDS))),
    "tokens": (lambda: bert(BertForTokenClassification, 3), lambda: bert_rows(3)),
    "dense": (tiny_dense, dense_rows),
}


def paper(lc):
    return LayerCollapseConfig(variant="paper", alpha_init=ALPHA, lc=lc)


def first_step(case, folder, micro_batches, config, teacher=None, share=0.5):
    """The gradients of one optimizer step over all 16 rows."""
    model, rows = CASES[case][0](), CASES[case][1]()
    calibration = CALIBRATION if case == "causal" else None  # for the means of its gates
    callback = CompressionCallback(config, calibration, teacher=teacher, teacher_share=share)
    watch = Gradients(callback)
    settings = {"per_device_train_batch_size": 16 // micro_batches, "gradient_accumulation_steps": micro_batches}
    args = arguments(folder, max_steps=1, **settings)
    Trainer(model, args, train_dataset=rows, callbacks=[callback, watch]).train()
    return watch


@pytest.mark.parametrize("micro_batches", only_quick([1, 4], 4))
@pytest.mark.parametrize("case", only_quick(CASES, "causal", "dense"))
def test_the_penalty_is_itself_whatever_the_micro_batches(case, micro_batches, tmp_path):
    with_it, without = (first_step(case, tmp_path, micro_batches, paper(lc)) for lc in (0.7, 0.0))
    assert without.alphas.abs().max() > 1e-4  # the model's own loss reaches α too
    assert torch.allclose(with_it.alphas - without.alphas, torch.tensor(-2 * 0.7 * (1 - ALPHA)), atol=1e-5)
    assert with_it.weights.keys() == without.weights.keys()
    assert not any("alpha" in name for name in with_it.weights)
    assert all(torch.allclose(with_it.weights[n], without.weights[n], atol=1e-6) for n in without.weights)


@pytest.mark.parametrize("case", ["causal", "dense"])
def test_own_gradients_of_alpha_are_those_of_the_whole_batch(case, tmp_path):
    one, four = (first_step(case, tmp_path, number, paper(1.0)) for number in (1, 4))
    assert torch.allclose(one.alphas, four.alphas, atol=1e-5)


def counted_places(case, row):
    if case == "dense":
        return [True]
    labels = row["labels"].tolist()
    return [label != -100 for label in ([*labels[1:], -100] if case == "causal" else labels)]


def divergence(case, model, teacher):
    """The gradient of KL(teacher ‖ model), the mean over all counted places of all rows, place by place."""
    total, places = torch.zeros(()), 0
    for row in CASES[case][1]():
        inputs = {name: value[None] for name, value in row.items() if name != "labels"}
        own, other = (F.log_softmax(one(**inputs).logits[0], -1) for one in (model, teacher))
        own, other = own.view(-1, own.shape[-1]), other.detach().view(-1, own.shape[-1])
        for place, counts in enumerate(counted_places(case, row)):
            if counts:
                total = total + (other[place].exp() * (other[place] - own[place])).sum()
                places += 1
    (total / places).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batches", only_quick([1, 4], 4))
@pytest.mark.parametrize("case", only_quick(CASES, "causal", "dense"))
def test_the_teachers_term_is_the_mean_over_the_whole_step(case, micro_batches, tmp_path):
    """With shares of 1/4 and 3/4, three times the second step's gradient less the first's is twice the term's own."""
    config = DropBlocksConfig(num_blocks=1, criterion="last")
    teacher = CASES[case][0]()
    quarter, most = (first_step(case, tmp_path, micro_batches, config, teacher, share) for share in (0.25, 0.75))
    expected = divergence(case, compress(CASES[case][0](), config), teacher)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    for name, gradient in expected.items():
        found = (3 * most.weights[name] - quarter.weights[name]) / 2
        assert torch.allclose(found, gradient, atol=1e-5 + 1e-4 * gradient.abs().max()), name


def test_all_of_a_causal_step_is_the_same(tmp_path):
    """The model's own loss, its teacher's term and the penalty together."""
    one, four = (first_step("causal", tmp_path, n, paper(1.0), tiny_llama(3)) for n in (1, 4))
    assert one.weights.keys() == four.weights.keys()
    assert all(torch.allclose(one.weights[name], four.weights[name], atol=1e-5) for name in one.weights)
    assert torch.allclose(one.alphas, four.alphas, atol=1e-5)


def test_shares_of_micro_batches():
    """Counted by hand: shifted for causal models alone, 1 where the Trainer gives no number of items."""
    labels = torch.tensor([[5, -100, 6, 7], [-100, 8, -100, 9]])
    llama, tagger, t5 = tiny_llama(1), bert(BertForTokenClassification, 3), tiny_seq2seq_model("t5")
    assert [shifts_labels(model) for model in (llama, tagger, t5)] == [True, False, False]
    assert item_weight(llama, {"labels": labels, "num_items_in_batch": 8}).item() == 4 / 8
    assert item_weight(tagger, {"labels": labels, "num_items_in_batch": torch.tensor(10)}).item() == 5 / 10
    assert item_weight(t5, {"labels": labels, "num_items_in_batch": 10}).item() == 5 / 10
    shifted = {"labels": labels, "shift_labels": labels[:1], "num_items_in_batch": 6}
    assert item_weight(llama, shifted).item() == 3 / 6
    assert item_weight(llama, {"labels": labels}).item() == 1
    assert item_weight(llama, {"num_items_in_batch": 8}).item() == 1
