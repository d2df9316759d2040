"""heal(): a compressed model learns from the uncompressed one what it has lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_compress.anatomy.compressible import check_model
from hf_compress.calibration.data import Calibration, DataOptions, draw, prepare
from hf_compress.calibration.files import is_source
from hf_compress.calibration.media import Kind, Processor, columns_of, kind_of, kind_read, tokenizer_of
from hf_compress.calibration.padding import pad_id, padded
from hf_compress.calibration.progress import shows_bars
from hf_compress.calibration.reading import has_length, take
from hf_compress.calibration.sampling import indices
from hf_compress.calibration.tables import dimensions, table_of
from hf_compress.modules.compact import CompactLinear
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.report.history import add_stage, history_of, model_size
from hf_compress.report.stages import HEAL, Size, Stage, Step
from hf_compress.training.distillation import Distillation, check_teacher, corresponding_blocks
from hf_compress.training.heal_config import DistillationConfig
from hf_compress.training.objective import Objective, ObjectiveCallback, Terms
from hf_compress.training.optimizer import check_trainable


@torch_defaults()
def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Any,
    tokenizer: Processor | None = None,
    lora: LoraConfig | Literal["default"] | None = "default",
    distillation: DistillationConfig | None = None,
    args: TrainingArguments | None = None,
    options: DataOptions | None = None,
) -> PreTrainedModel:
    """Train `model` in place to do what `teacher` does. **Changes the model it is given**, and returns it.

    By distillation: on its distribution and, where blocks correspond, on its residual stream; see `Distillation`.

    Args:
        model: compressed, say, by `compress`.
        teacher: the model as it was before, with the same vocabulary or labels.
        dataset: texts, images, sounds, token ids or pixel values as for `compress`; or anything with labels that a
            Trainer takes: a `datasets.Dataset` or a list of mappings, whose text is tokenized. Labels of tokens may be
            of any lengths. Of what has no length 4,096 samples are drawn, unless `args` say how many steps there are.
        tokenizer: for texts, and to pad rows of a dataset; or the processor for images and sounds, as for `compress`.
        lora: adapters to train, merged into the weights at the end: all linear maps with rank 16 by default; None
            trains all weights. Packed and sparse linear maps cannot take in an adapter without loss, so where there are
            any, the default is None: the sparse ones learn, and of a packed model what is not packed.
        distillation: what the loss is made of.
        args: of the Trainer; one epoch over the dataset when not given, 8 samples a step, at a learning rate of 1e-3
            with adapters and 1e-4 without.
        options: length and column of texts; how many samples to draw.

    Returns:
        `model`. The healing is the last stage of its `compression_report`.

    Raises:
        ValueError, TypeError: bad settings, data or models; adapters on packed or sparse linear maps. Errors and
            interruptions leave the model as it was with adapters, and half trained without.
    """
    check_model(model)
    distillation = distillation or DistillationConfig()
    history, size, start = history_of(model), model_size(model), perf_counter()
    trained = learn(model, teacher, dataset, tokenizer, lora, distillation, args, options)
    seconds = perf_counter() - start
    stage = stage_of_healing(asdict(distillation), size, model_size(model), trained, teacher, seconds)
    add_stage(model, stage, history)
    return model


@dataclass(frozen=True)
class Learned:
    """What training came to.

    Attributes:
        steps: of the optimizer.
        loss: the mean over them.
        adapters: whether it was of adapters.
    """

    steps: int
    loss: float
    adapters: bool


def learn(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Any,
    tokenizer: Processor | None,
    lora: LoraConfig | Literal["default"] | None,
    distillation: DistillationConfig,
    args: TrainingArguments | None,
    options: DataOptions | None,
) -> Learned:
    """Train `model` in place; its history gets nothing. Arguments and errors are those of `heal`."""
    check_model(model)
    check_teacher(model, teacher)
    lora = _fitting(model, lora)
    endless = args is not None and args.max_steps > 0  # then a stream may be
    rows, collator = _training_data(dataset, model, tokenizer, options, bounded=not endless)
    with TemporaryDirectory() as folder:
        args = args or default_arguments(folder, adapters=lora is not None)
        if args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor leaves no room for a teacher: set it to 0")
        with _adapters(model, lora) as student:
            callback = ObjectiveCallback()
            trainer = Trainer(student, args, data_collator=collator, train_dataset=rows, callbacks=[callback])
            trainer.remove_callback(PrinterCallback)
            pairs = _pairs(model, teacher, distillation)
            teaching = Distillation(model, teacher, pairs, distillation.temperature, trainer.accelerator.autocast)
            callback.objective = Objective(student, _terms(teaching, distillation))
            with teaching.watching():
                result = trainer.train()
    return Learned(result.global_step, result.training_loss, lora is not None)


def stage_of_healing(
    config: dict[str, Any],
    before: Size,
    after: Size,
    trained: Learned,
    teacher: PreTrainedModel,
    seconds: float,
    data: Calibration | None = None,
) -> Stage:
    """The stage of a model's history that a training was; it tells how many stages the teacher had gone through."""
    return Stage(
        method=HEAL,
        config=config,
        before=before,
        after=after,
        edits=[],
        notes={**asdict(trained), "taught_by": len(told.stages) if (told := history_of(teacher)) else 0},
        steps=[Step("train", seconds)],
        calibration=data.describe() if data else {},
        parity=None,
    )


def _pairs(model: PreTrainedModel, teacher: PreTrainedModel, distillation: DistillationConfig) -> list[tuple[int, int]]:
    """Of the blocks to compare; none in encoder-decoders, which have two streams."""
    return (
        corresponding_blocks(model, teacher)
        if distillation.stream_weight and not model.config.is_encoder_decoder
        else []
    )


def _terms(teaching: Distillation, distillation: DistillationConfig) -> Terms:
    def terms(
        inputs: dict[str, Any], output: Any, loss: Tensor | None, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        divergence, streams = teaching.losses(inputs, output, weight)
        taught = divergence if streams is None else divergence + distillation.stream_weight * streams
        own = None if loss is None or not distillation.label_share else distillation.label_share * loss
        return own, (1 - distillation.label_share) * taught

    return terms


def _fitting(model: PreTrainedModel, lora: Any) -> LoraConfig | None:
    """The adapters to train; by default on all linear maps, where every one of them can take in what was learned."""
    if lora is None or isinstance(lora, LoraConfig):
        return lora
    if lora != "default":
        raise TypeError(f"lora must be a peft.LoraConfig, 'default', or None for all weights; got {lora!r}")
    return adapters_for(model, rank=16)


def adapters_for(model: PreTrainedModel, rank: int) -> LoraConfig | None:
    """Adapters on all linear maps; none where one of them cannot take in what was learned, or for rank 0."""
    compact = any(isinstance(module, CompactLinear) for module in model.modules())
    return None if compact or not rank else LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def _check_mergeable(student: Any) -> None:
    """Raise ValueError where an adapter stands beside weights that cannot take it in."""
    for path, layer in student.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), CompactLinear):
            raise ValueError(
                f"the linear map {path} is packed or sparse, and an adapter cannot be merged into it without loss: "
                "leave lora out, name other target_modules, or train adapters of your own with peft.get_peft_model "
                "and keep them beside the model"
            )


@contextmanager
def _adapters(model: PreTrainedModel, lora: LoraConfig | None) -> Iterator[Any]:
    """What to train: the model itself, or adapters on it, which are merged at the end and taken off on errors."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    mode, cached = model.training, vars(model.config).get("use_cache")  # a Trainer switches the cache off
    if lora is None:
        check_trainable(model)
    student: Any = model if lora is None else get_peft_model(model, lora)
    try:
        if lora is not None:
            _check_mergeable(student)
        yield student
        if lora is not None:
            student.merge_and_unload()
    except BaseException:
        if lora is not None:
            student.unload()
        raise
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        model.train(mode)
        vars(model.config).pop("use_cache", None)
        if cached is not None:
            model.config.use_cache = cached


def default_arguments(folder: str, adapters: bool, **more: Any) -> TrainingArguments:
    """Of one epoch, 8 samples a step, with all bars and logs on the terminal alone; `more` wins."""
    values: dict[str, Any] = {
        "num_train_epochs": 1,
        "learning_rate": 1e-3 if adapters else 1e-4,
        "warmup_steps": 0.05,  # of all steps
        "lr_scheduler_type": "cosine",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": not shows_bars(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(folder, **values | more)


def _training_data(
    data: Any,
    model: PreTrainedModel,
    tokenizer: Processor | None,
    options: DataOptions | None,
    bounded: bool,
) -> tuple[Any, _Collator]:
    """A dataset for a Trainer, and what makes batches of its rows."""
    collator = _Collator(pad_id(model.config, tokenizer_of(tokenizer)))
    options, wanted = options or DataOptions(), kind_read(model, tokenizer)
    if is_source(data):
        data = draw(data, options, wanted).items
    elif bounded and not has_length(data):
        drawn = take(data, options.max_samples, options.seed)
        drawn.tell(asked=options.max_samples is not None)
        data = drawn.items
    if not isinstance(data, Mapping) and not hasattr(data, "features") and (table := table_of(data)) is not None:
        data = table.rows()
    if _names(data) & {"label", "labels"} and not _has_media(data, wanted):
        if options.max_samples is not None and has_length(data):
            data = [data[index] for index in indices(len(data), options.max_samples, options.seed)]
        return data, collator
    return list(_rows(prepare(data, model, tokenizer, options), model)), collator


def _has_media(data: Any, wanted: Kind | None) -> bool:
    """Whether there are images or sounds among what the rows hold, which the processor turns into inputs."""
    row = data[0] if isinstance(data, list) and data else {}
    return any(columns_of(data)) or any(kind_of(value, wanted) is not None for value in row.values())


def _names(data: Any) -> set[str]:
    """What the rows hold of a dataset for a Trainer; nothing where the data is of another kind."""
    if isinstance(data, list) and data and isinstance(data[0], Mapping):
        return set(data[0]) if dimensions(data[0].get("input_ids")) < 2 else set()  # else it is a batch
    return set(getattr(data, "column_names", None) or ())


def _rows(data: Calibration, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The samples, one by one; texts without their padding. A text without labels is its own."""
    for batch in data:
        labels = batch.labels if batch.targets is None else batch.targets
        mask = batch.inputs.get("attention_mask")
        for index in range(batch.samples):
            row = {name: value[index] for name, value in batch.inputs.items()}
            own = None if labels is None else labels[index].long()
            if mask is not None and "input_ids" in row and own is None:
                row = {"input_ids": row["input_ids"][mask[index].bool()]}
            if own is None and "input_ids" in row and model.can_generate():
                own = row["input_ids"].long()
            row = {name: value if value.is_floating_point() else value.long() for name, value in row.items()}
            yield row if own is None else {**row, "labels": own}


class _Collator:
    """Makes a batch of rows, which may be of different lengths (see `padded`); text beside them is left out."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        return padded([self._named(row) for row in rows], self.pad)

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in row.items() if value is not None and not isinstance(value, str)}
        return {"labels" if name in ("label", "label_ids") else name: value for name, value in kept.items()}
