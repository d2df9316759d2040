"""run(): a recipe carried out, from the model's name to a folder with its card, and from where a killed run had got."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import set_seed

from hf_compress.api.compress import compress
from hf_compress.api.recipe import EvaluationPlan, Recipe
from hf_compress.calibration.compute import Compute
from hf_compress.calibration.files import load, load_texts
from hf_compress.calibration.processes import by_first
from hf_compress.calibration.workdir import OFFLOADED
from hf_compress.evaluation.compare import compare
from hf_compress.evaluation.comparison import Comparison
from hf_compress.evaluation.kinds import check_generates
from hf_compress.evaluation.loading import load_saved, saved_class
from hf_compress.evaluation.processors import kind_read_by, load_processor
from hf_compress.report.card_scores import UNCOMPRESSED
from hf_compress.report.history import history_of, read_report
from hf_compress.report.report import CompressionReport
from hf_compress.storage.save import check_target, save
from hf_compress.storage.scored_cards import write_scores


@dataclass(frozen=True)
class Outcome:
    """What a recipe came to.

    Attributes:
        folder: where the smaller model lies, with its card.
        report: its history.
        comparison: what was measured of it beside the uncompressed model; None where nothing was to be.
    """

    folder: Path
    report: CompressionReport
    comparison: Comparison | None


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    compute: Compute | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Outcome:
    """Carry a recipe out: load the model, compress it stage by stage, save it, compare it, and write its card.

    Args:
        recipe: a `Recipe`, its file, a folder with a compression report, or the values of one. Paths in it are as seen
            from the current folder.
        compute: as for `compress`. With a workdir, a run that was killed goes on from there.
        device: where the model is loaded; "disk" leaves it there, to be read a block at a time. A CUDA device, if there
            is one, or else the CPU when None.
        overwrite: whether the output may be replaced.
        resume: whether a model that the same stages have made, in the output already, is taken for the result, so that
            what is left is to measure it.

    Raises:
        ValueError, TypeError: no recipe, no output, data that cannot be read, or a metric that does not fit the model;
            before anything is done.
        FileExistsError: the output exists.
    """
    recipe = recipe_of(recipe)
    folder = output_of(recipe)
    report = made_already(recipe, folder) if resume else None
    if report is None:
        check_target(folder, overwrite)  # before any work is done
    _check_metrics(recipe)
    if report is None:
        report = _make(recipe, folder, compute or Compute(), device, overwrite)
    return Outcome(folder, report, None if recipe.evaluate is None else _compared(recipe, recipe.evaluate, folder))


def recipe_of(given: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe, however it is given."""
    if isinstance(given, Recipe):
        return given
    return Recipe.from_dict(given) if isinstance(given, Mapping) else Recipe.from_file(given)


def output_of(recipe: Recipe) -> Path:
    """Where a recipe's model goes; ValueError where it does not say."""
    if recipe.output is None:
        raise ValueError("the recipe does not say where the model goes: give it output: FOLDER")
    return Path(recipe.output)


def made_already(recipe: Recipe, folder: Path) -> CompressionReport | None:
    """The report of the model in a folder, if it is what the recipe makes."""
    report = read_report(folder) if folder.is_dir() else None
    stages = [stage.to_dict() for stage in recipe.stages]
    return report if report is not None and [stage.config for stage in report.stages] == stages else None


def _check_metrics(recipe: Recipe) -> None:
    """Raise where the model is of a kind that what is to be measured does not fit; no weights are read."""
    if recipe.evaluate is not None:
        kind, _ = saved_class(recipe.model)
        check_generates(kind, "perplexity" if recipe.evaluate.texts else "scoring on lm-eval tasks")
        _texts(recipe.evaluate)


def _make(recipe: Recipe, folder: Path, compute: Compute, device: str | None, overwrite: bool) -> CompressionReport:
    """Compress and save the model; its report."""
    set_seed(recipe.seed)
    given, kind = recipe.calibration, kind_read_by(recipe.model)
    data = None if given is None else load(given.data, given.text_column, given.samples, given.seed, kind)
    with ExitStack() as held:
        if compute.folder is None:
            offloaded = Path(held.enter_context(TemporaryDirectory(prefix="hf_compress-")))
        else:
            offloaded = compute.folder / OFFLOADED
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_saved(recipe.model, dtype=recipe.dtype, device_map={"": place}, offload_folder=offloaded)
        processor = load_processor(recipe.model, needed=data is not None)
        compress(model, recipe.stages, data, processor, None if given is None else given.options, compute)
        save(model, folder, processor, overwrite=overwrite, portable=recipe.portable)
        report = history_of(model)
        assert report is not None
        return report


@by_first
def _compared(recipe: Recipe, asked: EvaluationPlan, folder: Path) -> Comparison:
    """The smaller model beside the uncompressed one; the figures go into its card."""
    comparison = compare(
        {UNCOMPRESSED: recipe.model, folder.name: folder},
        tasks=asked.tasks or (),
        texts=_texts(asked),
        include_path=asked.include_path,
        batch_size=asked.batch_size,
        limit=asked.limit,
    )
    write_scores(comparison, {folder.name: folder}, None if asked.texts is None else Path(asked.texts).name)
    return comparison


def _texts(asked: EvaluationPlan) -> list[Any] | None:
    return load_texts(asked.texts, asked.text_column, asked.limit) if asked.texts else None
