"""What one call costs when no element moves: by hand, through tensorbridge, through what other libraries offer."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorbridge._bench._rows import (
    NONE,
    SEE,
    UNASKED,
    Case,
    Goal,
    Question,
    Row,
    Scope,
    Unavailable,
    Way,
    expect,
    random_array,
    result_is,
)

# -- A1, A2: a shared crossing

TENSORS: dict[str, Callable[[Any], Any]] = {
    "float32 (16,)": lambda torch: torch.rand(16),
    "float32 (16,), requires grad": lambda torch: torch.rand(16, requires_grad=True),
    "float32 (16,), in a graph": lambda torch: torch.rand(16, requires_grad=True) * 2,
    "int64 (64, 64)": lambda torch: torch.randint(100, (64, 64)),
    "float32 (8, 4), transposed": lambda torch: torch.rand(4, 8).T,
    "float32 (16,), a slice": lambda torch: torch.rand(64)[8:24],
}

ARRAYS: dict[str, Callable[[], Any]] = {
    "float32 (16,)": lambda: random_array("float32", 16),
    "int64 (64, 64)": lambda: random_array("int64", 64, 64),
    "float32 (16,), a slice": lambda: random_array("float32", 64)[8:24],
    "float32 (16,), a row": lambda: random_array("float32", 4, 16)[2],
    "float32 (16,), a column": lambda: random_array("float32", 16, 4)[:, 1],
    "float32 (8, 4), transposed": lambda: random_array("float32", 4, 8).T,
    "float32 (16,), a view of a tensor": lambda: import_module("torch").rand(16).numpy(),
}

A1_GOAL = Goal("A1", ("by hand",), "cost", 0.85, 0.78)
A2_GOALS = (Goal("A2", ("torch.as_tensor",), "cost", 0.55), Goal("A2", ("torch.from_numpy",), "cost", 1.4))


def _to_numpy_rows(scope: Scope) -> list[Row]:
    def build(make: Callable[[Any], Any]) -> Case:
        import torch

        import tensorbridge as tb
        from tensorbridge._bench import _kept

        t = make(torch)
        unlike = "it hands out a writable view of the graph, and asks nothing first" if t.requires_grad else UNASKED
        ways: tuple[Way, ...] = (
            Way("tensorbridge", "tb.to_numpy(t)", "bridge"),
            Way("by hand", "t.detach().cpu().numpy()", unlike=unlike + SEE),
            Way("limit", "t.numpy(force=True)", "limit"),
        )
        if t.requires_grad:
            ways = (*ways, Way("the same promises", "kept.in_graph(t)", "promises"))
        shared = result_is(t, t.detach().numpy())

        def check(way: Way, result: Any) -> None:
            shared(way, result)
            if way.role in ("bridge", "promises"):
                expect(result.flags.writeable is not t.requires_grad, "read-only if, and only if, it requires grad")

        return Case(ways, {"tb": tb, "t": t, "kept": _kept}, check, goals=(A1_GOAL,))

    return [Row(title, partial(build, make)) for title, make in TENSORS.items()]


def _to_torch_rows(scope: Scope) -> list[Row]:
    def build(make: Callable[[], Any]) -> Case:
        import torch

        import tensorbridge as tb
        from tensorbridge._bench import _kept

        a = make()
        unlike = UNASKED if a.flags.forc else "it shares elements that overlap as well"
        if isinstance(a.base, torch.Tensor):
            unlike = "it loses the version counter of the tensor behind the array, which guards gradients"
        ways: tuple[Way, ...] = (
            Way("tensorbridge", "tb.to_torch(a)", "bridge"),
            Way("torch.as_tensor", "torch.as_tensor(a)", unlike=unlike + SEE),
            Way("torch.from_numpy", "torch.from_numpy(a)", unlike=unlike + SEE),
            Way("limit", "t.detach()", "limit"),
        )
        if isinstance(a.base, torch.Tensor):
            ways = (*ways, Way("the same promises", "kept.alias(a)", "promises"))
        elif not a.flags.c_contiguous:
            ways = (*ways, Way("the same promises", "kept.no_two_are_one(a)", "promises"))
        names = {"tb": tb, "torch": torch, "kept": _kept, "a": a, "t": torch.from_numpy(a)}
        return Case(ways, names, result_is(a), goals=A2_GOALS)

    return [Row(title, partial(build, make)) for title, make in ARRAYS.items()]


# -- A3: what other libraries offer for the same thing. Name on PyPI, module, to NumPy, to torch, whether A3 names it.

PEERS: dict[str, tuple[str, str, str, str, bool]] = {
    "MONAI": (
        "monai", "monai.utils.type_conversion", "peer.convert_to_numpy(t)", "peer.convert_to_tensor(a)", True
    ),
    "skorch": ("skorch", "skorch.utils", "peer.to_numpy(t)", 'peer.to_tensor(a, device="cpu")', True),
    "eagerpy": ("eagerpy", "eagerpy", "peer.astensor(t).numpy()", "peer.from_numpy(like, a).raw", True),
    "thinc": ("thinc", "thinc.util", "peer.torch2xp(t)", "peer.xp2torch(a)", False),
    "tvm-ffi": (
        "apache-tvm-ffi", "tvm_ffi", "np.from_dlpack(peer.from_dlpack(t))", "torch.from_dlpack(peer.from_dlpack(a))",
        False,
    ),
    "array-api-compat": (
        "array-api-compat", "array_api_compat", "peer.numpy.from_dlpack(t)", "peer.torch.from_dlpack(a)", False
    ),
}  # fmt: skip


def _peer_rows(scope: Scope) -> list[Row]:
    def build(name: str, direction: str) -> Case:
        package, module, to_numpy, to_torch, named = PEERS[name]
        if find_spec(module.partition(".")[0]) is None:
            raise Unavailable(f"not installed (pip install {package})")
        import numpy as np
        import torch

        import tensorbridge as tb

        peer = import_module(module)
        if name == "array-api-compat":
            import_module("array_api_compat.numpy")
            import_module("array_api_compat.torch")
        a, t = random_array("float32", 16), torch.rand(16)
        names = {"tb": tb, "np": np, "torch": torch, "peer": peer, "a": a, "t": t}
        if name == "eagerpy":
            names["like"] = peer.astensor(t)
        ours, theirs = ("tb.to_numpy(t)", to_numpy) if direction == "to NumPy" else ("tb.to_torch(a)", to_torch)
        ways = (Way("tensorbridge", ours, "bridge"), Way("their function", theirs, unlike=UNASKED + SEE))
        goals = (Goal("A3", ("their function",), "speed", 2.0),) if named else ()
        return Case(ways, names, result_is(t if direction == "to NumPy" else a), goals=goals)

    return [
        Row(f"{name}, {direction}", partial(build, name, direction))
        for name in PEERS
        for direction in ("to NumPy", "to torch")
    ]


def peer_versions() -> str:
    return ", ".join(
        f"{name} {metadata.version(package)}"
        for name, (package, module, *_) in PEERS.items()
        if find_spec(module.partition(".")[0])
    )


# -- A4: what the question "is a guard or a trace open?" adds to a call


class _Unasked(ast.NodeTransformer):
    """Takes `not _watch.watching` out of every condition."""

    taken = 0

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        kept = [value for value in node.values if "_watch.watching" not in ast.unparse(value)]
        self.taken += len(node.values) - len(kept)
        return kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)


def unasked_lanes() -> types.ModuleType:
    """A second copy of the module of fast lanes, whose calls do not ask whether anybody is watching."""
    from tensorbridge import _lanes
    from tensorbridge._adapters import adapter_of

    assert _lanes.__file__ is not None
    change = _Unasked()
    tree = change.visit(ast.parse(Path(_lanes.__file__).read_text(encoding="utf-8")))
    expect(change.taken == 2, f"{change.taken} lanes ask whether anybody is watching; this row knows of 2")
    copy = types.ModuleType("tensorbridge._lanes")
    exec(compile(ast.fix_missing_locations(tree), _lanes.__file__, "exec"), vars(copy))
    copy.open(adapter_of(import_module("torch").Tensor))
    return copy


def _watch_rows(scope: Scope) -> list[Row]:
    def build(direction: str) -> Case:
        import torch

        import tensorbridge as tb

        a, t = random_array("float32", 16), torch.rand(16)
        tb.to_torch(tb.to_numpy(t)[::-1])  # the lanes are open
        lanes = unasked_lanes()
        full: Any = {"to_numpy": tb.to_numpy, "to_torch": tb.to_torch}[direction]
        lane = {"to_numpy": lanes.plain_tensor_to_numpy, "to_torch": lanes.plain_array_to_torch}[direction]
        given = "t" if direction == "to_numpy" else "a"
        names = {"to_numpy": tb.to_numpy, "to_torch": tb.to_torch, "unasked": lane(full.__wrapped__), "a": a, "t": t}
        ways = (
            Way("tensorbridge", f"{direction}({given})", "bridge"),
            Way("without the check", f"unasked({given})", "limit"),
        )
        goals = (Goal("A4", ("without the check",), "extra", 30.0),)
        return Case(ways, names, result_is(names[given]), goals=goals)

    return [Row(d, partial(build, d)) for d in ("to_numpy", "to_torch")]


# -- D1: the import

_IMPORT = """
import sys, time
begin = time.perf_counter_ns()
{imports}
end = time.perf_counter_ns()
print(end - begin, *(name for name in ("torch", "cupy") if name in sys.modules))
"""


def _import_ns(imports: str) -> Callable[[], int]:
    """The time that `imports` take in a fresh interpreter, by its own clock, bytecode written."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    spec = find_spec("tensorbridge")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    above = str(Path(spec.submodule_search_locations[0]).parent)
    env["PYTHONPATH"] = os.pathsep.join([above, *filter(None, [env.get("PYTHONPATH")])])

    def sample() -> int:
        command = [sys.executable, "-c", _IMPORT.format(imports=imports)]
        ns, *loaded = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
        expect(not loaded, f"{imports}: imports {loaded}")
        return int(ns)

    return sample


def _import_rows(scope: Scope) -> list[Row]:
    def build() -> Case:
        ways = (
            Way("tensorbridge", "import tensorbridge", "bridge", NONE, _import_ns("import tensorbridge")),
            Way("its imports", "import numpy, ml_dtypes", "limit", NONE, _import_ns("import numpy, ml_dtypes")),
        )
        return Case(ways, {}, lambda way, result: None, goals=(Goal("D1", ("its imports",), "cost", 1.15),))

    return [Row("in a fresh interpreter", build)]


QUESTIONS = (
    Question(
        "A1",
        "What does a shared to_numpy cost over the line written by hand?",
        "A tensor on the CPU; no element moves. `t.numpy(force=True)` is the least that torch asks for it.",
        _to_numpy_rows,
    ),
    Question(
        "A2",
        "What does a shared to_torch cost over torch's own functions?",
        "An array that owns its memory, or a view of one; no element moves. The limit is one new Tensor object over "
        "memory that is there.",
        _to_torch_rows,
    ),
    Question(
        "A4",
        "What does an unused copy guard or trace cost?",
        "The same call from the same source, with and without the question whether a guard or a trace is open.",
        _watch_rows,
    ),
    Question(
        "D1",
        "What does the import cost?",
        "A fresh interpreter for each sample, bytecode written; asserted: neither torch nor CuPy is imported.",
        _import_rows,
    ),
)  # fmt: skip
PEER_QUESTION = Question(
    "A3",
    "What do other libraries' converters cost for the same work?",
    "float32 (16,), shared, through the function that each library gives its users.",
    _peer_rows,
    last=True,
)
