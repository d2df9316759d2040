"""Imports point down the floors, tests share by `tests.helpers` alone, and `import hf_compress` costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

import hf_compress
from hf_compress.methods.base.settings import config_class, method_names

PACKAGE = Path(hf_compress.__file__).parent
ROOT = PACKAGE.parent
TESTS = Path(__file__).parent

# Lowest first. A module may import from its own room, and from rooms on the floors below.
FLOORS = [
    {"errors", "checks"},
    {"numerics"},
    {"modules", "models"},
    {"plan", "anatomy"},
    {"calibration"},
    {"rewrite"},
    {"attribution", "evaluation", "methods.base"},
    {"methods", "report"},
    {"features", "storage", "training"},
    {"api", "engines"},
    {"cli"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(module: str) -> str:
    return "methods.base" if module.startswith("hf_compress.methods.base") else module.split(".")[1]


def name_of(path: Path) -> str:
    return ".".join(["hf_compress", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def public(name: str) -> str:
    """The module that `from hf_compress import name` imports; none for what stands in the package's own file."""
    return "" if name.startswith("__") else hf_compress._PUBLIC.get(name, f"hf_compress.{name}")


def statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_of(source: str, module: str, package: bool = False) -> list[str]:
    """The modules of hf_compress that a module imports: in functions and under TYPE_CHECKING, too."""
    found: list[str] = []
    for node in statements(source):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif node.level:
            parts = module.split(".")[: None if package and node.level == 1 else -node.level + package]
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found += [base] if node.module else [f"{base}.{alias.name}" for alias in node.names]
        else:
            found += [public(a.name) for a in node.names] if node.module == "hf_compress" else [node.module or ""]
    return [name for name in found if name.startswith("hf_compress.")]


def climbs(source: str, module: str, package: bool = False) -> list[str]:
    """The imports of a module that point up, or to another room of its own floor."""
    here = room(module)
    return [
        name
        for name in imports_of(source, module, package)
        if room(name) != here and LEVEL.get(room(name), len(FLOORS)) >= LEVEL[here]
    ]


def test_no_method_imports_another():
    """What two of them need is in methods.base, or below."""
    for path in (PACKAGE / "methods").rglob("*.py"):
        own = ".".join(name_of(path).split(".")[:3])
        found = imports_of(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")
        others = [name for name in found if name.startswith("hf_compress.methods.") and not name.startswith(own)]
        assert [name for name in others if room(name) != "methods.base"] == [], path


def test_there_are_no_circles():
    sources = {name_of(path): (path.read_text(encoding="utf-8"), path.name == "__init__.py") for path in MODULES}
    graph = networkx.DiGraph()
    for module, (source, package) in sources.items():
        graph.add_edges_from((module, name) for name in imports_of(source, module, package) if name != module)
    assert [found for found in networkx.strongly_connected_components(graph) if len(found) > 1] == []


def test_few_modules_lie_loose():
    assert len(list(PACKAGE.glob("*.py"))) <= 4, "put it into the room that it belongs to"


def test_every_room_has_its_floor():
    rooms = {room(name_of(path)) for path in MODULES}
    assert rooms - {"__main__"} == set(LEVEL), "give a new room its floor, and take away one that is gone"


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__main__"], ids=name_of)
def test_imports_point_down(path):
    assert climbs(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from hf_compress.api.compress import compress", ["hf_compress.api.compress"]),
        ("import hf_compress.methods.mka", ["hf_compress.methods.mka"]),
        ("from hf_compress import methods", ["hf_compress.methods"]),
        ("from hf_compress import MKAConfig, __version__", ["hf_compress.methods.mka"]),
        ("from ..plan.plan import Plan", ["hf_compress.plan.plan"]),
        ("try:\n    import hf_compress.cli\nexcept ImportError:\n    pass", ["hf_compress.cli"]),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_compress.plan.plan import Plan",
            ["hf_compress.plan.plan"],
        ),
        ("def f():\n    from hf_compress.api.compress import compress", ["hf_compress.api.compress"]),
        ("from .registry import Registry\nfrom ..errors import ParityError\nimport torch", []),
    ],
)
def test_what_this_test_can_see(source, expected):
    assert climbs(source, "hf_compress.numerics.ridge") == expected


def test_numerics_know_nothing_of_transformers():
    for path in (PACKAGE / "numerics").glob("*.py"):
        for node in statements(path.read_text(encoding="utf-8")):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.startswith("transformers") for name in names), path


def shared_otherwise(source: str) -> list[str]:
    """What a test takes from other tests, from conftest, from examples or from benchmarks."""
    found: list[str] = []
    for node in statements(source):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        else:
            module = "." * node.level + (node.module or "")
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "tests" else [module]
    foreign = {"", "conftest", "tests", "examples", "benchmarks"} | {path.name for path in TESTS.iterdir()}
    return [name for name in found if name.split(".")[0] in foreign and not name.startswith("tests.helpers")]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_share_by_helpers_alone(path):
    assert shared_otherwise(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from tests.training.test_resume import made", ["tests.training.test_resume"]),
        ("from tests.evaluation.conftest import WORDS", ["tests.evaluation.conftest"]),
        ("from tests import conftest", ["tests.conftest"]),
        ("def f():\n    from examples.round_trip import build", ["examples.round_trip"]),
        ("import anatomy.test_parts", ["anatomy.test_parts"]),
        ("from . import conftest", ["."]),
        ("from .test_lrp import dense", [".test_lrp"]),
        ("import torch\nfrom tests import helpers\nfrom tests.helpers.tiny import tiny_model", []),
    ],
)
def test_what_the_test_of_tests_can_see(source, expected):
    assert shared_otherwise(source) == expected


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "datasets", "matplotlib", "lm_eval", "hf_compress.api.compress")
    assert run(f"import hf_compress, sys; print([n for n in {heavy} if n in sys.modules])") == "[]"


def test_every_public_name_resolves():
    for name in hf_compress.__all__:
        assert getattr(hf_compress, name) is not None
    assert set(hf_compress.__all__) <= set(dir(hf_compress))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hf_compress.nothing  # noqa: B018


def test_star_import():
    names = "['MKAConfig', 'Plan', 'analyze', 'compress', 'evaluate', 'save']"
    code = f"from hf_compress import *; print(all(callable(globals()[n]) for n in {names}), __version__)"
    assert run(code) == f"True {hf_compress.__version__}"


def test_a_public_function_is_no_submodule_of_the_same_name():
    assert run("import hf_compress, hf_compress.api.analyze; print(callable(hf_compress.analyze))") == "True"


@pytest.mark.parametrize("method", method_names())
def test_every_method_has_its_tests_and_its_page(method):
    assert config_class(method).__module__.startswith(f"hf_compress.methods.{method}")
    assert list((ROOT / "tests" / "methods").glob(f"test_{method}*.py")), f"tests/methods/test_{method}.py is missing"
    assert (ROOT / "docs" / f"{method}.md").is_file(), f"docs/{method}.md is missing"
