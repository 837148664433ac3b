"""What the package offers: names, signatures, types, docstrings that are run, errors that travel."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import tensorbridge as tb
from tensorbridge import tree
from tensorbridge._step import MOVING, Op

ROOT = Path(tb.__file__).parent

# Everything but the array is keyword-only.
SIGNATURES = {
    "to_numpy": "x, *, dtype=None, copy=None, writable=None, detach=True, out=None",
    "to_torch": "x, *, device=None, dtype=None, copy=None, share_readonly=False, detach=False, pin_memory=False, "
    "non_blocking=False, out=None",
    "to_cupy": "x, *, device=None, dtype=None, copy=None, share_readonly=False, detach=True, non_blocking=False, "
    "out=None",
    "describe": "x",
    "plan": "x, to, **options",
    "shares_memory": "a, b",
    "copy_guard": "mode, *, min_bytes=0, kinds=None",
    "trace": "",
    "editing": "tensor",
    "autograd_graph": "tensor",
    "collate": "samples",
    "to_numpy_async": "x, *, pinned=False",
    "prefetch": "batches, *, to='torch', device='cuda', depth=2, transform=None, dtype=None, copy=None",
    "use_stream": "stream",
    "used_on": "x, stream",
    "share_memory_pool": "owner='torch'",
    "info": "",
}
RECORDS = {
    "ArrayInfo": "framework device dtype shape strides nbytes order writable requires_grad grad_fn lazy pinned stream",
    "Step": "op why nbytes kind",
    "Plan": "source target steps zero_copy bytes_moved blocking",
}
ERRORS = {
    "BridgeError": (Exception,),
    "CopyRequiredError": (tb.BridgeError, ValueError, BufferError),
    "GraphError": (tb.BridgeError, RuntimeError),
    "UnsupportedArrayError": (tb.BridgeError, TypeError),
    "DeviceError": (tb.BridgeError, RuntimeError),
    "MissingFrameworkError": (tb.BridgeError, ImportError),
    "ProducerError": (tb.BridgeError, BufferError),
}
SUPPORTING = {"CopyWarning", "Device", "Event", "Graph", "Info", "Prefetch", "Trace", "Traits", "Transfer", "tree"}


def signature(function: object) -> str:
    """Names and defaults, annotations left out."""
    plain = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in plain.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


def test_public_names_are_those_of_the_design():
    assert set(tb.__all__) == {*SIGNATURES, *RECORDS, *ERRORS, *SUPPORTING}
    assert all(hasattr(tb, name) for name in tb.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_the_design(name):
    assert signature(getattr(tb, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", ["to_numpy", "to_torch", "to_cupy"])
def test_tree_functions_take_the_same_options(name):
    plain, packed = (inspect.signature(getattr(home, name)).parameters for home in (tb, tree))
    options = {n: p.default for n, p in packed.items() if p.kind is p.KEYWORD_ONLY}
    assert {n: p.default for n, p in plain.items() if p.kind is p.KEYWORD_ONLY}.items() <= options.items()
    assert next(iter(packed.values())).kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@pytest.mark.parametrize("name", RECORDS)
def test_record_begins_with_the_fields_of_the_design(name):
    fields = RECORDS[name].split()
    assert list(getattr(tb, name)._fields[: len(fields)]) == fields


def test_a_prompt_shows_what_str_says():
    for shown in (tb.plan([1.0], "torch"), tb.tree.plan({"x": bytearray(8)}, "torch"), tb.info()):
        assert repr(shown) == str(shown)


def test_str_of_a_plan_and_of_an_array_is_for_a_person():
    import numpy as np

    assert str(tb.describe(np.zeros((2, 3)))) == "numpy float64 (2, 3) on cpu"
    assert str(tb.plan(np.zeros(4)[::-1], "torch")) == (
        "numpy float64 (4,) on cpu\n"
        "  -> torch float64 on cpu: 32 B moved\n"
        "  pack   32 B   torch has no negative strides\n"
        "  share   0 B   torch.from_numpy: the same memory"
    )


def test_a_step_says_what_it_does_in_a_line():
    import numpy as np

    pack, share = tb.plan(np.zeros(4)[::-1], "torch").steps
    assert repr(pack) == "<Step pack: 32 B h2h, torch has no negative strides>"
    assert repr(share) == "<Step share: 0 B, torch.from_numpy: the same memory>"


def test_steps_that_a_plan_may_show_are_all_named_where_a_step_is_documented():
    ops = {value for name, value in vars(Op).items() if name.isupper()}
    moving, still = tb.Step.__doc__.split("These write every")[::-1]
    assert set(re.findall(r'"(\w+)"', moving)) == MOVING
    assert set(re.findall(r'"(\w+)"', still)) == ops - MOVING


# -- Types

SNIPPET = """
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray
from typing_extensions import assert_type

import tensorbridge as tb

x: Any = 1
out = np.zeros(3, dtype=np.int16)
assert_type(tb.to_numpy(x), NDArray[Any])
assert_type(tb.to_numpy(x, dtype="float32"), NDArray[Any])
assert_type(tb.to_numpy(out), NDArray[np.int16])
assert_type(tb.to_numpy([1, 2]), NDArray[Any])
assert_type(tb.to_numpy(x, dtype=np.float32), NDArray[np.float32])
assert_type(tb.to_numpy(x, dtype=np.dtype("int8"), copy=True), NDArray[np.int8])
filled: np.ndarray[tuple[int], np.dtype[np.int16]] = tb.to_numpy(x, out=out)
assert_type(tb.plan(x, "torch").steps[0].nbytes, int)
assert_type(tb.describe(x).device, tb.Device)
assert_type(tb.shares_memory(x, x), bool)
single = np.zeros(3, np.float32)
wrong: NDArray[np.int64] = tb.to_numpy(x, dtype=np.float32)  # type: ignore[arg-type]
wrong = tb.to_numpy(single, dtype=np.dtype(np.float32))  # type: ignore[arg-type]
right: NDArray[np.int64] = tb.to_numpy(x, dtype="int64")
wider: NDArray[np.floating[Any]] = tb.to_numpy(x, dtype=np.float32)


def what_is_taken(
    name: str | None, any_numpy: np.dtype[Any], a_type: type[np.generic], like: DTypeLike, device: tb.Device
) -> None:
    assert_type(tb.to_numpy(x, dtype=x.dtype), NDArray[Any])
    assert_type(tb.to_numpy(single, dtype=name), NDArray[Any])
    assert_type(tb.to_numpy(single, dtype=any_numpy), NDArray[Any])
    assert_type(tb.to_numpy(x, dtype=like), NDArray[Any])
    assert_type(tb.to_numpy(x, dtype=float), NDArray[Any])
    assert_type(tb.to_numpy(x, dtype={np.float64: "float32", "bool": int}), NDArray[Any])
    tb.to_torch(x, dtype=a_type, device=device)
    tb.to_cupy(x, dtype=like, device=0)
    tb.tree.to_numpy(x, dtype={"real floating": np.float32})
    tb.tree.to_torch(x, dtype=bool, device=x.device)
    tb.prefetch([x], dtype=like, device=None)
    tb.plan(x, "torch", dtype=any_numpy, device="cuda:1")


class Batch(TypedDict):
    image: NDArray[np.float32]


@dataclass
class Pair:
    first: NDArray[np.float32]


def what_is_filled(batch: Batch, pair: Pair, sizes: dict[str, list[int]], other: object, maybe: Pair | None) -> Pair:
    assert_type(tb.tree.to_numpy(x, out=batch), Batch)
    assert_type(tb.tree.to_torch(x, device="cpu", out=pair), Pair)
    assert_type(tb.tree.to_cupy(x, out=sizes), dict[str, list[int]])
    assert_type(tb.tree.to_numpy(x, out=other), Any)
    assert_type(tb.tree.to_numpy(x, out=None), Any)
    assert_type(tb.tree.to_numpy({"x": batch}), Any)
    named: dict[str, NDArray[Any]] = tb.tree.to_numpy(x, out=x)
    wrong: Batch = tb.tree.to_numpy(x, out=pair)  # type: ignore[assignment]
    made: Pair = tb.tree.to_numpy(x, out=maybe)
    return made


async def what_is_made_ahead(source: list[Any], wrong: tb.Prefetch[int], alone: tb.Prefetch) -> None:
    batches: tb.Prefetch[Batch] = tb.prefetch(source)
    with batches as ready:
        for batch in ready:
            assert_type(batch, Batch)
    assert_type(next(batches), Batch)
    wider: tb.Prefetch[object] = batches
    wrong = batches  # type: ignore[assignment]
    assert_type(next(alone), Any)
    transfer: tb.Transfer[NDArray[np.float32]] = tb.to_numpy_async(x)
    assert_type(transfer.result(1.0), NDArray[np.float32])
    assert_type(await transfer, NDArray[np.float32])
    assert_type(tb.to_numpy_async(x).result(), Any)


def what_is_made(transfer: tb.Transfer) -> Any:
    return transfer.result()


tb.to_torch(x, dtype=32)  # type: ignore[arg-type]
tb.to_torch(x, device=b"cpu")  # type: ignore[arg-type]
tb.tree.to_torch(x, device=1.0)  # type: ignore[call-overload]
tb.prefetch([x], dtype=32)  # type: ignore[arg-type]
tb.copy_guard("eror")  # type: ignore[arg-type]
tb.copy_guard("error", kinds=["h2d", "d2h"])
tb.copy_guard("error", kinds="h2d")
tb.copy_guard("error", kinds={"d2g"})  # type: ignore[arg-type]
tb.plan(x, "jax")  # type: ignore[arg-type]
tb.plan(x, "torch", cpy=False)  # type: ignore[call-arg]
tb.plan(x, "torch", copy="no")  # type: ignore[arg-type]
tb.tree.plan(x, "numpy", writeable=True)  # type: ignore[call-arg]
options: dict[str, Any] = {"copy": False}
tb.plan(x, "torch", **options)
tb.tree.plan(x, "torch", device="cpu", pack=False, dtype=np.float32, out=[x])
tb.to_numpy(x, np.float32)  # type: ignore[call-overload]
tb.to_numpy(x, copy="yes")  # type: ignore[call-overload]
tb.to_torch(x, writable=True)  # type: ignore[call-arg]
tb.to_nmpy(x)  # type: ignore[attr-defined]
tb.tree.to_nmpy(x)  # type: ignore[attr-defined]
"""
CONFIG = """
[mypy]
strict = True
[mypy-tensorbridge.*]
follow_imports = silent
[mypy-torch.*,cupy.*]
follow_imports = skip
ignore_missing_imports = True
"""


def test_types_are_what_a_caller_expects(tmp_path):
    pytest.importorskip("mypy", reason="no mypy, which `make` installs")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "snippet.py"]
    environment = {"MYPYPATH": str(ROOT.parent), "PATH": ""}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert run.stdout == "Success: no issues found in 1 source file\n", run.stdout + run.stderr


def with_hints():
    """What is called, by the name that a user reads."""
    for module in (tb, tree):
        for name in module.__all__:
            x = getattr(module, name)
            members = vars(x).items() if inspect.isclass(x) else ()
            yield from ((f"{name}.{key}", f) for key, f in members if inspect.isfunction(f) and key[0] != "_")
            if callable(x):
                yield f"{module.__name__}.{name}", x


@pytest.mark.parametrize(("name", "x"), [pytest.param(*case, id=case[0]) for case in with_hints()])
def test_hints_can_be_read_where_the_program_runs(name, x):
    """By Sphinx, pydantic and others; what is not installed may be anything."""
    hints = typing.get_type_hints(x)
    if name == "tensorbridge.to_torch":
        assert hints["return"] is importlib.import_module("torch").Tensor
    if name == "tensorbridge.to_cupy":
        assert hints["return"] is getattr(sys.modules.get("cupy"), "ndarray", Any)


def test_what_is_made_ahead_can_be_named_with_its_type_where_the_program_runs():
    for generic in (tb.Prefetch, tb.Transfer):
        assert typing.get_origin(generic[int]) is generic
        assert typing.get_args(generic[int]) == (int,)
    assert not hasattr(tb.to_numpy_async([1.0]), "__dict__")


def test_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").exists()


# -- Docstrings

SECTIONS = ["Parameters", "Returns", "Raises", "Cost", "Examples"]
DOCUMENTED = {name: getattr(tb, name) for name in SIGNATURES} | {
    f"tree.{name}": getattr(tree, name) for name in ("to_numpy", "to_torch", "to_cupy", "plan")
}


ON_A_GPU = {"share_memory_pool", "used_on"}  # their examples cannot run as a doctest


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_has_every_section_in_order(name):
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    found = re.findall(r"^(\w+)\n-+$", text, flags=re.MULTILINE)
    assert found == [section for section in SECTIONS if section in found]
    assert found[-2:] == ["Cost", "Examples"]
    assert ("Parameters" in found) == bool(SIGNATURES.get(name, "x"))
    assert ("Returns" in found) == (name != "used_on")
    assert ("::" if name in ON_A_GPU else ">>>") in text.split("Examples\n")[-1]
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if SIGNATURES.get(name, "x")])
def test_docstring_names_every_parameter(name):
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    listed = text.partition("Parameters\n")[2].partition("Returns\n")[0]
    for parameter in inspect.signature(DOCUMENTED[name]).parameters.values():
        told = re.search(rf"^(.*, )?\*{{0,2}}{parameter.name}\b.*( :|$)", listed, flags=re.MULTILINE)
        assert told or "As for" in listed or "**options" in listed, parameter.name


def modules() -> list[str]:
    paths = sorted(ROOT.rglob("*.py"))
    names = [".".join(("tensorbridge", *path.relative_to(ROOT).with_suffix("").parts)) for path in paths]
    cupy = {"tensorbridge._adapters._cupy"}  # imports CuPy, and has no examples
    return [name.removesuffix(".__init__") for name in names if name not in cupy]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_give_what_they_print(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


# -- Errors


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_also_what_a_careful_caller_already_catches(name):
    assert getattr(tb, name).__bases__ == ERRORS[name]


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_built_from_one_message_and_pickles(name):
    error = getattr(tb, name)("one message")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == "one message"
    assert again.plan is None


def test_error_with_its_plan_survives_the_way_between_processes():
    import numpy as np

    with pytest.raises(tb.CopyRequiredError) as raised:
        tb.to_torch(np.zeros(3)[::-1], copy=False)
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value)
    assert again.plan == raised.value.plan
    assert [step.op for step in again.plan.steps] == ["pack", "share"]


def test_data_loader_rebuilds_the_error_of_its_worker():
    import numpy as np
    import torch

    class Reversed(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return tb.to_torch(np.zeros(3)[::-1], copy=False)

    with pytest.raises(tb.CopyRequiredError, match="torch has no negative strides"):
        next(iter(torch.utils.data.DataLoader(Reversed(), num_workers=1, multiprocessing_context="fork")))


def test_tree_of_errors_is_drawn_in_the_docstring_of_its_module():
    from tensorbridge import _errors

    for name, bases in ERRORS.items():
        drawn = ", ".join(base.__name__ for base in bases if base is not tb.BridgeError)
        assert f"{name}({drawn})" in (_errors.__doc__ or "")


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_what_a_conversion_needs_and_the_rest_when_it_is_asked_for():
    later = sorted(
        {f"tensorbridge.{module or name}" for name, module in tb._LATER.items()} - {"tensorbridge._cuda._lease"}
    )
    loaded = f"import sys, tensorbridge as tb; print([name for name in {later} if name in sys.modules])"
    assert run_fresh(loaded) == "[]"
    for name in tb._LATER:
        assert (
            run_fresh(f"import tensorbridge as tb; print({name!r} in dir(tb), tb.{name} is tb.{name})") == "True True"
        )


def test_a_device_is_planned_for_by_its_name_where_torch_is_not_loaded():
    said = run_fresh("""import sys
import numpy as np, tensorbridge as tb
print([tb.plan(np.ones(3, "f4"), "torch", device=name).target.device for name in ("cuda:1", "mps", "xpu:1")])
try:
    tb.plan(np.ones(3), "torch", device="gpu")
except ValueError as error:
    print(error, "torch" in sys.modules)""")
    devices, refusal = said.splitlines()
    assert devices == "['cuda:1', 'mps:0', 'xpu:1']"
    assert refusal.startswith("device='gpu': choose ")
    assert refusal.endswith("; did you mean 'cuda'? False")


def test_every_name_is_there_for_a_star_import():
    assert (
        run_fresh("from tensorbridge import *; print(tree.to_numpy.__name__, prefetch.__name__)") == "to_numpy prefetch"
    )


def test_a_name_that_does_not_exist_is_an_attribute_error_before_and_after_all_is_loaded():
    first = "import tensorbridge as tb"
    for line in ("pass", "import torch; tb.to_numpy(torch.ones(3), dtype='int8')"):
        said = run_fresh(f"""{first}
{line}
try:
    tb.to_jax
except AttributeError as error:
    print(error, "__getattr__" in vars(tb))""")
        assert said == f"module 'tensorbridge' has no attribute 'to_jax' {line == 'pass'}"


PLATFORMS = {
    "without fork, as Windows": "import os, random, torch; del os.register_at_fork",
    "where long double is double, as on Windows and Apple Silicon": (
        "import numpy as np; np.longdouble, np.clongdouble = np.float64, np.complex128"
    ),
}


@pytest.mark.parametrize("name", PLATFORMS)
def test_other_platforms_get_the_same(name):
    """Rehearsed here: such a machine is not at hand."""
    code = """
import numpy as np
import tensorbridge as tb
for dtype in ("float64", "complex128"):
    assert tb.describe(np.zeros(3, dtype)).dtype == dtype
    assert tb.to_torch(np.zeros(3, dtype)).shape == (3,)
    assert tb.plan(np.zeros(3, dtype), "torch").zero_copy
tb.to_numpy_async(np.zeros(3)).result()
"""
    run = subprocess.run([sys.executable, "-c", f"{PLATFORMS[name]}\n{code}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_dir_shows_what_is_public_and_nothing_of_how_it_is_made():
    assert {name for name in dir(tb) if not name.startswith("_")} == set(tb.__all__)
