"""Which frameworks are there. One that another thread is still importing is not: its module has half of its names."""

from __future__ import annotations

import sys
from typing import Any


def loaded(name: str) -> Any:
    """The module of that name, if it has been imported; None otherwise, also where its import is forbidden."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module
