"""What a method's settings have in common: validation, JSON and YAML, and the registry by method name."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from hf_compress.plan import Plan
    from hf_compress.regimen import Regimen
    from hf_compress.workbench import Workbench

_EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_REGISTRY: dict[str, type[CompressionConfig]] = {}


@dataclass(frozen=True)
class CompressionConfig:
    """Settings of a compression method. A subclass registers itself:

        @dataclass(frozen=True)
        class MyConfig(CompressionConfig, method="mine", paper="https://..."):
            ratio: float = 0.5

            def plan(self, bench: Workbench) -> Plan: ...

    Every field carries `metadata={"help": ...}`, which the command line and the docs show.
    """

    method: ClassVar[str]
    paper: ClassVar[str | None]

    def __init_subclass__(cls, method: str, paper: str | None = None) -> None:
        super().__init_subclass__()
        if method in _REGISTRY:
            raise ValueError(f"method {method!r} is registered already, by {_REGISTRY[method].__name__}")
        cls.method, cls.paper = method, paper
        _REGISTRY[method] = cls
        own = getattr(cls, "__post_init__", None)

        def check(self: CompressionConfig) -> None:
            if own is not None:
                own(self)
            for field in fields(self):
                _check_kind(field.name, getattr(self, field.name), str(field.type))

        cls.__post_init__ = check  # type: ignore[attr-defined]  # what a dataclass calls

    def plan(self, bench: Workbench) -> Plan:
        """Decide what to do to the model on the bench; the model is left as it was.

        Raises:
            ValueError: the settings do not fit the model or the calibration data.
        """
        raise TypeError(f"{type(self).__name__} has no plan(); every method's config defines one")

    def regimen(self) -> Regimen:
        """What to do while a model is trained with these settings, for one run: compress first, then heal."""
        from hf_compress.regimen import Regimen

        return Regimen(self)

    def in_steps(self, bench: Workbench) -> list[CompressionConfig]:
        """Settings that, planned and applied one after another, come to the same amount: for training in between.

        Raises:
            ValueError: the method cannot be cut into steps.
        """
        raise ValueError(f"{type(self).__name__} cannot be cut into steps; leave out every=")

    def to_dict(self) -> dict[str, Any]:
        """The fields and the method's name: JSON values only, the inverse of `from_dict`."""
        return {"method": self.method, **asdict(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> CompressionConfig:
        """The config that `values` describes. Unknown keys, as from a newer version, are dropped with a warning."""
        values = dict(values)
        if "method" not in values:
            raise ValueError(
                f"a config needs the key 'method', one of {', '.join(method_names())}; got {sorted(values)}"
            )
        cls = config_class(values.pop("method"))
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            warnings.warn(f"{cls.__name__} does not know {', '.join(unknown)}; ignored", stacklevel=2)
        return cls(**{key: value for key, value in values.items() if key in known})

    @staticmethod
    def from_yaml(path: str | Path) -> CompressionConfig:
        """The config in a recipe file (YAML or JSON): `method` and the config's own fields."""
        return CompressionConfig.from_dict(read_recipe(path))

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def config_class(method: str) -> type[CompressionConfig]:
    """The config class registered under a method's name."""
    if method not in method_names():
        raise ValueError(f"unknown method {method!r}; known are {', '.join(method_names())}")
    return _REGISTRY[method]


def method_names() -> list[str]:
    """The names of all methods, in alphabetical order."""
    import hf_compress.methods as methods

    for module in iter_modules(methods.__path__):
        import_module(f"{methods.__name__}.{module.name}")
    return sorted(_REGISTRY)


def setting_names() -> set[str]:
    """The names of the settings of all methods that have been imported so far."""
    return {field.name for cls in _REGISTRY.values() for field in fields(cls)}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings in a recipe file.

    Raises:
        ValueError: it is no YAML, or no mapping of words.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        found = type(values).__name__ if not isinstance(values, dict) else f"the fields {[*values]}"
        raise ValueError(f"{path}: a recipe is a mapping, 'method' and its fields; got {found}")
    return {name: as_number(value) for name, value in values.items()}


def parse_yaml(text: str, source: str) -> Any:
    """What `text` holds as YAML; ValueError, naming `source`, where it is none."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from None


def as_number(value: Any) -> Any:
    """A number that YAML takes for a word, such as 1e-5, as Python and JSON write it; anything else as it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.match(value) else value


def check_ratio(name: str, value: float | None) -> None:
    """Raise unless `value` is None or strictly between 0 and 1."""
    if value is not None and not (is_number(value) and 0 < value < 1):
        raise ValueError(f"{name} must lie strictly between 0 and 1 (a fraction of the blocks); got {value!r}")


def check_choice(name: str, value: str, choices: list[str] | tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}; got {value!r}")


def check_at_least(name: str, value: int | float | None, least: int | float) -> None:
    """Raise unless `value` is None or a number not below `least`; a whole one where `least` is."""
    whole = isinstance(least, int)
    if value is not None and not (is_number(value) and value >= least and (isinstance(value, int) or not whole)):
        raise ValueError(f"{name} must be a {'whole ' * whole}number of at least {least}; got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a number above 0."""
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name} must be a number above 0; got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """Raise unless `value` is a number, and not below 0."""
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} must be a number of at least 0; got {value!r}")


def check_share(name: str, value: float) -> None:
    """Raise unless `value` is a number from 0 to 1, both included."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie between 0 and 1; got {value!r}")


def _check_kind(name: str, value: Any, annotation: str) -> None:
    """Raise where a value is none of the kinds that an annotation names, as "no", which is true, for a bool."""
    kinds = [_KINDS.get(kind) for kind in annotation.split(" | ")]
    if None not in kinds and not any(check(value) for check in kinds if check is not None):
        raise ValueError(f"{name} must be {annotation.replace(' | ', ' or ')}; got {value!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "float": is_number,
    "int": lambda value: isinstance(value, int) and is_number(value),
    "None": lambda value: value is None,
    "str": lambda value: isinstance(value, str),
}
