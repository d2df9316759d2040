import json
import math
import statistics

import datasets
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import BertForSequenceClassification, LlamaForSequenceClassification, ViTImageProcessorPil

from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.classification import classify
from hf_compress.evaluation.evaluate import evaluate
from hf_compress.evaluation.labelled import Labelled, read_labelled
from tests.helpers.classifiers import NAMES, labelled_rows, pictures, tiny_classifier, tiny_picture_classifier
from tests.helpers.language import tiny_llama, words


def slow_guesses(model, tokenizer, rows, columns=("text",)):
    """The likeliest class of each row, one at a time."""
    guesses = []
    for row in rows:
        inputs = tokenizer(*(row[column] for column in columns), return_tensors="pt")
        with torch.no_grad():
            guesses.append(NAMES[model(**inputs).logits.argmax().item()])
    return guesses


@pytest.mark.parametrize(("classes", "f1_of"), [(2, "yes"), (3, "macro")])
def test_accuracy_and_f1_are_those_of_the_definitions(tokenizer, classes, f1_of):
    model, rows = tiny_classifier(classes), labelled_rows(classes=classes)
    model.train()
    measured = classify(model, rows, tokenizer, batch_size=5)
    assert model.training
    model.eval()
    labels, guesses = [row["label"] for row in rows], slow_guesses(model, tokenizer, rows)
    hits = [label == guess for label, guess in zip(labels, guesses, strict=True)]
    assert 0 < sum(hits) < len(hits)  # otherwise a constant would pass
    assert measured.by_document == tuple(zip(labels, guesses, strict=True))
    assert measured.hits == tuple(hits)
    assert measured.accuracy == pytest.approx(sum(hits) / len(hits))
    assert measured.accuracy_standard_error == pytest.approx(statistics.stdev(hits) / math.sqrt(len(hits)))
    how = {"average": "macro"} if classes > 2 else {"pos_label": "yes"}
    assert measured.f1 == pytest.approx(f1_score(labels, guesses, **how))
    assert measured.f1_of == f1_of
    assert 0 < measured.f1_standard_error < 0.3
    assert measured == classify(model, rows, tokenizer)


def test_pairs_of_texts(tokenizer):
    model = tiny_classifier()
    rows = [
        {"idx": i, "premise": words(4, i), "hypothesis": words(3, 99 - i), "label": NAMES[i % 2]} for i in range(12)
    ]
    expected = slow_guesses(model, tokenizer, rows, ("premise", "hypothesis"))
    assert [guess for _, guess in classify(model, rows, tokenizer).by_document] == expected
    swapped = classify(model, rows, tokenizer, text_columns=("hypothesis", "premise"))
    assert [guess for _, guess in swapped.by_document] == slow_guesses(
        model, tokenizer, rows, ("hypothesis", "premise")
    )


def test_labels_by_id_by_name_and_by_a_datasets_own_names(tokenizer, tmp_path):
    model, rows = tiny_classifier(), labelled_rows()
    expected = classify(model, rows, tokenizer)
    by_id = [row | {"label": NAMES.index(row["label"])} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in by_id))
    lines = ["text,gold", *(f"{row['text']},{row['label']}" for row in by_id)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.ClassLabel(names=["yes", "no"])})
    named = {"text": [row["text"] for row in rows], "labels": [row["label"] for row in rows]}
    for data, column in (
        (by_id, None),
        (str(tmp_path / "rows.jsonl"), None),
        (tmp_path / "rows.csv", "gold"),
        (datasets.Dataset.from_list(by_id), None),
        (datasets.Dataset.from_dict(named, features=features), None),  # "yes" is 0 there, and 1 for the model
        (datasets.Dataset.from_list(by_id).to_pandas(), None),
    ):
        measured = classify(model, data, tokenizer, label_column=column)
        assert measured.by_document == expected.by_document
    assert classify(model, tmp_path / "rows.csv", tokenizer, label_column="gold", limit=0.25).documents == 6
    assert classify(model, str(tmp_path / "rows.jsonl"), tokenizer, limit=5).name == "rows.jsonl"


def test_pictures_in_rows_and_in_folders(tmp_path):
    model = tiny_picture_classifier()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    drawn = pictures(9)
    rows = [{"image": picture, "label": number % 3} for number, picture in enumerate(drawn)]
    with torch.no_grad():
        logits = model(**processor(images=drawn, return_tensors="pt")).logits
    measured = classify(model, rows, processor, batch_size=4)
    assert [guess for _, guess in measured.by_document] == [f"LABEL_{guess}" for guess in logits.argmax(-1).tolist()]
    for row in rows:
        folder = tmp_path / "pictures" / f"LABEL_{row['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{id(row)}.png")
    assert classify(model, tmp_path / "pictures", processor).accuracy == measured.accuracy


def test_long_texts_are_cut_and_counted(tokenizer):
    rows = [{"text": words(40, 1), "label": "no"}, {"text": words(4, 2), "label": "yes"}]
    assert classify(tiny_classifier(), rows, tokenizer).truncated == 1


def test_a_decoder_without_a_padding_token_finds_the_last_word(tokenizer):
    config = tiny_llama().config
    config.pad_token_id, config.num_labels = None, 2
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    rows = [{"text": words(3 + 5 * i, seed=i), "label": i % 2} for i in range(6)]
    alone = [classify(model, [row], tokenizer).by_document[0] for row in rows]
    assert classify(model, rows, tokenizer).by_document == tuple(alone)


def test_evaluate_measures_classifiers(tokenizer, tmp_path):
    model = tiny_classifier()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = evaluate(tmp_path, labelled=Labelled(labelled_rows()), speed=False)
    assert result.labelled == classify(model, labelled_rows(), tokenizer)
    assert [row[0] for row in result.rows()][-2:] == ["labelled data accuracy", "labelled data F1 of yes"]
    content = json.loads(result.to_json())["labelled"]
    assert content["accuracy"] == result.labelled.accuracy
    assert "by_document" not in content


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no rows"),
        ([{"text": "w1", "label": "maybe"}], r"row 0 has the label 'maybe'.*0 to 1 \('no', 'yes'\)"),
        ([{"text": "w1", "label": 0}, {"text": "w2", "label": 2}], "row 1 has the label 2"),
        ([{"text": "w1", "label": -1}], "row 0 has the label -1"),
        ([{"text": "w1", "label": 0.5}], "no numbers to regress on"),
        ([{"text": "w1", "label": None}], "row 0 has the label None"),
        ([{"text": "w1"}], "has the columns text: name the one with the labels by label_column="),
        ([{"a": "w1", "b": "w2", "label": 0}], "has the columns a, b, label: name the one with the texts"),
        (Labelled([{"text": "w1", "label": 0}], label_column="gold"), "there is no 'gold'"),
        (Labelled([{"text": "w1", "label": 0}], text_columns="body"), "has no column 'body'"),
        (Labelled([{"text": "w1", "label": 0}], text_columns=()), "one column, or the two of a pair"),
        ([{"text": "w1", "label": 0}, {"text": 3, "label": 0}], "row 1 has a int in the column 'text'"),
        ([{"image": pictures(1)[0], "label": 0}], "holds images, but BertForSequenceClassification reads texts"),
    ],
)
def test_data_that_does_not_fit(data, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        classify(tiny_classifier(), data, tokenizer)


def test_what_is_no_data_or_no_processor(tokenizer):
    for data in (5, {"text": "w1", "label": 0}, ["w1"]):
        with pytest.raises(TypeError, match="labelled data"):
            read_labelled(data)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read_labelled("nowhere.csv")
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        classify(tiny_classifier(), labelled_rows())
    with pytest.raises(TypeError, match="expected the model's tokenizer"):
        classify(tiny_classifier(), labelled_rows(), "bert")


def test_models_that_are_no_classifiers(tokenizer):
    with pytest.raises(UnsupportedModelError, match="which LlamaForCausalLM is not"):
        classify(tiny_llama(), labelled_rows(), tokenizer)
    config = tiny_classifier().config
    for changes in ({"num_labels": 1}, {"problem_type": "multi_label_classification"}):
        model = BertForSequenceClassification(type(config)(**config.to_dict() | changes))
        with pytest.raises(UnsupportedModelError, match="one of several classes"):
            classify(model, labelled_rows(), tokenizer)
