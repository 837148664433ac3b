"""What offers no array at all: told by what it is, so that the error names the call that makes one of it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Set
from typing import Any


def told(x: Any) -> str:
    """What it is that offers no array."""
    cls = type(x)
    if isinstance(x, (Mapping, deque)) or hasattr(cls, "__dataclass_fields__"):
        return "container"
    if isinstance(x, (Set, range)):
        return "set" if isinstance(x, Set) else "range"
    if answers_to_all(x):
        return "stand-in"
    if hasattr(cls, "toarray"):
        return "scipy"
    lazy = getattr(sys.modules.get("polars"), "LazyFrame", None)
    return "lazy" if lazy is not None and isinstance(x, lazy) else "not an array"


def answers_to_all(x: Any) -> bool:
    """Whether `x` has any attribute that it is asked for: what it says of itself then means nothing."""
    try:
        return hasattr(x, "no_array_has_this_name")
    except Exception:  # foreign code may raise anything
        return False
