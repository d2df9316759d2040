"""The lower bounds that pyproject.toml declares are the versions that `make lowest` runs the tests with."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TRIED = ("compressed-tensors", "evaluation", "test")  # the extras that are installed there


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def declared() -> list[str]:
    return PROJECT["dependencies"] + [line for extra in TRIED for line in PROJECT["optional-dependencies"][extra]]


@pytest.mark.parametrize("line", declared())
def test_the_bound_is_the_version_that_was_tried(line):
    requirement = Requirement(line)
    (bound,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
    lowest = pins("constraints-lowest.txt")[canonicalize_name(requirement.name)]
    assert lowest.release[: len(bound.release)] == bound.release
    assert pins("constraints.txt").get(canonicalize_name(requirement.name), lowest) in requirement.specifier
