"""Tensors whose memory came read-only: torch has no flag for it, and so we remember, for as long as they live.

Memory that was shared on the caller's word (`share_readonly=True`) is known by its storage, so every view of it is. An
alias of a read-only view of a tensor is known as an object alone: the tensor behind it is as writable as ever.
"""

from __future__ import annotations

import weakref
from typing import Any

marked: dict[int, weakref.ref[Any]] = {}  # by address: of a tensor's object, or of a storage


def remember(t: Any) -> Any:
    """The same tensor, from now on known to be an alias of something read-only."""
    _keep(id(t), t)
    return t


def remember_memory(t: Any) -> Any:
    """The same tensor, its memory from now on known to be read-only."""
    storage = t.untyped_storage()  # torch keeps the object for as long as it keeps the storage
    _keep(storage._cdata, storage)
    return t


def _keep(address: int, owner: Any) -> None:
    def forget(ref: Any) -> None:
        if marked.get(address) is ref:
            del marked[address]

    marked[address] = weakref.ref(owner, forget)


def is_marked(t: Any) -> bool:
    return bool(marked) and (id(t) in marked or is_memory_marked(t))


def is_memory_marked(t: Any) -> bool:
    try:
        return bool(marked) and t.untyped_storage()._cdata in marked
    except RuntimeError:  # sparse, inside torch.func ...: it has no memory of its own
        return False
