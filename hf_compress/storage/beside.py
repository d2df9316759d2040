"""What lies beside a model's weights: its tokenizer, its history, and its card."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from hf_compress.calibration.media import Processor
from hf_compress.report.history import history_of, model_size, read_report
from hf_compress.report.report import REPORT_FILE, CompressionReport
from hf_compress.storage.manifest import CARD_FILE

logger = logging.getLogger(__name__)


def write_beside(
    model: PreTrainedModel,
    folder: Path,
    target: Path,
    tokenizer: Processor | None,
    card: ModelCard | None,
    make_card: Callable[[], ModelCard] | None = None,
) -> None:
    """Write into `folder`, which takes the place of `target`, what goes beside a model.

    A card that is given is written as it is. Without one, that of the target stays where it is this very model's,
    edited perhaps: the report there tells what the model's history tells, or nothing is known of the model and it was
    loaded from there. Otherwise a model with a history gets the card that `make_card` makes, if it is given.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    history = history_of(model)
    if history is not None:
        history.to_json(folder / REPORT_FILE)
    over_itself = Path(model.name_or_path).resolve() == target if model.name_or_path else False
    if over_itself and history is None and not _readable(target):
        shutil.copyfile(target / REPORT_FILE, folder / REPORT_FILE)  # another version may read it
    old_card = target / CARD_FILE
    stays = _tells(target, history, model) if history is not None else over_itself
    if card is None and old_card.is_file() and stays:
        shutil.copyfile(old_card, folder / CARD_FILE)
        return
    if card is None and history is not None and make_card is not None:
        card = make_card()
        if over_itself and old_card.is_file():
            logger.warning("%s is replaced by a new card: what was edited there by hand is gone", old_card)
    if card is not None:
        card.save(folder / CARD_FILE)


def _readable(folder: Path) -> bool:
    """Whether the report in a folder, if there is one, can be read."""
    try:
        read_report(folder)
    except ValueError:
        return False
    return True


def _tells(folder: Path, history: CompressionReport, model: PreTrainedModel) -> bool:
    """Whether the report in a folder is `history`, and the model still as large as it says."""
    try:
        report = read_report(folder)
    except ValueError:
        return False
    return report is not None and report.to_json() == history.to_json() and model_size(model) == report.after
