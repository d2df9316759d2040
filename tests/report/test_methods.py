"""The report of every method: a few lines, a table for notebooks, and a picture of what the method found."""

from html.parser import HTMLParser

import pytest
import torch
from transformers import Trainer

import hf_compress as hfc
from hf_compress.methods.base.settings import method_names
from hf_compress.report.edits import decisions
from hf_compress.report.page import report_page
from hf_compress.report.report import CompressionReport
from tests.helpers.cards import healed
from tests.helpers.language import tiny_llama
from tests.helpers.runs import arguments, token_rows
from tests.helpers.web_pages import check_self_contained

IDS = torch.randint(4, 30, (12, 8), generator=torch.Generator().manual_seed(5))
SPARSE = {"method": "lrp", "sparsity": 0.5}
BITS = {"method": "lrp", "bits": 6.5, "group_size": 16}
BLOCKS = "model.layers"  # above the boxes
# settings, and what stands at the axes of the picture
METHODS = {
    "mka": ({"method": "mka", "ratio": 0.4}, ["absorbed (nats)", "(1 = without)", BLOCKS]),
    "mka, paper": ({"method": "mka", "ratio": 0.4, "variant": "paper"}, ["similarity; merged", BLOCKS]),
    "last blocks": ({"method": "drop_blocks", "num_blocks": 2, "criterion": "last"}, [BLOCKS]),
    "influence": (
        {"method": "drop_blocks", "num_blocks": 2, "criterion": "block_influence"},
        ["block influence", BLOCKS],
    ),
    "angular": ({"method": "drop_blocks", "num_blocks": 2, "criterion": "angular"}, ["angle", BLOCKS]),
    "perplexity": ({"method": "drop_blocks", "num_blocks": 2, "criterion": "perplexity"}, ["loss afterwards", BLOCKS]),
    "collapse": ({"method": "layer_collapse", "ratio": 0.4}, ["R² of the linear map", "collapsed"]),
    "illc": (
        {"method": "illc", "gamma": 0.5, "head_gamma": 0.5},
        ["units or heads kept", "share of the energy", "attention"],
    ),
    "illc, paper": ({"method": "illc", "gamma": 0.5, "variant": "paper"}, ["units or heads kept"]),
    "sparse": (SPARSE, ["share of weights kept", "q_proj", "down_proj"]),
    "sparse, bits": (SPARSE | BITS, ["share of weights kept", "bits a weight"]),
    "bits": (BITS, ["bits a weight", "up_proj"]),
    "neurons": (SPARSE | {"granularity": "neuron"}, ["units or heads kept", "FFN"]),
    "blocks": (SPARSE | {"granularity": "block"}, ["relevance of what the", BLOCKS]),
    "split": ({"method": "lrp", "variant": "paper", "prune": False, "split": [8, 4]}, ["stored (MB)", "1. lrp"]),
    "bottlenecks": ({"method": "adaptive_compress"}, ["of the variance", "retention", "features"]),
}


class Cells(HTMLParser):
    """The texts of a table's cells, row by row; unclosed tags are left open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "td":
            self.rows[-1].append(data)


def check(report, words, tmp_path):
    """What is told of a report, and that its picture has these words at its axes."""
    report = CompressionReport.from_json(report.to_json())  # as one is that was saved
    text = str(report)
    lines = text.splitlines()
    assert len(lines) == len(report.stages) + 3
    assert max(map(len, lines)) < 140
    sizes = [report.before, *(stage.after for stage in report.stages)]
    names = ["original", *(stage.method for stage in report.stages)]
    for line, size, name in zip(lines[2:], sizes, names, strict=True):
        assert all(told in line for told in (f"{size.parameters:,}", f"{size.bytes:,}", name))
    assert f"{100 * (report.after.bytes / report.before.bytes - 1):+.1f}%" in lines[-1]
    page = Cells(report._repr_html_())
    assert (page.open, len(page.rows)) == ([], len(sizes) + 1)
    assert all(cell in text for row in page.rows for cell in row)
    whole = report_page(report.stages, report.base_model, "small")
    assert all(line in check_self_contained(whole).words for stage in report.stages for line in decisions(stage.edits))
    picture = report.plot(tmp_path / "plot.svg").read_text()
    for word in words:
        assert word in picture.replace("&#45;", "-"), word


@pytest.mark.parametrize("name", METHODS)
def test_methods(name, tmp_path):
    settings, words = METHODS[name]
    torch.manual_seed(0)
    small = hfc.compress(tiny_llama(layers=5), hfc.CompressionConfig.from_dict(settings), IDS)
    check(small.compression_report, words, tmp_path)


def test_the_table_has_every_method():
    assert {settings["method"] for settings, _ in METHODS.values()} == set(method_names())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "layer_collapse", "ratio": 0.5, "gradual": True}, ["α of the activation", "collapsed"]),
        ({"method": "adaptive_compress"}, ["of the variance", "features"]),
    ],
    ids=["collapse", "bottlenecks"],
)
def test_compression_in_training(settings, words, tmp_path):
    model, config = tiny_llama(layers=5), hfc.CompressionConfig.from_dict(settings)
    callback = hfc.CompressionCallback(config, calibration=IDS)
    Trainer(model, arguments(tmp_path), train_dataset=token_rows(), callbacks=[callback]).train()
    report = model.compression_report
    assert "trained for 4 steps" in str(report)
    check(report, words, tmp_path)


def test_several_stages(tmp_path):
    """The last that tells of blocks is drawn; of one that tells of nothing, the sizes."""
    model = hfc.compress(tiny_llama(layers=5), hfc.DropBlocksConfig(num_blocks=1, criterion="last"))
    model = hfc.compress(model, hfc.ILLCConfig(gamma=0.5), IDS)
    healed(model)
    report = model.compression_report
    check(report, ["units or heads kept"], tmp_path)
    assert "trained for 64 steps" in str(report).splitlines()[-1]
    assert "stored (MB)" in report.plot(tmp_path / "heal.svg", stage=-1).read_text()
