"""What the tests of model cards have in common: a small model, figures made by hand, and a look at the shown page."""

import math
from dataclasses import replace

from markdown_it import MarkdownIt

from hf_compress.api.compress import compress
from hf_compress.evaluation.evaluate import EvaluationResult, TaskScore
from hf_compress.evaluation.perplexity import Perplexity
from hf_compress.evaluation.size import parameter_count
from hf_compress.evaluation.speed import Throughput
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.report.history import add_stage, history_of, model_size
from hf_compress.report.stages import HEAL, Stage, Step

PARSER = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def cut_down(model):
    """Three of five blocks, from a model of the Hub."""
    model.config._name_or_path = model.name_or_path = "org/Base-1.5B"
    return compress(model, DropBlocksConfig(num_blocks=2, criterion="last"))


def restage(model, **changes):
    """Change what the model's history tells of its last stage."""
    report = model.compression_report
    model.compression_report = replace(report, stages=[*report.stages[:-1], replace(report.stages[-1], **changes)])


def healed(model, steps=64, adapters=True):
    """Add a stage of healing to the model's history, as `heal` does."""
    size = model_size(model)
    notes = {"steps": steps, "loss": 0.1, "adapters": adapters, "taught_by": 0}
    stage = Stage(HEAL, {"rank": 16}, size, size, [], notes, [Step("train", 1.0)], {}, None)
    add_stage(model, stage, history_of(model))


def perplexity(losses, tokens=100, **changes):
    """A perplexity from the summed loss of each document, all of the same number of tokens."""
    by_document = tuple((loss, tokens) for loss in losses)
    loss = sum(losses) / (tokens * len(losses))
    measured = Perplexity(math.exp(loss), loss, 0.05, tokens * len(losses), len(losses), "documents", by_document)
    return replace(measured, **changes)


def result(parameters, losses=(250.0, 310.0, 290.0), acc=0.625, **changes):
    measured = EvaluationResult(
        name="/home/someone/models/out",
        parameters=parameters,
        stored_bytes=4 * parameters,
        throughput=Throughput(1000.0, 1.0, 1, 16, 5),
        perplexity=perplexity(losses),
        scores=(
            TaskScore("cloze", "acc", acc, 0.034, True, 200),
            TaskScore("maths", "exact_match,strict", 0.25, math.nan, None, None),
        ),
    )
    return replace(measured, **changes)


def ours(model, **changes):
    return result(parameter_count(model), **changes)


def rows_of(card, heading):
    """The cells of the table under a heading, as they are shown."""
    tokens = PARSER.parse(card.text)
    start = next(i for i, token in enumerate(tokens) if token.type == "inline" and token.content == heading)
    end = next((i for i in range(start, len(tokens)) if tokens[i].type == "table_close"), start)
    rows = []
    for before, token in zip(tokens[start:end], tokens[start + 1 : end], strict=False):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and before.type in ("td_open", "th_open"):
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def code_of(card, language):
    return next(token.content for token in PARSER.parse(card.text) if token.type == "fence" and token.info == language)
