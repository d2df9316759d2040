"""run(): a recipe carried out, from the model's name to a folder with its card, and from where a killed run had got."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedModel

from hf_compress.api.compress import compress
from hf_compress.api.recipe import EvaluationPlan, Recipe
from hf_compress.calibration.compute import Compute
from hf_compress.calibration.files import load, load_texts
from hf_compress.calibration.processes import by_first, here
from hf_compress.calibration.workdir import MADE, OFFLOADED
from hf_compress.evaluation.compare import check_metrics, compare
from hf_compress.evaluation.comparison import Comparison
from hf_compress.evaluation.harness import check_tasks
from hf_compress.evaluation.loading import default_device, load_saved
from hf_compress.evaluation.processors import kind_read_by, load_processor
from hf_compress.report.history import history_of, read_report
from hf_compress.report.report import CompressionReport
from hf_compress.storage.save import check_target, save
from hf_compress.storage.scored_cards import texts_told, write_scores


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
        resume: whether the output may be there, if this recipe has made it by this workdir; then it is measured alone.

    Raises:
        ValueError, TypeError: no recipe, no output, data that cannot be read, or a metric that does not fit the model;
            before anything is done.
        FileExistsError: the output exists.
    """
    recipe = recipe_of(recipe)
    folder = output_of(recipe)
    compute = compute or Compute()
    report = _made_already(recipe, folder, compute) if resume else None
    if report is None:
        check_target(folder, overwrite)  # before any work is done
    texts = _held_out(recipe)
    if report is None:
        report = _make(recipe, folder, compute, device, overwrite)
    place = None if device == "disk" else device
    asked = recipe.evaluate
    return Outcome(folder, report, None if asked is None else _compared(recipe, asked, texts, folder, place))


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


def _made_already(recipe: Recipe, folder: Path, compute: Compute) -> CompressionReport | None:
    """The report of the model in a folder, if it is this recipe that has made it, by this workdir."""
    note = None if compute.folder is None else compute.folder / MADE
    if note is None or not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != _makes(recipe):
        return None
    return read_report(folder) if folder.is_dir() else None


def _makes(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides about the model, and where it goes."""
    made: dict[str, Any] = json.loads(json.dumps(replace(recipe, evaluate=None).to_dict()))
    return made


def _held_out(recipe: Recipe) -> list[Any] | None:
    """The texts to measure on; raises where what is to be measured does not fit the model. No weights are read."""
    asked = recipe.evaluate
    if asked is None:
        return None
    check_metrics(recipe.model, asked.texts is not None, bool(asked.tasks), labelled=False)
    if asked.tasks:
        check_tasks(asked.tasks, asked.include_path)
    return load_texts(asked.texts, asked.text_column, asked.limit) if asked.texts else None


def _make(recipe: Recipe, folder: Path, compute: Compute, device: str | None, overwrite: bool) -> CompressionReport:
    """Compress and save the model; its report."""
    set_seed(recipe.seed)
    given, kind = recipe.calibration, kind_read_by(recipe.model)
    data = None if given is None else load(given.data, given.text_column, given.samples, given.seed, kind)
    with ExitStack() as held:
        if compute.folder is None:
            offloaded = Path(held.enter_context(TemporaryDirectory(prefix="hf_compress-")))
        else:
            offloaded = compute.folder / OFFLOADED / str(here()[0])
        place = {"": device or default_device()}
        model = load_saved(recipe.model, dtype=recipe.dtype, device_map=place, offload_folder=offloaded)
        processor = load_processor(recipe.model, needed=data is not None)
        compress(model, recipe.stages, data, processor, None if given is None else given.options, compute)
        save(model, folder, processor, overwrite=overwrite, portable=recipe.portable)
        if compute.folder is not None:
            by_first((compute.folder / MADE).write_text)(json.dumps(_makes(recipe)), encoding="utf-8")
        report = history_of(model)
        assert report is not None
        return report


@by_first
def _compared(
    recipe: Recipe, asked: EvaluationPlan, texts: list[Any] | None, folder: Path, device: str | None
) -> Comparison:
    """The smaller model beside the original; the figures go into its card."""
    name = Path(recipe.model).name
    name = f"{name} (original)" if name == folder.name else name
    comparison = compare(
        {name: _as_made(recipe, device), folder.name: folder},
        load_processor(recipe.model),
        tasks=asked.tasks or (),
        texts=texts,
        include_path=asked.include_path,
        batch_size=asked.batch_size,
        limit=asked.limit,
        device=device or default_device(),
    )
    write_scores(comparison, {folder.name: folder}, texts_told(asked.texts, asked.limit))
    return comparison


def _as_made(recipe: Recipe, device: str | None) -> PreTrainedModel | str:
    """The original, in the dtype that the smaller one was made in."""
    if recipe.dtype == "auto":
        return recipe.model
    return load_saved(recipe.model, dtype=recipe.dtype, device_map={"": device or default_device()})
