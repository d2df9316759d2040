"""Recipes: a model, the stages that it goes through, its data, what is measured, and where it goes; as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from hf_compress.api.stages import StageSettings, stages_of
from hf_compress.calibration.data import DataOptions
from hf_compress.checks import check, check_fields, check_names, setting
from hf_compress.evaluation.loading import Dtype
from hf_compress.methods.base.recipes import read_recipe
from hf_compress.report.report import REPORT_FILE, CompressionReport
from hf_compress.training.heal_config import HealConfig

SEEDS = "[0, 4294967295]"


@dataclass(frozen=True)
class Section:
    """A mapping in a recipe, whose fields check themselves."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, name: str, values: Any) -> Self:
        """The section that a recipe calls `name`.

        Raises:
            TypeError: it is no mapping, or has a key that is not known.
            ValueError: a value makes no sense, or one is missing.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{name} is a mapping of {', '.join(names_of(cls))}; got {values!r}")
        check_names(name, values, names_of(cls))
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@dataclass(frozen=True)
class CalibrationSource(Section):
    """Where calibration data comes from, by name, and how much of it is read, in what batches."""

    data: str = setting("", "a file, a folder, or a dataset on the Hub (name:configuration:split)")
    samples: int | None = setting(256, "how many are read", "[1, inf)")
    max_length: int | None = setting(None, "tokens to keep of a text", "[1, inf)")
    batch_size: int = setting(8, "samples of a forward pass", "[1, inf)")
    text_column: str | None = setting(None, "the column with the texts, where there are several")
    seed: int | None = setting(0, "with which samples are drawn; null for the first ones", "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("say where the data is: data: texts.jsonl")

    @property
    def options(self) -> DataOptions:
        """How it is read."""
        return DataOptions(self.batch_size, self.max_length, self.text_column, self.samples, self.seed)


@dataclass(frozen=True)
class EvaluationPlan(Section):
    """What is measured of the model before and after, in pairs."""

    tasks: tuple[str, ...] | None = setting(None, "tasks of lm-eval")
    texts: str | None = setting(None, "texts for perplexity; kinds as for calibration")
    text_column: str | None = setting(None, "the column with the texts, where there are several")
    include_path: str | None = setting(None, "a folder with further lm-eval task files")
    limit: int | None = setting(None, "documents of each task, and texts", "[1, inf)")
    batch_size: int = setting(8, "documents that go through the model at once", "[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks and not self.texts:
            raise ValueError("say what to measure: tasks: [arc_easy], or texts: heldout.jsonl")


@dataclass(frozen=True)
class Recipe:
    """A model made smaller, from its name to its folder.

    Attributes:
        model: a folder with a model, or a model's name on the Hub.
        stages: methods' settings, and `HealConfig` between them; see `stages_of`.
        calibration: a `CalibrationSource`, a mapping of its fields, or a name; None where no method needs any.
        evaluate: an `EvaluationPlan`, or a mapping of its fields; nothing is measured when None.
        output: the folder that the smaller model goes to.
        dtype: auto (as stored), float32, bfloat16 or float16.
        seed: of whatever is random.
        portable: as for `save`.
    """

    model: str
    stages: tuple[StageSettings, ...]
    calibration: CalibrationSource | None = None
    evaluate: EvaluationPlan | None = None
    output: str | None = None
    dtype: Dtype = "auto"
    seed: int = 0
    portable: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", stages_of(self.stages))
        object.__setattr__(self, "calibration", _calibration(self.calibration))
        object.__setattr__(self, "evaluate", _evaluation(self.evaluate))
        if self.calibration and self.evaluate and self.calibration.data == self.evaluate.texts:
            raise ValueError(
                f"calibration and evaluate are given the same texts, {self.evaluate.texts}: a score on data that the "
                "model was fitted to says nothing; give others"
            )
        if self.calibration is None and any(isinstance(stage, HealConfig) for stage in self.stages):
            raise ValueError("heal learns from data, and the recipe has none: give it calibration: texts.jsonl")
        check("model", self.model, str)
        check("output", self.output, str | None)
        check("dtype", self.dtype, Dtype)
        check("seed", self.seed, int, SEEDS)
        check("portable", self.portable, bool)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """The recipe that JSON values describe.

        Raises:
            TypeError: a key that is not known; a stage or section of another kind.
            ValueError: a value makes no sense, stages cannot follow each other, or `model` or `stages` is missing.
        """
        check_names("a recipe", values, names_of(Recipe))
        for name in ("model", "stages"):
            if name not in values:
                raise ValueError(f"a recipe needs {name!r}; got {', '.join(values) or 'nothing'}")
        if not isinstance(values["stages"], (list, tuple)):
            raise TypeError(f"stages is a list of methods and their settings; got {values['stages']!r}")
        return Recipe(**values)

    @staticmethod
    def from_file(path: str | Path) -> Recipe:
        """The recipe in a file of YAML or JSON, or that a report tells: what made a model makes it again.

        Raises:
            FileNotFoundError: no such file, or a folder without a report.
            TypeError, ValueError: it is no recipe, or a report of what no recipe can say.
        """
        file = Path(path)
        if file.is_dir():
            file = file / REPORT_FILE
        values = read_recipe(file)
        if "base_model" in values:
            return Recipe.from_report(CompressionReport.from_json(file.read_bytes()))
        if "stages" not in values and "method" in values:
            raise ValueError(
                f"{path} has settings of one method, and no stages: give it to `compress --recipe`, or put them into "
                "stages: [{method: …}], with model: and output:"
            )
        return Recipe.from_dict(values)

    @staticmethod
    def from_report(report: CompressionReport) -> Recipe:
        """The recipe that repeats a model's history.

        Raises:
            ValueError: a stage was given what no file can say, such as a Trainer's arguments or data from memory.
        """
        for number, stage in enumerate(report.stages, 1):
            if "method" not in stage.config:
                raise ValueError(
                    f"stage {number} ({stage.method}) was made in Python, by arguments that no recipe can hold: write "
                    "one by hand"
                )
            if "trained_steps" in stage.notes:
                raise ValueError(
                    f"stage {number} ({stage.method}) was made while a Trainer trained, which no recipe does"
                )
            if stage.notes.get("taught_by"):
                raise ValueError(
                    f"stage {number} ({stage.method}) learned from a model that was compressed already, and a recipe's "
                    "teacher is the original: write one by hand"
                )
        values = {"model": report.base_model, "stages": [stage.config for stage in report.stages]}
        dtype = report.stages[0].environment.get("dtype", "auto")
        return Recipe.from_dict({**values, "calibration": _source_in(report), "dtype": dtype})

    def to_dict(self) -> dict[str, Any]:
        """JSON values only, the inverse of `from_dict`; what is not given is left out."""
        values: dict[str, Any] = {
            "model": self.model,
            "stages": [_exact(stage, stage.to_dict()) for stage in self.stages],
        }
        for name, section in (("calibration", self.calibration), ("evaluate", self.evaluate)):
            if section is not None:
                values[name] = _exact(section, asdict(section))
        rest = {"output": self.output, "dtype": self.dtype, "seed": self.seed, "portable": self.portable}
        return {**values, **{name: value for name, value in rest.items() if value is not None}}

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as YAML; also written to `path` when one is given."""
        import yaml

        plain = json.loads(json.dumps(self.to_dict()))  # tuples as lists
        text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def names_of(cls: Any) -> list[str]:
    """The fields of a dataclass."""
    return [field.name for field in fields(cls)]


def _calibration(given: Any) -> CalibrationSource | None:
    """Calibration data as a section, or by its name alone."""
    if given is None or isinstance(given, CalibrationSource):
        return given
    return CalibrationSource.from_dict("calibration", {"data": given} if isinstance(given, str) else given)


def _evaluation(given: Any) -> EvaluationPlan | None:
    """What is measured, as a section."""
    return given if given is None or isinstance(given, EvaluationPlan) else EvaluationPlan.from_dict("evaluate", given)


def _exact(settings: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Values of settings, defaults included, which another version may have changed; but for those that say nothing."""
    nothing = {field.name for field in fields(settings) if field.default is None}
    return {name: value for name, value in values.items() if value is not None or name not in nothing}


def _source_in(report: CompressionReport) -> CalibrationSource | None:
    """The data that the stages of a report were given, by name.

    Raises:
        ValueError: it came from memory, or is not the same for all stages.
    """
    used = [stage.calibration for stage in report.stages if stage.calibration]
    if not used:
        return None
    if any("source" not in facts for facts in used):
        raise ValueError("the calibration data came from memory, so a report does not say where it is to be had")
    first, *others = map(_source_of, used)
    if any(other != first for other in others):
        raise ValueError("the stages were given different calibration data, and a recipe has one for all of them")
    return first


def _source_of(facts: Mapping[str, Any]) -> CalibrationSource:
    read_as = {name: facts[name] for name in ("max_length", "batch_size", "text_column") if name in facts}
    return CalibrationSource(facts["source"], facts.get("asked"), seed=facts.get("drawn_with"), **read_as)
