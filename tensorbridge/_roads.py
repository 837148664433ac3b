"""Roads over the bus: which way the bytes of a transfer go. Pure, like _plan, which asks it; `_staging` builds them.

A whole block of plain bytes goes through the ring of pinned slots from 4 MiB on, and straight where the host side is
page-locked already. Everything else takes the framework's own road: small blocks, where the ring costs more than it
gains, tensors in a graph or with lazy bits, which only torch can move with what hangs on them, and other devices than
CUDA's, which torch alone knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tensorbridge._array import FROM_LARGE

if TYPE_CHECKING:
    from tensorbridge._array import Device, Traits

PLAIN, RING, PINNED = "", "ring", "pinned"  # names of roads
CAPTURED = "captured"  # a crossing inside a graph capture, where nothing is recorded
BOTH_WAYS = "both ways"  # an order between streams: the giver's waits too, until what it has lent was read


class Road(NamedTuple):
    by: str
    why: str = ""  # what the plan adds to "cuda:0 to the host"


_RING = Road(RING, ", through the ring of pinned slots")


def down(now: Traits, *, pinned: bool) -> Road:
    """From the device; `pinned` asks for a page-locked result."""
    if not (now.device.is_cuda and _plain_bytes(now)):
        return Road(PLAIN)
    if pinned and now.framework == "torch":
        return Road(PINNED, ", straight into pinned memory")
    return _RING if now.size in FROM_LARGE else Road(PLAIN)


def up(now: Traits, where: Device, *, pinned: bool) -> Road:
    """To the device, from host memory that is known to be `pinned` or not."""
    if not (where.is_cuda and _plain_bytes(now)):
        return Road(PLAIN)
    if pinned:
        return Road(PINNED, ", straight from pinned memory")
    return _RING if now.size in FROM_LARGE else Road(PLAIN)


def into(now: Traits, out: Traits) -> str:
    """What the plan adds where `out` is filled over the bus; whether that is pinned, the driver is asked then."""
    crosses = {now.device.type, out.device.type} == {"cpu", "cuda"}
    block = _plain_bytes(now) and out.spacing == "dense" and not out.lazy and now.dtype == out.dtype
    return f"{_RING.why}, or directly where it is pinned" if crosses and block and now.size in FROM_LARGE else ""


def _plain_bytes(now: Traits) -> bool:
    return now.spacing == "dense" and not now.overlap and not now.graph and not now.lazy
