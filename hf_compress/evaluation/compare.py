"""Two models or more, measured on the same data, one after another; their speed in turn."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import PreTrainedModel

from hf_compress.calibration.reading import read_texts
from hf_compress.errors import one_line
from hf_compress.evaluation.comparison import Comparison, file_name
from hf_compress.evaluation.evaluate import EvaluationResult, evaluate, load_on
from hf_compress.evaluation.harness import Paths, check_tasks
from hf_compress.evaluation.kinds import (
    check_classifies,
    check_generates,
    check_predicts_text,
    metric_of_text,
    reads_tokens_alone,
)
from hf_compress.evaluation.labelled import read_labelled
from hf_compress.evaluation.loading import saved_class
from hf_compress.evaluation.processors import load_processor
from hf_compress.evaluation.size import stored_bytes
from hf_compress.evaluation.speed import Speed, speeds_in_turn

logger = logging.getLogger(__name__)

Model = PreTrainedModel | str | Path
COMPARISON_FILE = "comparison.json"


def compare(  # noqa: PLR0913 (as `evaluate`)
    models: Mapping[str, Model] | Sequence[str | Path],
    tokenizer: Any = None,
    *,
    tasks: str | Sequence[str] = (),
    texts: Iterable[str] | None = None,
    labelled: Any = None,
    include_path: Paths | None = None,
    batch_size: int = 8,
    limit: int | float | None = None,
    speed: bool = True,
    device: str | None = None,
    output_dir: str | Path | None = None,
) -> Comparison:
    """Measure several models on the same data, and how each differs from the first, document by document.

    Documents differ more than models do. So the error of a difference that is taken document by document is far below
    those of the two figures, and tells what is a difference and what is chance.

    Models in directories are in memory one at a time. For their speed all run in turn, A B C A B C …; where less than
    twice what they take is free, the first and one of the others do.

    Args:
        models: Live models or directories by name, or directories alone; the first is the one that the others are held
            against, usually the uncompressed one.
        tokenizer: Of all models; needed with live ones. Default: each directory's own, or the first's where it has
            none.
        tasks, texts, labelled, include_path, batch_size, limit, device: As for `evaluate`.
        speed: Whether to time the models and to watch the memory that they need, where they run on token ids alone.
        output_dir: Where to write `comparison.json` and, in a folder for each model, what `evaluate` writes.

    Raises:
        ImportError, TypeError, UnsupportedModelError, FileNotFoundError: As for `evaluate`.
        OSError: A directory holds no model.
        ValueError: Fewer than two models, or one of them twice; or as for `evaluate`.
    """
    named = _named(models)
    for model in named.values():
        check_metrics(model, texts is not None, bool(tasks), labelled is not None)
    if tasks:
        check_tasks(tasks, include_path)
    reads = texts is not None or bool(tasks) or labelled is not None
    if texts is not None:
        texts = read_texts(texts)
    if labelled is not None:
        labelled = read_labelled(labelled, limit)
    folder = None if output_dir is None else Path(output_dir)
    results: dict[str, EvaluationResult] = {}
    processor = None
    for name, model in named.items():
        own = tokenizer
        if own is None and not isinstance(model, PreTrainedModel) and reads:
            own = _own_processor(model, processor)
            processor = own if processor is None else processor
        results[name] = evaluate(
            model,
            own,
            tasks=tasks,
            texts=texts,
            labelled=labelled,
            include_path=include_path,
            batch_size=batch_size,
            limit=limit,
            speed=False,
            device=device,
            output_dir=None if folder is None else folder / file_name(name),
        )
        _free()
    comparison = Comparison(results, _speeds(named, device) if speed else {})
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMPARISON_FILE).write_text(comparison.to_json() + "\n", encoding="utf-8")
    return comparison


def _named(models: Any) -> dict[str, Model]:
    """The models by name; directories by as many of their last folders as tell them apart."""
    if isinstance(models, Mapping):
        named = {str(name): model for name, model in models.items()}
    elif isinstance(models, (list, tuple)) and all(isinstance(model, (str, Path)) for model in models):
        named = _by_last_folders([Path(model) for model in models], list(models))
    else:
        raise TypeError(
            f"models is a {type(models).__name__}; expected directories, or a mapping of names to models or directories"
        )
    if len(named) < 2:
        raise ValueError(f"models must be two or more; got {list(named) or 'none'} (evaluate() measures one)")
    seen: dict[Any, str] = {}
    for name, model in named.items():
        place = id(model) if isinstance(model, PreTrainedModel) else Path(model).resolve()
        if place in seen:
            raise ValueError(f"models has the same one twice, as {seen[place]!r} and {name!r}: leave one of them out")
        seen[place] = name
    return named


def _by_last_folders(paths: Sequence[Path], models: Sequence[Model]) -> dict[str, Model]:
    resolved = [path.resolve() if path.exists() else path for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(str(path) for path, place in zip(paths, resolved, strict=True) if resolved.count(place) > 1)
        raise ValueError(f"models has the same one twice: {twice}; leave one of them out")
    for count in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-count:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, models, strict=True))


def check_metrics(model: Model, texts: bool, tasks: bool, labelled: bool) -> None:
    """Raise where what is to be measured does not fit a model, before any weight of one in a directory is read."""
    kind, config = (type(model), model.config) if isinstance(model, PreTrainedModel) else saved_class(str(model))
    if metric := metric_of_text(texts, tasks):
        if isinstance(model, PreTrainedModel):
            check_predicts_text(model, metric)
        else:
            check_generates(kind, metric)
    if labelled:
        check_classifies(kind, config)


def _own_processor(model: str | Path, first: Any) -> Any:
    """The tokenizer or image processor of a directory; that of the first model where it has none."""
    try:
        return load_processor(str(model), needed=True)
    except (OSError, ValueError, KeyError) as error:
        if first is None:
            raise
        logger.warning("%s has no tokenizer that loads, so the first model's is used (%s)", model, one_line(error))
        return first


def _speeds(named: Mapping[str, Model], device: str | None) -> dict[str, tuple[Speed, Speed]]:
    """The first model's speed and each other's, in turn; nothing of models that need more than token ids.

    All run in turn where there is room for all of them, and otherwise the first with one of the others at a time.
    """
    (first, *others) = named
    reference = _live(named[first], device)
    speeds: dict[str, tuple[Speed, Speed]] = {}
    if not reads_tokens_alone(reference):
        return speeds
    for group in [others] if _fit_together(named.values(), device) else [[name] for name in others]:
        loaded = {name: _live(named[name], device) for name in group}
        models = {name: model for name, model in loaded.items() if reads_tokens_alone(model)}
        if models:
            own, *theirs = speeds_in_turn([reference, *models.values()])
            speeds |= {name: (own, speed) for name, speed in zip(models, theirs, strict=True)}
        del loaded, models
        _free()
    return speeds


def _fit_together(models: Iterable[Model], device: str | None) -> bool:
    """Whether those of the models that are in directories take less than half of the memory that is free."""
    place = torch.device(device or "cpu")
    room = get_max_memory().get("cpu" if place.type == "cpu" else place.index or 0, 0)
    try:
        return sum(stored_bytes(model) for model in models if not isinstance(model, PreTrainedModel)) < int(room) / 2
    except FileNotFoundError:  # a name on the Hub: how large it is, is not known
        return False


def _live(model: Model, device: str | None) -> PreTrainedModel:
    return model if isinstance(model, PreTrainedModel) else load_on(str(model), device)


def _free() -> None:
    """Let go of a model that is no longer used, and of its memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
