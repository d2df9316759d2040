"""New scores in an old card: what people have written there stays."""

from dataclasses import replace

import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_compress.evaluation.classification import Classification
from hf_compress.evaluation.size import parameter_count
from hf_compress.report.card import model_card
from hf_compress.report.card_facts import CardDetails
from hf_compress.report.card_update import with_scores
from tests.helpers.cards import cut_down, ours, result, rows_of


@pytest.fixture
def small(model):
    return cut_down(model)


def test_new_scores_make_the_card_that_they_would_have_made(small):
    """Of a card that nobody has edited, whether it had scores before or not."""
    controls = {"uncompressed": result(9999)}
    given = {"details": CardDetails(name="Small", evaluation="manuals")}
    made = model_card(small, result=ours(small), controls=controls, **given)
    for before in (model_card(small, **given), model_card(small, result=ours(small, losses=(1.0, 2.0)), **given)):
        card = with_scores(str(before), ours(small), controls, name="Small", texts="manuals")
        assert ModelCard(card).text == made.text
        assert ModelCard(card).data.to_dict() == made.data.to_dict()


EDITED = """---
# mine
license: mit
model-index:
- name: Mine
  results:
    - task: {type: old}

my_key: [1, 2]
tags:
- hf-compress
---

# My model

```
## Evaluation
```

## Evaluation

Old figures.

### Below

More of them.

## Thanks

To my   cat.
"""


def test_what_is_not_of_scores_stays_letter_for_letter(small):
    card = with_scores(EDITED, ours(small), {"uncompressed": result(9999)}, name="other")
    head, tail = card.index("## Evaluation\n\n|"), card.index("## Thanks")
    assert card[card.index("# My model") : head] == "# My model\n\n```\n## Evaluation\n```\n\n"
    assert card[tail:] == "## Thanks\n\nTo my   cat.\n"
    assert "Old figures" not in card
    assert "### Below" not in card
    assert card.startswith("---\n# mine\nlicense: mit\nmy_key: [1, 2]\ntags:\n- hf-compress\nmodel-index:\n")
    data = ModelCard(card).data
    assert (data.model_name, data.license, data.my_key) == ("Mine", "mit", [1, 2])
    assert [found.metric_type for found in data.eval_results] == ["perplexity", "acc", "exact_match"]
    assert rows_of(ModelCard(card), "Evaluation")[0] == ["", "this model", "uncompressed"]
    again = with_scores(card, ours(small), {"uncompressed": result(9999)}, name="other")
    assert again == card


@pytest.mark.parametrize(
    ("card", "order"),
    [
        ("", ["## Evaluation"]),
        ("Nothing but a line", ["Nothing but a line", "## Evaluation"]),
        ("# A\n\n## Limitations\n\n- few\n", ["# A", "## Evaluation", "## Limitations", "- few"]),
        ("---\nlicense: mit\n---\n## Evaluation", ["license: mit", "model-index:", "## Evaluation"]),
    ],
)
def test_a_card_without_the_section_gets_one(card, order, small):
    made = with_scores(card, ours(small), {}, name="Small")
    places = [made.index(part) for part in order]
    assert places == sorted(places)
    assert made.count("## Evaluation") == 1
    assert ModelCard(made).data.model_name == "Small"


def test_metadata_that_are_no_yaml_are_not_touched(small):
    with pytest.raises(ValueError, match="the metadata at its beginning cannot be read"):
        with_scores("---\n{: [\n---\n", ours(small), {}, name="x")


def test_labelled_data_are_scores(small):
    ours, theirs = (("no", "no"), ("yes", "no"), ("yes", "yes")), (("no", "no"), ("yes", "yes"), ("yes", "yes"))
    classes = Classification("/home/me/rows.csv", 2 / 3, 1 / 3, 2 / 3, 0.2, "yes", 3, by_document=ours)
    measured = result(parameter_count(small), perplexity=None, scores=(), labelled=classes)
    control = replace(measured, labelled=replace(classes, accuracy=1.0, f1=1.0, by_document=theirs))
    card = ModelCard(with_scores("---\npipeline_tag: text-classification\n---\n", measured, {"c": control}, name="x"))
    assert card.data.eval_results == [
        EvalResult("text-classification", "rows.csv", "rows.csv", "accuracy", 2 / 3, metric_name="accuracy"),
        EvalResult("text-classification", "rows.csv", "rows.csv", "f1", 2 / 3, metric_name="F1 of yes"),
    ]
    rows = rows_of(card, "Evaluation")
    assert "home" not in str(card)
    assert rows[3] == ["rows.csv accuracy ↑ (3 documents)", "0.67 ± 0.33", "1.00 ± 0.33"]
    assert rows[4] == ["rows.csv accuracy above this model's", "(reference)", "+0.33 ± 0.33"]
    assert [row[0] for row in rows[5:]] == [
        "rows.csv F1 of yes ↑ (3 documents)",
        "rows.csv F1 of yes above this model's",
    ]
    assert "Differences are taken document by document" in card.text
