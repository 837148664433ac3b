"""Imports point downwards only, no framework is imported before it is asked for, and a file is one page or a few."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tensorbridge

ROOT = Path(tensorbridge.__file__).parent

# From the ground up. A module imports modules of the rows below its own, and none of its own row.
LAYERS = [
    {"_eager", "_autograd", "_background", "_commands", "_cuda", "_trees"},
    {"_array", "_errors", "_forks", "_loaded", "_trees._rebuild", "_readonly", "_autograd._svg"},
    {"_cuda._copiers", "_dtypes", "_reentrant", "_roads", "_cuda._streams"},
    {"_step", "_autograd._picture", "_cuda._stream_order", "_cuda._threads"},
    {"_engine", "_refuse", "_words", "_events", "_cuda._lease"},
    {"_rules", "_cuda._staging"},
    {"_plan", "_watch"},
    {"_adapters", "_casting"},
    {"_adapters._made", "_adapters._missing", "_adapters._numbers", "_adapters._numpy"},
    {"_adapters._strangers", "_adapters._arrow", "_adapters._dlpack", "_adapters._python"},
    {"_adapters._torch_cuda", "_adapters._cupy"},
    {"_adapters._columns", "_adapters._foreign", "_adapters._torch_steps"},
    {"_adapters._protocols", "_adapters._torch"},
    {"_memory", "_lanes", "_device_lanes"},
    {"_options"},
    {"_convert", "_cuda._pool"},
    {"_remember"},
    {"_api"},
    {"_autograd._editing"},
    {"_autograd._graph"},
    {"_trees._tables", "_trees._pack", "_trees._tree_lanes"},
    {"_trees._containers"},
    {"_trees._walk"},
    {"_trees._leaf", "_trees._collate"},
    {"_trees._fill"},
    {"_trees._leaves"},
    {"_background._roads"},
    {"_background._worker"},
    {"_trees._tree", "_background._prefetch"},
    {"_trees._tree_plan"},
    {"tree"},
    {"_background._async", "_commands._matrix"},
    {"_commands._info"},
    {"__init__"},
]
USERS = {"_commands._demo", "_commands._why_detach", "_bench", "__main__"}  # they use the package as anybody does
HEIGHT = {name: height for height, row in enumerate(LAYERS) for name in row}
FRAMEWORKS = {"torch", "cupy"}
TOP_LEVEL = {
    "_adapters._torch": {"torch"},
    "_adapters._torch_steps": {"torch"},
    "_adapters._torch_cuda": {"torch"},
    "_adapters._cupy": {"cupy"},
}
IN_FUNCTIONS = {"_trees._pack"}  # packs with whichever of the two holds the arrays


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


MODULES = modules()
OURS = [name for name in MODULES if not {name, name.split(".")[0]} & USERS]


def imports(name: str, *, top_level: bool = False) -> Iterator[str]:
    """What a module imports at run time: ``tensorbridge._plan``, ``torch`` ... Imports for the type checker are not."""
    tree = ast.parse(MODULES[name].read_text())
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if name.removeprefix("tensorbridge.") in MODULES}
            yield from submodules
            if names - submodules:
                yield str(node.module)
        elif not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            nodes += ast.iter_child_nodes(node)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_at_most_400_lines(name):
    assert len(MODULES[name].read_text().splitlines()) <= 400


def test_every_module_has_its_layer():
    assert set(OURS) == set(HEIGHT)


@pytest.mark.parametrize("name", OURS)
def test_imports_point_downwards(name):
    for imported in imports(name):
        if imported.split(".")[0] == "tensorbridge" and imported != "tensorbridge":
            below = imported.removeprefix("tensorbridge.")
            assert HEIGHT[below] < HEIGHT[name], f"{name} imports {below}, which is not below it"


@pytest.mark.parametrize("name", OURS)
def test_only_adapters_import_their_framework(name):
    def frameworks(found: Iterator[str]) -> set[str]:
        return {module.split(".")[0] for module in found} & FRAMEWORKS

    assert frameworks(imports(name, top_level=True)) == TOP_LEVEL.get(name, set())
    if name not in IN_FUNCTIONS:
        assert frameworks(imports(name)) == TOP_LEVEL.get(name, set())


@pytest.mark.parametrize("name", ["_array", "_plan", "_refuse", "_engine", "_roads"])
def test_judgement_imports_nothing_but_judgement(name):
    allowed = {"__future__", "typing", "collections.abc", "functools"}
    others = {module for module in imports(name) if not module.startswith("tensorbridge.")}
    assert others <= allowed


# -- What is loaded, seen in a process of its own


def loaded_after(code: str) -> set[str]:
    """The frameworks and modules of ours in `sys.modules` after running `code`."""
    script = f"{code}\nimport sys\nprint('LOADED', *sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.rpartition("LOADED ")[2].split())


NO_FRAMEWORK = {
    "import": "import tensorbridge",
    "decide": """
from tensorbridge import Device, Traits
from tensorbridge._plan import decide
from tensorbridge._step import Want
decide(Traits("torch", Device("cuda:0")), Want("cupy"))""",
    "to_numpy of a list": "import tensorbridge; tensorbridge.to_numpy([1, 2])",
    "to_numpy of an array": "import tensorbridge, numpy; tensorbridge.to_numpy(numpy.zeros(3)[::-1], copy=True)",
    "to_numpy of bytes": "import tensorbridge; tensorbridge.to_numpy(b'123')",
    "describe": "import tensorbridge, numpy; tensorbridge.describe(numpy.zeros(3))",
    "shares_memory": "import tensorbridge as tb, numpy as np; a = np.zeros(3); assert tb.shares_memory(a, a)",
    "plan for torch": "import tensorbridge, numpy; tensorbridge.plan(numpy.zeros(3), 'torch')",
    "plan for CuPy": "import tensorbridge, numpy; tensorbridge.plan(numpy.zeros(3), 'cupy', device='cuda:1')",
    "a tree": "import tensorbridge; tensorbridge.tree.to_numpy({'a': [1, 2], 'b': None})",
    "a guard and a trace": """
import tensorbridge as tb
with tb.copy_guard("warn"), tb.trace():
    tb.to_numpy(3.0)""",
    "info": "import tensorbridge; str(tensorbridge.info())",
    "a refusal": """
import tensorbridge as tb
try:
    tb.to_numpy({})
except tb.UnsupportedArrayError:
    pass""",
}


@pytest.mark.parametrize("what", NO_FRAMEWORK)
def test_no_framework_is_imported_before_its_array_shows_up(what):
    assert not loaded_after(NO_FRAMEWORK[what]) & FRAMEWORKS


def test_to_torch_imports_torch_alone():
    loaded = loaded_after("import tensorbridge, numpy; tensorbridge.to_torch(numpy.zeros(3))")
    assert loaded & FRAMEWORKS == {"torch"}
    assert "tensorbridge._adapters._cupy" not in loaded


def test_import_loads_no_adapter_and_no_user():
    loaded = {name for name in loaded_after("import tensorbridge") if name.startswith("tensorbridge.")}
    assert not loaded & {f"tensorbridge._adapters._{name}" for name in ("torch", "torch_cuda", "cupy")}
    assert not {name.removeprefix("tensorbridge.") for name in loaded} & USERS
