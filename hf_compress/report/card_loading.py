"""How a model is loaded, for its card."""

from __future__ import annotations

import json

import transformers
from huggingface_hub import ModelCard

from hf_compress.report.card_facts import Facts
from hf_compress.report.card_summary import INSTALL
from hf_compress.report.markdown import fence

_SOMEWHERE = "path/to/"  # stands for the folders above a model's own, which a card does not tell
_REPLACE = "# Replace the path by that of the folder that holds this card."


def loading(facts: Facts) -> str:
    """The section: the lines that load the model, and what they need."""
    cls = type(facts.model).__name__
    auto = facts.auto_class or cls
    place = _quoted(facts.details.repo_id or f"{_SOMEWHERE}{facts.name}")
    tokenizer = ["AutoTokenizer"] if facts.details.tokenizer and facts.model.main_input_name == "input_ids" else []
    lines = ["import hf_compress  # teaches Transformers the model's structure"] if facts.needs_plugin else []
    if hasattr(transformers, auto):
        lines += [f"from transformers import {', '.join([auto, *tokenizer])}"]
    else:
        lines += [f"# {cls} is no part of Transformers: import it from where it is defined."]
        lines += ["from transformers import AutoTokenizer"] if tokenizer else []
    lines += ["", *([] if facts.details.repo_id else [_REPLACE])]
    lines += [f"model = {auto}.from_pretrained({place})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({place})"] if tokenizer else []
    text = "It is a plain checkpoint: stock Transformers loads it, without hf_compress."
    if facts.needs_plugin:
        text = (
            f"The plugin hf_compress must be installed (`{INSTALL}`), and imported first, for the model's structure is "
            "one that its class in Transformers does not have. Without the plugin, stock Transformers stops with a "
            "size-mismatch error."
        )
        if facts.details.portable:
            text += " In place of the import, `trust_remote_code=True` will do, where hf_compress is installed."
    return "\n\n".join(("## How to load it", text, fence("\n".join(lines), "python")))


def for_the_hub(card: ModelCard, name: str, repo_id: str) -> ModelCard:
    """A card that `save` made for a folder called `name`, with an example that loads the model from the Hub."""
    here, there = (f".from_pretrained({_quoted(place)})" for place in (f"{_SOMEWHERE}{name}", repo_id))
    return ModelCard(str(card).replace(f"{_REPLACE}\n", "").replace(here, there))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
