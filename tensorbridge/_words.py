"""Refusals, in words: what was asked, why it cannot be, how many bytes it would take, what works instead."""

from __future__ import annotations

import math

from tensorbridge import _dtypes
from tensorbridge._array import ArrayInfo, Device
from tensorbridge._errors import BridgeError
from tensorbridge._step import Decision, Refusal, Want, bind, bytes_text, named, step_lines, usual


def call(want: Want) -> str:
    """The call as the caller wrote it, as far as options decide: ``to_torch(copy=False)``."""
    given = [
        f"{'dtype' if name == 'casts' else name}={str(value) if isinstance(value, Device) else value!r}"
        for name, value, default in zip(Want._fields, want, usual(want.framework), strict=True)
        if value != default and name not in ("framework", "out")
        and not (want.out is not None and name in ("dtype", "device"))  # said by `out`
    ]  # fmt: skip
    if want.out is not None:
        given.append("out=...")
    return f"to_{want.framework}({', '.join(given)})" if given else f"to_{want.framework}"


def refused(decision: Decision, info: ArrayInfo, want: Want) -> Exception:
    """The error for a refusal: asked, refused, why, how many bytes, what works."""
    refusal = decision.refusal
    assert refusal is not None
    asked = call(want)
    made = bind(decision.steps, info, want) if decision.steps else None
    source = str(info)
    source += "," * (", " in source.partition(" on ")[2])  # closes what was said of it in passing
    if not refusal.why:
        lines = [f"{asked}: {source} cannot be shared.", *step_lines(made.steps if made else ())]
        lines.append("Allow the copy with copy=None" + (f", or {named(refusal.cure, info)}." if refusal.cure else "."))
        text = "\n".join(lines)
    else:
        text = f"{asked}: {source} cannot be converted: {named(refusal.why, info)}.\n{_cure(refusal, info)}"
    error = refusal.error(text)
    if isinstance(error, BridgeError):
        error.plan = made
    return error


def _cure(refusal: Refusal, info: ArrayInfo) -> str:
    if not refusal.cast:
        return refusal.cure
    nbytes = math.prod(info.shape) * _dtypes.itemsize(refusal.cast)
    return f"{refusal.cure}: a copy of {bytes_text(nbytes)}."
