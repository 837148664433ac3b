"""What shares and what copies, as a table: asked of the planner, so that it cannot be wrong about it."""

from __future__ import annotations

from typing import NamedTuple

from tensorbridge._array import Device, Traits
from tensorbridge._plan import decide
from tensorbridge._step import HERE, Op, usual

CUDA = Device("cuda:0")
TARGETS = ("numpy", "torch", "cupy")

# The kinds of arrays that people hold, in the words that they use for them.
SOURCES: dict[str, Traits] = {
    "NumPy array": Traits("numpy"),
    "NumPy, read-only": Traits("numpy", writable=False),
    'NumPy memory map, mode "r"': Traits("numpy", writable=False, origin="memmap"),
    "NumPy, reversed `a[::-1]`": Traits("numpy", spacing="reversed"),
    "NumPy, every other `a[::2]`": Traits("numpy", spacing="strided"),
    "NumPy, a field of records": Traits("numpy", spacing="odd"),
    "NumPy, big-endian": Traits("numpy", dtype=">float32"),
    "NumPy, `broadcast_to`": Traits("numpy", spacing="strided", overlap=True, writable=False),
    "NumPy bfloat16 (ml_dtypes)": Traits("numpy", dtype="bfloat16"),
    "NumPy float8 (ml_dtypes)": Traits("numpy", dtype="float8_e4m3fn"),
    "NumPy view of a tensor": Traits("numpy", origin="tensor"),
    "torch, on the CPU": Traits("torch"),
    "torch, requires grad": Traits("torch", graph=True),
    "torch bfloat16": Traits("torch", dtype="bfloat16"),
    "torch float8": Traits("torch", dtype="float8_e4m3fn"),
    "torch, conjugate or negative bit": Traits("torch", dtype="complex64", lazy="conj"),
    "torch, `expand`": Traits("torch", spacing="strided", overlap=True),
    "torch, on CUDA": Traits("torch", CUDA),
    "torch, on CUDA, requires grad": Traits("torch", CUDA, graph=True),
    "CuPy": Traits("cupy", CUDA),
    "CuPy, reversed": Traits("cupy", CUDA, spacing="reversed"),
    "JAX, pyarrow, polars, pandas (lent read-only)": Traits("dlpack", writable=False),
    "`bytes`": Traits("buffer", dtype="uint8", writable=False),
    "`bytearray`, `array.array`": Traits("buffer", dtype="uint8"),
    "list of numbers or arrays": Traits("numpy list"),
    "number": Traits("python scalar"),
    "NumPy longdouble": Traits("numpy", dtype="longdouble"),
}
_BUS = {"h2d": "to the GPU", "d2h": "to the host"}


class Cell(NamedTuple):
    """One crossing of one kind of array."""

    source: str
    target: str
    shares: bool
    text: str


def cell(source: str, target: str) -> Cell:
    decision = decide(SOURCES[source], usual(target), HERE._replace(torch=True))
    if decision.refusal is not None:
        return Cell(source, target, False, "refused")
    moves = [step for step in decision.steps if step.kind]
    result = decision.steps[-1].after
    frozen = "" if result.writable else ", read-only"
    if decision.steps[0].op == Op.WRAP and not moves:
        return Cell(source, target, True, "wrapped, 0 B")
    if not moves:
        alias = decision.steps[-1].why.startswith("an alias")
        return Cell(source, target, True, ("**an alias of it**" if alias else "**shared**") + frozen)
    words = [_BUS.get(step.kind, step.op) for step in moves]
    reasons = ", ".join(word for word in words if word != "copy")
    return Cell(source, target, False, (f"copy: {reasons}" if reasons else "copy") + frozen)


def markdown() -> str:
    lines = ["| from | `to_numpy` | `to_torch` | `to_cupy` |", "|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(cell(name, target).text for target in TARGETS) + " |" for name in SOURCES]
    return "\n".join(lines)
