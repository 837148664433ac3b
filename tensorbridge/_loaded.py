"""Which frameworks are there. One that another thread is still importing is not: its module has half of its names."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def loaded(name: str) -> Any:
    """The module of that name, if it has been imported; None otherwise, also where its import is forbidden."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


class Named:
    """A framework as annotations name it: imported when one is read where the program runs; anything, where it is not
    installed.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        try:
            return getattr(import_module(self._name), attribute)
        except ImportError:
            return Any


def array_class(framework: str) -> Any:
    """The class of its arrays, for `isinstance`: () as long as there is none."""
    return getattr(sys.modules.get(framework), "Tensor" if framework == "torch" else "ndarray", ())
