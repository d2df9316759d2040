"""A model's history in words, for its card: what was changed, how large it was and is, how it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from transformers import PreTrainedModel

from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.report.card_edits import bits_table, edits_table
from hf_compress.report.markdown import escape, fence, json_values, public, table
from hf_compress.report.report import CompressionReport
from hf_compress.report.stages import HEAL, WRITTEN_OUT, Size, Stage

_NO_METHOD = {  # of stages that no method made: how the model was made smaller by them, and what they changed
    HEAL: ("distillation of the uncompressed model", "Weights were trained; the structure stayed."),
    WRITTEN_OUT: ("writing packed weights out as matrices", "Packed and sparse weights were written out as matrices."),
}


def methods(report: CompressionReport) -> str:
    """What was done, stage by stage, each method with a link to its paper where it names one."""
    return ", then by ".join(map(_method, report.stages))


def _method(stage: Stage) -> str:
    if stage.method in _NO_METHOD:
        return _NO_METHOD[stage.method][0]
    number = re.fullmatch(r"https://arxiv\.org/abs/([\d.]+(?:v\d+)?)", stage.paper or "")
    link = f"[arXiv {number[1]}]({stage.paper})" if number else escape(stage.paper or "")
    return f"the method {escape(stage.method)}" + (f" ({link})" if link else "")


def _by_stage(report: CompressionReport, parts: list[str]) -> str:
    """A text for each stage, under headings where there are several."""
    if len(parts) == 1:
        return parts[0]
    titles = [f"### {number}. {escape(stage.method)}" for number, stage in enumerate(report.stages, 1)]
    return "\n\n".join(f"{title}\n\n{part}" for title, part in zip(titles, parts, strict=True))


def changes(report: CompressionReport) -> str:
    """The section: what was changed, stage by stage."""
    several = len(report.stages) > 1
    parts = []
    for stage in report.stages:
        text = _edited(stage, report.before) if stage.edits else _unedited(stage)
        if stage.edits:
            text += f"\n\nBlocks are counted from 0, in the {'model before this change' if several else 'base model'}."
        if several and stage.before != stage.after:
            text += f"\n\n{_left(stage.before, stage.after)}"
        parts.append(text)
    return f"## What was changed\n\n{_by_stage(report, parts)}"


def _edited(stage: Stage, original: Size) -> str:
    return "\n\n".join(filter(None, (bits_table(stage.edits, original), edits_table(stage.edits))))


def _unedited(stage: Stage) -> str:
    return _NO_METHOD.get(stage.method, ("", "No structural edit is recorded."))[1]


def _left(before: Size, after: Size) -> str:
    return (
        f"Parameters: {before.parameters:,} → {after.parameters:,}; stored bytes: {before.bytes:,} → {after.bytes:,}."
    )


def sizes(model: PreTrainedModel, report: CompressionReport | None) -> str:
    """The section: the sizes of the original, where they are known, and of the model as it is now."""
    count, size = parameter_count(model), stored_bytes(model)
    dtype = str(model.dtype).removeprefix("torch.")
    note = f"Stored bytes are those of the tensors, masks, scales and indices included; most are {dtype}."
    if report is None:
        return f"## Size\n\n{count:,} parameters, {size:,} stored bytes. {note}"
    before, after = report.before, report.after
    rows = [["parameters", *_change(before.parameters, count)], ["stored bytes", *_change(before.bytes, size)]]
    rows += [[f"blocks in {escape(s)}", *_change(n, after.blocks.get(s, 0))] for s, n in before.blocks.items()]
    if (count, size) != (after.parameters, after.bytes):
        note += (
            f" The model was changed after compression, which had left {after.parameters:,} parameters in "
            f"{after.bytes:,} bytes; the table has its present size."
        )
    return f"## Size\n\n{table(['', 'before', 'after', 'change'], rows)}\n\n{note}"


def _change(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.1f}%" if before else ""


def making(report: CompressionReport, calibration: str) -> str:
    """How the model was made, stage by stage; `calibration` is what the data is, as an escaped sentence."""
    if len(report.stages) == 1:
        return _making(report.stages[0], calibration)
    parts = _by_stage(report, [_making(stage, None) for stage in report.stages])
    return f"Calibration data: {calibration}\n\n{parts}" if calibration else parts


def _making(stage: Stage, named: str | None) -> str:
    if not stage.config:
        return "\n\n".join(filter(None, (_time(stage), f"Versions: {escape(_versions(stage))}.")))
    recipe = json.dumps(json_values(stage.config), indent=2, ensure_ascii=False)
    use = "Settings" if stage.method == HEAL else "Settings, which also serve as a recipe"
    parts = [
        f"{use}:\n\n{fence(recipe, 'json')}",
        "" if stage.method == HEAL else _calibration(stage, named),
        training(stage),
        _check(stage),
        _time(stage),
        f"Versions: {escape(_versions(stage))}.",
    ]
    return "\n\n".join(filter(None, parts))


def _versions(stage: Stage) -> str:
    return ", ".join(f"{name} {version}" for name, version in stage.environment.items())


def _calibration(stage: Stage, named: str | None) -> str:
    """How much data was used and, unless `named` is None because it is said elsewhere, what it is."""
    counts, place = escape(amounts(stage.calibration)), escape(source(stage.calibration))
    if counts and named is None:
        return f"Calibration data: {counts}{f'; from {place}' if place else ''}."
    if counts:
        unnamed = f"from {place}." if place else "what the data is, is not recorded here."
        return f"Calibration data: {counts}; {named or unnamed}"
    return f"Calibration data: {named or 'none was used.'}"


def source(facts: Mapping[str, int | str]) -> str:
    """Where data came from by name; of a path of this machine the last part alone."""
    return public(str(facts.get("source", "")))


def amounts(facts: Mapping[str, int | str]) -> str:
    """How much data was used and how it was drawn: "256 samples of 10,000, drawn with seed 0, 4,096 tokens"."""
    drawn = {"of": " of {:,}", "of_the_first": " of the first {:,}", "seed": ", drawn with seed {}"}
    how = "".join(words.format(facts[name]) for name, words in drawn.items() if name in facts)
    named = {"samples": f"samples{how}", "tokens": "tokens", "truncated": "truncated"}
    return ", ".join(f"{facts[name]:,} {what}" for name, what in named.items() if facts.get(name))


def training(stage: Stage) -> str:
    """What of a stage was training; nothing where nothing was."""
    if stage.method == HEAL:
        how = "adapters (LoRA), merged" if stage.notes.get("adapters") else "all weights"
        steps = stage.notes.get("steps")
        count = f"{steps:,} steps, " if isinstance(steps, int) else ""
        return f"Healed by distillation of the uncompressed model: {count}{how}."
    steps = stage.notes.get("trained_steps")
    return f"Compressed in training: {steps:,} steps." if isinstance(steps, int) else ""


def _check(stage: Stage) -> str:
    if stage.parity is None:
        return ""
    passed = "passed; a model rebuilt from the saved config gave the same outputs, bit for bit."
    failed = "**not passed**; a model rebuilt from the saved config did not give the same outputs."
    return f"Reload check: {passed if stage.parity else failed}"


def _time(stage: Stage) -> str:
    steps = [(step.name, step.seconds) for step in stage.steps if math.isfinite(step.seconds)]
    listed = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in steps)
    return f"Time: {sum(seconds for _, seconds in steps):.1f} s ({escape(listed)})." if steps else ""
