"""What can go wrong, as a tree: every error is a BridgeError, and the built-in that a careful caller already catches.

BridgeError(Exception)                           ``.plan``: the plan that was refused, or None
├── CopyRequiredError(ValueError, BufferError)   bytes would have to move, and may not
├── GraphError(RuntimeError)                     an autograd graph would be cut, or written behind its back
├── UnsupportedArrayError(TypeError)             there is no such array on the other side
├── DeviceError(RuntimeError)                    no such device, or not from this process
├── MissingFrameworkError(ImportError)           the target framework is not installed
└── ProducerError(BufferError)                   a foreign object broke the protocol that it claims to speak

Each is built from one message, so that a DataLoader worker's error can be rebuilt from its text, and pickles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tensorbridge._step import Plan


class CopyWarning(UserWarning):
    """A conversion moved bytes inside ``copy_guard("warn")``."""


class BridgeError(Exception):
    """Base of every error that tensorbridge raises on purpose (wrong options are plain ValueError or TypeError).

    ``.plan`` is the `Plan` that was refused, or None where there was none yet.
    """

    plan: Plan | None = None


class CopyRequiredError(BridgeError, ValueError, BufferError):
    """`copy` is False, or a copy guard is open, and bytes would have to move; ``.plan`` says which and why."""


class GraphError(BridgeError, RuntimeError):
    """An autograd graph would be cut, or a tensor in it written without autograd's knowledge."""


class UnsupportedArrayError(BridgeError, TypeError):
    """The array has no equal on the other side; the message names the method or ``dtype=`` that works."""


class DeviceError(BridgeError, RuntimeError):
    """The device does not exist, or cannot be used from this process or at this moment."""


class MissingFrameworkError(BridgeError, ImportError):
    """A framework that the conversion needs is not installed."""

    def __str__(self) -> str:
        return BaseException.__str__(self)  # ImportError keeps its first text, without the leaf that is named later


class ProducerError(BridgeError, BufferError):
    """A foreign array failed while exporting its memory, or described it wrongly; its own error is the cause."""


INSTALL = {
    "torch": "pip install torch (for the CPU alone, from PyTorch's own CPU index)",
    "cupy": "pip install cupy-cuda12x or cupy-cuda13x[ctk], whichever the driver's CUDA version asks for",
}


def nearest(given: object, choices: Iterable[str]) -> str:
    """The choice that a misspelt word was probably meant to be, as the end of a message; or nothing."""
    from difflib import get_close_matches  # slow to import, and only needed here

    found = get_close_matches(given.lower(), list(choices), 1, 0.5) if isinstance(given, str) else []
    return f"; did you mean {found[0]!r}?" if found else ""


for _error in (
    CopyWarning,
    BridgeError,
    CopyRequiredError,
    GraphError,
    UnsupportedArrayError,
    DeviceError,
    MissingFrameworkError,
    ProducerError,
):
    _error.__module__ = "tensorbridge"  # tracebacks show the name that callers import
