"""Nested containers of arrays, converted leaf by leaf: `to_numpy`, `to_torch`, `to_cupy`, `plan`."""

from tensorbridge._tree import LeafPlan, TreePlan, plan, to_cupy, to_numpy, to_torch

__all__ = ["LeafPlan", "TreePlan", "plan", "to_cupy", "to_numpy", "to_torch"]
