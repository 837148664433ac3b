"""What a forked child does first: it has none of the threads of its parent. (Windows has no fork.)"""

from __future__ import annotations

import os
from collections.abc import Callable


def in_child(function: Callable[[], object]) -> Callable[[], object]:
    """Have `function` called in every child that is forked."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function
