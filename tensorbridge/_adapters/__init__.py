"""One module a framework: what it can hold, how its arrays are described, how steps on them are performed.

An adapter is a module with

    open(x, want)            -> (handle, traits, want)  read the facts; a foreign array is imported here, once
    describe(handle, traits) -> ArrayInfo               the same facts, for a person
    performer(step, before, want) -> function           handle -> the array that the step promised

The `want` that `open` gives back is settled: its dtype is what this array gets, where the caller's hangs on what it has
(``dtype={"float64": "float32"}``). What is made of several parts is settled part by part, and then made at once.

Nothing is imported until its array shows up: a caller can hold a tensor only if torch is in `sys.modules`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from tensorbridge._array import ON_A_TENSOR, ArrayInfo, Traits
from tensorbridge._loaded import array_class, loaded
from tensorbridge._step import Op, Step, Want


class Adapter(Protocol):
    def open(self, x: Any, want: Want) -> tuple[Any, Traits, Want]: ...

    def describe(self, handle: Any, traits: Traits) -> ArrayInfo: ...

    def performer(self, step: Step, before: Traits, want: Want) -> Callable[..., Any]: ...


_of_type: dict[type, Adapter] = {}
_KEPT = 128  # classes: a program may make them by the call, and what is kept here lives


def adapter_of(cls: type) -> Adapter:
    """The adapter for arrays of type `cls`: one dict lookup, after the first."""
    found = _of_type.get(cls)
    if found is None:
        found = named(_name_of(cls))
        if len(_of_type) >= _KEPT:
            _of_type.clear()
        _of_type[cls] = found
    return found


def _name_of(cls: type) -> str:
    if issubclass(cls, np.ndarray):
        return "numpy"
    for name in ("torch", "cupy"):
        if issubclass(cls, array_class(name)):
            return name
    if issubclass(cls, (list, tuple)) or is_scalar(cls):
        return "python"
    return "protocols"


def is_scalar(cls: type) -> bool:
    """Whether `cls` is a number of Python or NumPy. NumPy's text is text, though its class says otherwise."""
    return issubclass(cls, (bool, int, float, complex, np.generic)) and not issubclass(cls, (str, bytes))


def named(name: str) -> Adapter:
    return import_module(f"tensorbridge._adapters._{name}")


def as_it_is(x: Any) -> Any:
    """What performs a step that has nothing to do."""
    return x


def import_all() -> None:
    """The adapters of what is here."""
    for name in ("numpy", "python", "protocols", *filter(loaded, ("torch", "cupy"))):
        named(name)


def performer(step: Step, before: Traits, want: Want) -> Callable[..., Any]:
    """The function that performs `step` on an array of kind `before`.

    The more particular side performs: NumPy knows only itself, torch knows NumPy, CuPy knows both by their addresses.
    A step that names its kernel is performed by that.
    """
    giver, receiver = before.framework.removesuffix(" list"), step.after.framework
    if step.op == Op.WRAP:
        return named("python").performer(step, before, want)
    if step.op == Op.STACK:
        return named(receiver).performer(step, before, want)
    if step.op == Op.IMPORT or giver not in ("numpy", "torch", "cupy"):
        return named("protocols").performer(step, before, want)
    owner = receiver if receiver != "numpy" else giver
    if step.by == "torch":
        owner = "torch"
    function = named(owner).performer(step, before, want)
    if step.op == Op.FILL and want.out is not None and want.out.origin in ON_A_TENSOR:
        torch: Any = named("torch")
        return torch.counted(function)  # type: ignore[no-any-return]
    return function
