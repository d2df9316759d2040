"""The matrix: which architectures survive losing blocks, which are refused and why, which cannot be built tiny.

python -m tests.helpers.matrix [TYPE ...]       prints what becomes of these types, or of all
python -m tests.helpers.matrix --write          writes docs/architectures.md
"""

import argparse
import contextlib
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.errors import UnsupportedModelError
from tests.helpers import tiny, variants
from tests.helpers.changes import Outcome, check_message, outcomes

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
LONGEST_REASON = 150
SURVIVES, PARTLY, REFUSED, CANNOT = "survives", "survives, with exceptions", "refused", "cannot be built tiny"


# What errors say, as the table says it.
PLAIN_WORDS = {
    r"^the config cannot express what is left of the model: ": "",
    r"^a model rebuilt from the config would have missing keys: ": "by the config, there would have to be ",
    r"^a model rebuilt from the config would have unexpected keys: ": "by the config, there is no place for ",
    r"^a model rebuilt from the config would have mismatched keys: ": "by the config, of another shape: ",
    r"^the model does not run after the change( with .* left out)?: ": "does not run: ",
    r"\b(?!KeyError|IndexError)\w+Error: ": "",
    r"`get_seq_length` can only be called on Attention layers.*": "the cache needs at least one block with attention",
    r"There is an issue with your definition of `tie_weights_keys`.*": "blocks share weights, by their indices",
}


@dataclass(frozen=True)
class Family:
    """Model types that are built and taken apart in the same way."""

    title: str
    types: tuple[str, ...]
    build: Callable[[str], PreTrainedModel]


FAMILIES: dict[str, Family] = {
    "causal": Family("Causal language models", tuple(tiny.CAUSAL_LM_TYPES), tiny.tiny_model),
    "encoder": Family("Encoders of text, pictures and sound", tuple(tiny.ENCODER_TYPES), tiny.tiny_base_model),
    "seq2seq": Family("Encoder-decoders", tuple(tiny.SEQ2SEQ_TYPES), tiny.tiny_seq2seq_model),
    "vlm": Family("Vision-language models", tuple(tiny.VISION_LANGUAGE_TYPES), tiny.tiny_vision_language_model),
    "settings": Family(
        "Settings other than the defaults, by which the place of a block matters",
        tuple(variants.BY_NAME),
        lambda name: variants.BY_NAME[name].build(),
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What the matrix says of one stack of one model type; `equal`: for how many changes it is the original without."""

    name: str
    status: str
    equal: str = ""
    why: str = ""

    @property
    def row(self) -> str:
        """Its line in the table."""
        return f"| `{self.name}` | {self.status} | {self.equal} | {self.why.replace('|', '/')} |"


def verdicts(family: Family, model_type: str) -> list[Verdict]:
    """What becomes of a model type: one verdict for each of its stacks, the one that is cut by default first.

    Raises:
        MatrixFailure: it neither survives nor is refused as it should be.
    """
    try:
        model = family.build(model_type)
    except tiny.CannotBuild as error:
        return [Verdict(model_type, CANNOT, why=str(error))]
    try:
        anatomy = Anatomy(model)
        first = anatomy.stack()
    except UnsupportedModelError as error:
        check_message(str(error), model)
        return [Verdict(model_type, REFUSED, why=reason(str(error)))]
    others = [stack for stack in anatomy.stacks if stack is not first]
    names = {first.path: model_type} | {stack.path: f"{model_type}, {stack.path}" for stack in others}
    return [_verdict(name, lambda: family.build(model_type), path) for path, name in names.items()]


def _verdict(name: str, build: Callable[[], PreTrainedModel], path: str) -> Verdict:
    results = list(outcomes(build, path))
    refused = [result for result in results if result.refusal is not None]
    equal = f"{len(results) - len(refused)} of {len(results)}"
    if not refused:
        return Verdict(name, SURVIVES, equal)
    return Verdict(name, REFUSED if len(refused) == len(results) else PARTLY, equal, _why(refused, len(results)))


def _why(refused: list[Outcome], tried: int) -> str:
    """The changes that were refused, gathered by their reasons; reasons that differ in numbers alone count as one."""
    reasons: dict[str, str] = {}
    changes: dict[str, list[str]] = {}
    for result in refused:
        why = reason(result.refusal or "")
        key = re.sub(r"[\d.]+", "#", why)
        reasons.setdefault(key, why)
        changes.setdefault(key, []).append(result.change)
    if len(reasons) == 1 and len(refused) == tried:
        return next(iter(reasons.values()))
    return "; ".join(f"not {', '.join(changes[key])}: {why}" for key, why in reasons.items())


def reason(message: str) -> str:
    """The part of a refusal that says what is in the way, short enough for a table."""
    message, hint, places = message.partition(" (the config places blocks by ")
    names_the_part = " keys: " in message or " would be " in message
    for pattern, words in PLAIN_WORDS.items():
        message = re.sub(pattern, words, message)
    message = _shorten(message, LONGEST_REASON)
    if names_the_part:
        return message
    return f"{message} ({_shorten(places.rstrip(')'), LONGEST_REASON // 2)})" if hint else message


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: text.rfind(" ", 0, longest)].rstrip(",:; ") + " …"


COUNTS = """## Causal language models: the three counts

| | model types |
|---|---|
| survive | {survive} (of these {partly} with exceptions, named below) |
| refused | {refused} |
| cannot be built tiny | {cannot} |
| in the mapping | {total} |
"""
TABLE = """## {title}

| model type, and stack where it is not the first choice | verdict | equal | why |
|---|---|---|---|"""


def document(tables: dict[str, list[Verdict]]) -> str:
    """The text of docs/architectures.md: what it says before the tables, which is written by hand, and these."""
    counts = Counter(verdict.status for verdict in tables["causal"] if ", " not in verdict.name)
    words = DOCUMENT.read_text(encoding="utf-8").partition("\n## Causal language models: ")[0]
    parts = [
        re.sub(r"(?<=Transformers )[\d.]+\d", transformers.__version__, words),
        COUNTS.format(
            survive=counts[SURVIVES] + counts[PARTLY],
            partly=counts[PARTLY],
            refused=counts[REFUSED],
            cannot=counts[CANNOT],
            total=sum(counts.values()),
        ),
    ]
    for key, found in tables.items():
        rows = [verdict.row for verdict in sorted(found, key=lambda verdict: verdict.name)]
        parts.append("\n".join([TABLE.format(title=FAMILIES[key].title), *rows, ""]))
    return "\n".join(parts)


def documented(text: str) -> dict[str, dict[str, Verdict]]:
    """The tables of the document, by family and name."""
    titles = {family.title: key for key, family in FAMILIES.items()}
    tables: dict[str, dict[str, Verdict]] = {}
    table: dict[str, Verdict] | None = None
    for line in text.splitlines():
        if line.startswith("## "):
            key = titles.get(line.removeprefix("## "))
            table = tables.setdefault(key, {}) if key else None
        elif table is not None and line.startswith("| `"):
            name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            table[name.strip("`")] = Verdict(name.strip("`"), *rest)
    return tables


def run(wanted: Iterable[str]) -> tuple[dict[str, list[Verdict]], list[str]]:
    """The tables of these types, or of all when none is named, and the failures."""
    wanted, failures = set(wanted), []
    tables: dict[str, list[Verdict]] = {key: [] for key in FAMILIES}
    for key, family in FAMILIES.items():
        for model_type in family.types:
            if wanted and model_type not in wanted:
                continue
            start = time.perf_counter()
            try:
                with contextlib.redirect_stdout(None):  # some models print
                    found = verdicts(family, model_type)
            except Exception as error:
                failures.append(f"{key} {model_type}: {type(error).__name__}: {str(error)[:500]}")
                print("FAILED", failures[-1], flush=True)
                continue
            tables[key].extend(found)
            for verdict in found:
                print(f"{time.perf_counter() - start:5.2f} s {key:8} {verdict.row}", flush=True)
    return tables, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all when none is named")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    arguments = parser.parse_args()
    if arguments.write and arguments.types:
        parser.error("--write is about all types; name none")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tables, failures = run(arguments.types)
    print(dict(Counter(verdict.status for found in tables.values() for verdict in found)))
    if arguments.write and not failures:
        DOCUMENT.write_text(document(tables), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
