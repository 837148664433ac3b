"""What a producer made for us without saying so: it is told by nobody else holding it."""

from __future__ import annotations

import sys
import sysconfig
from typing import Any
from weakref import getweakrefcount

import numpy as np

# Without the GIL some references are not counted, and other interpreters do not count them at all.
_COUNTED = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")


def for_us(box: list[Any]) -> bool:
    """Whether what a producer gave, in `box` and nowhere else on our side, was made for us, with the memory behind it.

    Memory that no other object refers to, weakly or not, can be neither seen nor written by anybody else. So it is safe
    to treat it as ours, even where it was there before and was handed over. The other error is as safe: a reference
    that is left over somewhere makes it the producer's, as all memory was taken to be. A memoryview, a mapping, a
    tensor or a capsule says nothing of who else sees its memory.
    """
    held = [box[0]]
    while _COUNTED and _references(held) <= _ALONE and not getweakrefcount(held[0]):
        kind = type(held[0])
        if kind in (bytes, bytearray):
            return True
        if kind is dict:  # an array interface
            held = [held[0].get("data")]
        elif not issubclass(kind, np.ndarray):
            return False
        elif held[0].base is None:
            return bool(held[0].flags.owndata)
        else:
            held = [held[0].base]
    return False


def _references(held: list[Any]) -> int:
    """The count of the one object in `held`, by C code, whose own references do not depend on how this is compiled."""
    return max(map(sys.getrefcount, held))


_box = [object()]
_ALONE = _references([_box[0]]) if _COUNTED else 0  # of an object that one other holds, as a view does what is below it
