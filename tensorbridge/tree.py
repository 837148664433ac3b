"""Nested containers of arrays, converted leaf by leaf: `to_numpy`, `to_torch`, `to_cupy`, `plan`."""

from inspect import unwrap

from tensorbridge._trees._tree import to_cupy, to_numpy, to_torch
from tensorbridge._trees._tree_plan import LeafPlan, LeftPart, TreePlan, plan

__all__ = ["LeafPlan", "LeftPart", "TreePlan", "plan", "to_cupy", "to_numpy", "to_torch"]

for _function in (plan, to_cupy, to_numpy, to_torch):  # as Python's own errors, and pickles, name them
    _function.__module__, _function.__qualname__ = "tensorbridge", f"tree.{_function.__name__}"
    unwrap(_function).__qualname__ = _function.__qualname__
