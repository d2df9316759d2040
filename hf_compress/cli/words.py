"""Errors from deep inside in the command line's own words: what is `overwrite=True` in Python is --overwrite here."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable
from traceback import walk_tb
from typing import Any

# name=value, or name= alone: in prose, that is, neither in a path or a quotation nor among the arguments of a call.
_ASSIGNED = re.compile(
    r"""(?<![\w./"'-])(?<!\w\()(?<!--set\ )([a-z]\w*)=(?!=)('[^']*'|"[^"]*"|\[[^\]]*\]|\([^)]*\)|[\w.+-]*\w)?"""
)
# The name of a parameter, which is no other word: with an underscore, or as what a message begins with.
_NAMED = re.compile(r"""(?<![\w./"'-])[a-z]+(?:_[a-z]+)+(?![\w./"'=(-])|^[a-z]+(?= must )""")


def in_its_words(message: str, command: Any) -> str:
    """A message with the parameters that it names as a command has them: options, or `--set` for a method's settings.

    Args:
        message: one that speaks of parameters as Python does.
        command: a command of typer's.
    """
    parameters = {parameter.name: parameter for parameter in command.params}

    def assigned(found: re.Match[str]) -> str:
        name, value = found.groups()
        if (parameter := _parameter(name, parameters)) is not None:
            return _option(parameter, value)
        return _setting(name, value) if "settings" in parameters and name in _settings() else found[0]

    def named(found: re.Match[str]) -> str:
        parameter = _parameter(found[0], parameters) if found.start() == 0 else parameters.get(found[0])
        return found[0] if parameter is None else _option(parameter, None)

    return _ASSIGNED.sub(assigned, _NAMED.sub(named, message))


def _parameter(name: str, parameters: dict[str, Any]) -> Any:
    """The parameter of a command that stands for a name; whichever amount a method counts, it is `num` there."""
    if name not in parameters and name.startswith("num_") and name in _settings():
        name = "num"
    if name not in parameters and getattr(parameters.get(name.removesuffix("s")), "multiple", False):
        name = name.removesuffix("s")  # several values there are one option here, given several times
    return parameters.get(name)


def _option(parameter: Any, value: str | None) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    option = parameter.opts[0]
    if value == "False":
        return str(parameter.secondary_opts[0]) if parameter.secondary_opts else f"no {option}"
    if value is None or value == "True":
        return str(option)
    return f"no {option}" if value == "None" else f"{option} {shlex.quote(_plain(value))}"


def _setting(name: str, value: str | None) -> str:
    if value == "None":
        return f"no {name}"
    return f"--set {name}=…" if value is None else f"--set {shlex.quote(f'{name}={_plain(value)}')}"


def _plain(value: str) -> str:
    """A value as it is written on the command line: as in YAML, and dtypes by their names."""
    if value[0] in "'\"":
        return value[1:-1]
    if value[0] == "(":
        return f"[{value[1:-1]}]"
    return {"True": "true", "False": "false"}.get(value, value.removeprefix("torch."))


def _settings() -> Iterable[str]:
    """The settings of all methods that have been imported; a method that speaks has been."""
    config = sys.modules.get("hf_compress.methods.base.settings")
    return config.setting_names() if config is not None else ()


def unloadable(error: BaseException) -> str | None:
    """The folder or name of the model or tokenizer whose loading has failed with an error; None where none has."""
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code.co_name == "from_pretrained":
            name = frame.f_locals.get("pretrained_model_name_or_path")
            return None if name is None else str(name)
    return None
