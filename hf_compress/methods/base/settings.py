"""What the settings of all methods have in common: data that checks itself, found by the name of its method."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, Self

from hf_compress.checks import check_fields, check_names
from hf_compress.methods.base.amounts import AMOUNT, Amount
from hf_compress.methods.base.files import push_settings, read_settings, write_settings
from hf_compress.methods.base.recipes import read_recipe

_REGISTRY: dict[str, type[CompressionConfig]] = {}


@dataclass(frozen=True)
class CompressionConfig:
    """Settings of a compression method: data, and nothing that works with it (see `registry`).

        @dataclass(frozen=True)
        class MyConfig(CompressionConfig, method="mine", paper="https://..."):
            ratio: float | None = setting(None, "share of the blocks to leave out", "(0, 1)", group=AMOUNT)

    Fields are checked by their annotations and metadata (see `setting`). A `__post_init__`, which comes after, has only
    to say what must hold between them.
    """

    method: ClassVar[str]
    paper: ClassVar[str | None]

    def __init_subclass__(cls, method: str, paper: str | None = None) -> None:
        super().__init_subclass__()
        if taken := next((name for name in _REGISTRY if _bare(name) == _bare(method)), None):
            raise ValueError(f"method {taken!r} is registered already, by {_REGISTRY[taken].__name__}")
        cls.method, cls.paper = method, paper
        _REGISTRY[method] = cls
        own = getattr(cls, "__post_init__", None)

        def check(self: CompressionConfig) -> None:
            check_fields(self)
            if own is not None:
                own(self)

        cls.__post_init__ = check  # type: ignore[attr-defined]  # what a dataclass calls

    def __new__(cls, *_: Any, **values: Any) -> Self:
        cls.check_names(values)
        return super().__new__(cls)

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raise TypeError for a name that is no setting; it says which may be meant."""
        own, names = [field.name for field in fields(cls)], list(names)
        if set(names) <= set(own):
            return  # without a look at the other methods
        words = [field.name for field in fields(cls) if field.metadata.get("group") == AMOUNT]
        hints = dict.fromkeys(_amount_words(), f"say how much by {'= or '.join(words)}=")
        check_names(cls.method, names, own, hints)

    @property
    def amount(self) -> Amount | None:
        """How much to take out, in the word that was given; None where none was."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("group") == AMOUNT and value is not None:
                return Amount(field.name, value, field.metadata.get("keeps", False))
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields and the method's name: JSON values only, the inverse of `from_dict`."""
        values = asdict(self)
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {"method": self.method, **values, **lists}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> CompressionConfig:
        """The config that `values` describes. Unknown keys, as from a newer version, are dropped with a warning.

        Raises:
            ValueError: no method, or no such method; settings that make no sense.
            TypeError: another method's word for how much to take out.
        """
        values = dict(values)
        if "method" not in values:
            raise ValueError(
                f"a config needs the key 'method', one of {', '.join(method_names())}; got {sorted(values)}"
            )
        cls = config_class(values.pop("method"))
        known = {field.name for field in fields(cls)} | _amount_words()
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

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the settings into a folder, as compression_config.json; the path of the file."""
        return write_settings(self.to_json(), folder)

    @classmethod
    def from_pretrained(cls, name: str | Path, **where: Any) -> Self:
        """The settings that `save_pretrained` or `push_to_hub` wrote.

        Args:
            name: a folder, a file, or a repository on the Hub.
            where: of a repository, as `huggingface_hub.hf_hub_download` takes it: `revision`, `subfolder`, `token`,
                `cache_dir`, `local_files_only`.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they make no sense.
            TypeError: they are another method's.
        """
        found = CompressionConfig.from_dict(read_settings(name, **where))
        if not isinstance(found, cls):
            raise TypeError(f"{name} has settings of {found.method}: read them by {type(found).__name__}")
        return found

    def push_to_hub(self, repo_id: str, commit_message: str = "Upload settings with hf_compress", **where: Any) -> Any:
        """Put the settings into a repository of the Hub, which is made where there is none.

        Args:
            where: `token`, `private` for a new repository, `revision`, `create_pr`, as
                `huggingface_hub.HfApi.upload_file` takes them.

        Returns:
            The commit, a `huggingface_hub.CommitInfo`.
        """
        return push_settings(self.to_json(), repo_id, commit_message, **where)


def config_class(method: str) -> type[CompressionConfig]:
    """The config class registered under a method's name, however that is written: "LayerCollapse", "layer-collapse".

    Raises:
        ValueError: there is no such method.
    """
    names = {_bare(name): name for name in method_names()}
    if _bare(method) not in names:
        close = difflib.get_close_matches(_bare(method), names, n=1)
        hint = f" (did you mean {names[close[0]]!r}?)" if close else ""
        raise ValueError(f"unknown method {method!r}{hint}; known are {', '.join(names.values())}")
    return _REGISTRY[names[_bare(method)]]


def settings_of(config: CompressionConfig | str, given: Mapping[str, Any]) -> CompressionConfig:
    """The settings of a call: those that it was given whole, or a method's name and those beside it.

    Raises:
        ValueError: there is no such method, or it refuses its settings.
        TypeError: some are beside settings that are whole, or are no settings of the method.
    """
    if isinstance(config, str):
        return config_class(config)(**given)
    if given:
        known = type(config).__name__ if isinstance(config, CompressionConfig) else "MKAConfig"
        raise TypeError(
            f"{', '.join(given)}: settings belong inside the config, {known}({next(iter(given))}=…), or beside the "
            "name of a method, compress(model, 'mka', ratio=0.25)"
        )
    return config


def _bare(name: str) -> str:
    """A method's name without what is a matter of taste."""
    return str(name).lower().translate(str.maketrans("", "", "-_ "))


def method_names() -> list[str]:
    """The names of all methods, in alphabetical order."""
    methods = import_module("hf_compress.methods")  # from here on upward: whoever is there registers
    for module in iter_modules(methods.__path__):
        import_module(f"{methods.__name__}.{module.name}")
    return sorted(_REGISTRY)


def setting_names() -> set[str]:
    """The names of the settings of all methods that have been imported so far."""
    return {field.name for cls in _REGISTRY.values() for field in fields(cls)}


def _amount_words() -> set[str]:
    """The settings that say how much to take out, in all methods."""
    every = [field for method in method_names() for field in fields(config_class(method))]
    return {field.name for field in every if field.metadata.get("group") == AMOUNT}
