"""Dtypes: one table says under which name every framework knows an element type, and through which carrier it crosses.

A name is the field's own: "float32", "bfloat16", "float8_e4m3fn". A type that NumPy's buffers cannot carry (bfloat16,
the float8 family) crosses as an unsigned integer of the same width, its `carrier`, viewed as itself on either side.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tensorbridge._errors import nearest


class Dtype(NamedTuple):
    """One element type in every framework."""

    name: str
    itemsize: int  # bytes
    numpy: np.dtype[Any] | None  # None: NumPy has no such type
    torch: str  # attribute of torch; "": torch has no such type
    cupy: bool  # CuPy knows it
    dlpack: tuple[int, int] | None  # (type code, bits), one lane
    carrier: str  # the dtype whose buffer carries it; "": it crosses as itself


def _numpy_has(name: str) -> np.dtype[Any] | None:
    scalar = getattr(ml_dtypes, name, None) or getattr(np, name, None)
    return None if scalar is None else np.dtype(scalar)


#        name                 bytes torch  cupy   DLPack (code, bits)
_ROWS = [
    ("bool", 1, True, True, (6, 8)),
    ("int8", 1, True, True, (0, 8)),
    ("int16", 2, True, True, (0, 16)),
    ("int32", 4, True, True, (0, 32)),
    ("int64", 8, True, True, (0, 64)),
    ("uint8", 1, True, True, (1, 8)),
    ("uint16", 2, True, True, (1, 16)),
    ("uint32", 4, True, True, (1, 32)),
    ("uint64", 8, True, True, (1, 64)),
    ("float16", 2, True, True, (2, 16)),
    ("float32", 4, True, True, (2, 32)),
    ("float64", 8, True, True, (2, 64)),
    ("complex64", 8, True, True, (5, 64)),
    ("complex128", 16, True, True, (5, 128)),
    ("bfloat16", 2, True, True, (4, 16)),
    ("float8_e4m3fn", 1, True, False, (10, 8)),
    ("float8_e4m3fnuz", 1, True, False, (11, 8)),
    ("float8_e5m2", 1, True, False, (12, 8)),
    ("float8_e5m2fnuz", 1, True, False, (13, 8)),
    ("float8_e8m0fnu", 1, True, False, (14, 8)),
    ("float8_e3m4", 1, False, False, (7, 8)),
    ("float8_e4m3", 1, False, False, (8, 8)),
    ("float8_e4m3b11fnuz", 1, False, False, (9, 8)),
    ("int4", 1, False, False, None),
    ("uint4", 1, False, False, None),
    ("int2", 1, False, False, None),
    ("uint2", 1, False, False, None),
    ("float4_e2m1fn", 1, False, False, None),
    ("float6_e2m3fn", 1, False, False, None),
    ("float6_e3m2fn", 1, False, False, None),
    ("complex32", 4, True, False, (5, 32)),
    ("float4_e2m1fn_x2", 1, True, False, None),
    ("longdouble", np.dtype("longdouble").itemsize, False, False, None),
    ("clongdouble", np.dtype("clongdouble").itemsize, False, False, None),
]

DTYPES: dict[str, Dtype] = {
    name: Dtype(
        name,
        itemsize,
        numpy := _numpy_has(name),
        name if in_torch else "",
        in_cupy,
        dlpack,
        "" if numpy is None or numpy.isbuiltin == 1 else f"uint{8 * itemsize}",
    )
    for name, itemsize, in_torch, in_cupy, dlpack in _ROWS
}

_NAMES = {
    "numpy": frozenset(row.name for row in DTYPES.values() if row.numpy is not None),
    "torch": frozenset(row.name for row in DTYPES.values() if row.torch),
    "cupy": frozenset(row.name for row in DTYPES.values() if row.cupy),
}
BOUNDS = {  # of the integers: the least and the greatest
    **{f"int{bits}": (-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (2, 4, 8, 16, 32, 64)},
    **{f"uint{bits}": (0, (1 << bits) - 1) for bits in (2, 4, 8, 16, 32, 64)},
}
# The first name counts: where long double is double (Windows, Apple Silicon), NumPy says that the two are one dtype.
OF_NUMPY: dict[np.dtype[Any], str] = {row.numpy: row.name for row in reversed(DTYPES.values()) if row.numpy is not None}
_OF_DLPACK: dict[tuple[int, int], str] = {row.dlpack: row.name for row in DTYPES.values() if row.dlpack is not None}
_ALIASES = {  # what torch calls them too; NumPy means something else by some of these
    "double": "float64", "float": "float32", "half": "float16", "long": "int64", "int": "int32", "short": "int16",
    "cdouble": "complex128", "cfloat": "complex64", "chalf": "complex32",
}  # fmt: skip
# A bool is an int too: it comes first.
OF_PYTHON: dict[type, str] = {bool: "bool", int: "int64", float: "float64", complex: "complex128"}


def of_numpy(dtype: np.dtype[Any]) -> str:
    """The name of a NumPy dtype, ``">"`` in front if its bytes are swapped; ``""`` if the table does not hold it."""
    name = OF_NUMPY.get(dtype)
    if name is not None:
        return name
    if dtype.isbuiltin == 1 and dtype.kind in "iufc":  # a C type with two names: long and long long
        return OF_NUMPY.get(np.dtype(f"{dtype.kind}{dtype.itemsize}"), "")
    if not dtype.isnative and dtype.names is None:
        native = of_numpy(dtype.newbyteorder("="))
        return f">{native}" if native else ""
    return ""


def of_torch(dtype: object) -> str:
    """The name of a torch dtype (a name that the table does not hold if no other framework has it, as "quint8")."""
    return str(dtype).removeprefix("torch.")


def of_dlpack(code: int, bits: int, lanes: int) -> str:
    """The name of a DLPack data type, ``""`` if no framework here has it."""
    return _OF_DLPACK.get((code, bits), "") if lanes == 1 else ""


def parse(dtype: object) -> str:
    """The name meant by a caller's `dtype`: a name, a NumPy, CuPy or torch dtype, a scalar type or a Python type.

    Raises
    ------
    TypeError
        It names no element type of the table.
    """
    if isinstance(dtype, str):
        if dtype in DTYPES:
            return dtype
        if dtype.startswith("torch."):
            name = dtype.removeprefix("torch.")
            if (name := _ALIASES.get(name, name)) in DTYPES:
                return name
    if isinstance(dtype, getattr(sys.modules.get("torch"), "dtype", ())):
        name = of_torch(dtype)
        if name in DTYPES:
            return name
        raise _no_such(dtype)
    if isinstance(dtype, type) and dtype in OF_PYTHON:
        return OF_PYTHON[dtype]
    try:
        name = of_numpy(np.dtype(dtype)) if dtype is not None else ""  # type: ignore[call-overload]
    except (TypeError, ValueError):  # the latter of some tuples
        name = _ALIASES.get(dtype, "") if isinstance(dtype, str) else ""  # "cfloat", "chalf": NumPy knows no such name
    if name.startswith(">"):
        raise TypeError(f"dtype={dtype!r}: results are in native byte order; ask for {name[1:]!r}")
    if not name:
        raise _no_such(dtype)
    return name


def _no_such(dtype: object) -> TypeError:
    hint = nearest(dtype, DTYPES) or '; names are those of NumPy and torch, "float32", "int64", "bfloat16" ...'
    return TypeError(f"dtype={dtype!r} is not an element type that arrays can share{hint}")


# The kinds of the array API standard, as in its `isdtype`, by how the names begin.
_REAL, _SIGNED, _UNSIGNED, _COMPLEX = ("float", "bfloat", "longdouble"), ("int",), ("uint",), ("complex", "clongdouble")
KINDS: dict[str, tuple[str, ...]] = {
    "bool": ("bool",),
    "signed integer": _SIGNED,
    "unsigned integer": _UNSIGNED,
    "integral": _SIGNED + _UNSIGNED,
    "real floating": _REAL,
    "complex floating": _COMPLEX,
    "numeric": _SIGNED + _UNSIGNED + _REAL + _COMPLEX,
}
_OF_ABSTRACT: dict[object, str] = {  # NumPy's names for kinds
    np.signedinteger: "signed integer",
    np.unsignedinteger: "unsigned integer",
    np.integer: "integral",
    np.floating: "real floating",
    np.complexfloating: "complex floating",
    np.number: "numeric",
}


class Casts(NamedTuple):
    """A caller's `dtype` that depends on what an array has: ``{"float64": "float32", "integral": "int64"}``."""

    wanted: tuple[tuple[str, str], ...]  # by a name or a kind

    def of(self, name: str) -> str | None:
        """What elements of this dtype become; None if they stay. Its own name counts before a kind."""
        native = name.lstrip(">")
        for has, wanted in self.wanted:
            if has == native:
                return wanted
        return next((wanted for kind, wanted in self.wanted if native.startswith(KINDS.get(kind, ()))), None)

    def __repr__(self) -> str:
        return repr(dict(self.wanted))


def parse_casts(dtype: Mapping[Any, Any]) -> Casts:
    """The casts meant by a caller's mapping from a dtype or a kind to a dtype.

    Raises
    ------
    TypeError
        As `parse`; or a key is no dtype and no kind.
    ValueError
        Two keys are names of one dtype or kind, which is to become two.
    """
    found: dict[str, str] = {}
    for has, wanted in dtype.items():
        try:
            kind = _OF_ABSTRACT.get(has, has)
            name, becomes = kind if kind in KINDS else parse(has), parse(wanted)
        except TypeError as error:
            text = str(error)
            if (
                isinstance(has, str)
                and f"dtype={has!r}" in text
                and has not in KINDS
                and not has.startswith((">", "<"))
            ):
                kinds = ", ".join(map(repr, KINDS))
                text = f"{has!r} is neither a dtype nor one of the kinds {kinds}{nearest(has, (*KINDS, *DTYPES))}"
            raise TypeError(f"dtype={dict(dtype)!r}: {text.removeprefix('dtype=')}") from None
        if found.setdefault(name, becomes) != becomes:
            both = f"{name} is to become both {found[name]} and {becomes}"
            raise ValueError(f"dtype={dict(dtype)!r}: {both}; name it once")
    return Casts(tuple(found.items()))


def itemsize(name: str) -> int:
    """Bytes of an element, in whatever order they are."""
    return DTYPES[name.lstrip(">")].itemsize


def keeps_values(source: str, wanted: str) -> bool:
    """Whether a cast changes no value, so that all kernels make it alike."""
    before, after = DTYPES[source].numpy, DTYPES[wanted].numpy
    return source == wanted or (before is not None and after is not None and np.can_cast(before, after, "safe"))


def exists_in(name: str, framework: str) -> bool:
    """Whether `framework` ("numpy", "torch", "cupy") has elements of this name."""
    return name in _NAMES[framework]


def can_cast(framework: str, source: str, wanted: str) -> bool:
    """Whether `framework` itself can make elements of `wanted` from elements of `source`."""
    if not (exists_in(source, framework) and exists_in(wanted, framework)):
        return False
    if framework == "torch":
        return "float4_e2m1fn_x2" not in (source, wanted)  # packed: torch stores it, and computes nothing with it
    # NumPy leaves casts to whoever registered the dtype; ml_dtypes has none between most of its own small types.
    return np.can_cast(DTYPES[source].numpy, DTYPES[wanted].numpy, "unsafe")  # type: ignore[arg-type]


def crosses_plainly(name: str) -> bool:
    """Whether NumPy and torch both hold it as itself."""
    row = DTYPES[name]
    return row.numpy is not None and bool(row.torch) and not row.carrier


def is_differentiable(name: str) -> bool:
    """Whether torch lets elements of this kind require grad."""
    return name.startswith(("float", "bfloat", "complex"))


def is_complex(name: str) -> bool:
    return name in ("complex32", "complex64", "complex128", "clongdouble")
