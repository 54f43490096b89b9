"""The layout of docs/code-map.md: six files at the root, rooms for the rest, imports that point one
way."""

import ast
import graphlib

import pytest
from conftest import ROOT

# Each place may import from those behind it, besides reward.py and verifier/. "Place" is a room, or
# a file of the root.
ORDER = ["tools", "train", "report", "eval", "tasks", "huggingface", "variants", "runtime"]
ORDER += ["mgrpo", "sample"]
ORDER += ["engine", "model"]
MAY_IMPORT = {
    place: {*ORDER[i:], "reward", "verifier"} for i, place in enumerate(ORDER[:-1])
} | dict(
    runtime={"runtime", "engine", "model"},  # it serves any training script: nothing of MGRPO
    sample={"engine", "model"},
    engine={"engine", "model"},
    model=set(),
    reward={"verifier"},
    verifier={"verifier"},
)
ROOT_FILES = {"model", "sample", "reward", "mgrpo", "train", "eval"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for place in MAY_IMPORT
    for path in [*ROOT.glob(f"{place}.py"), *ROOT.glob(f"{place}/**/*.py")]
}
MOST_MODULES = 11  # that a root file imports


def imports(module):
    """-> the modules of this project that a module names, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import hides where it points"
            # `from runtime import flags` names a module, `from model import GPT` does not
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
    return {name for name in found if name.split(".")[0] in MAY_IMPORT}


def place(module):
    return module.split(".")[0]


def test_the_root_holds_the_six_files_of_the_story():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_FILES
    assert MODULES.keys() >= ROOT_FILES and len(MODULES) > 30


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_up(module):
    up = {name for name in imports(module) if place(name) not in MAY_IMPORT[place(module)]}
    assert not up, f"{module} imports {', '.join(sorted(up))}, which stands above it"


def test_no_imports_run_on_a_circle():
    list(graphlib.TopologicalSorter({name: imports(name) for name in MODULES}).static_order())


@pytest.mark.parametrize("module", sorted(ROOT_FILES))
def test_a_root_file_imports_few_modules(module):
    assert len(imports(module)) <= MOST_MODULES
