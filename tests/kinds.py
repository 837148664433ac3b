"""Every kind of array and every wish, as plain data: what the decision tests go through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st
from oracle import HAS, LACKS

from tensorbridge import Device, Traits
from tensorbridge._step import Want

CPU, CUDA0, CUDA1 = Device("cpu"), Device("cuda:0"), Device("cuda:1")
MPS0, XPU0, XPU1 = Device("mps:0"), Device("xpu:0"), Device("xpu:1")

LAYOUTS = {
    "C": {},
    "F": {"order": "F"},
    "K": {"order": "K"},
    "strided": {"spacing": "strided"},
    "strided-F": {"spacing": "strided", "order": "F"},
    "overlap": {"spacing": "strided", "overlap": True},
    "unaligned": {"aligned": False},
}
LAYOUTS_BEYOND_TORCH = {
    "reversed": {"spacing": "reversed"},
    "reversed-K": {"spacing": "reversed", "order": "K"},
    "odd": {"spacing": "odd"},
    "loose": {"loose": True},
    "reversed-loose-unaligned": {"spacing": "reversed", "loose": True, "aligned": False},
    "reversed-overlap": {"spacing": "reversed", "overlap": True},
    "odd-unaligned-overlap": {"spacing": "odd", "aligned": False, "overlap": True},
}
HOST_DTYPES = ["float32", "float64", "bool", "bfloat16", "float8_e4m3fn", "float8_e3m4", "complex64", "int4",
               "longdouble", ">float32", ">int64", ">complex128"]  # fmt: skip
TORCH_DTYPES = ["float32", "float64", "uint8", "bfloat16", "float8_e4m3fn", "complex64", "complex32",
                "float4_e2m1fn_x2"]  # fmt: skip
CUPY_DTYPES = ["float32", "float64", "uint8", "bfloat16", "complex64"]


def host_arrays(framework: str, origin: str = "") -> Iterator[Traits]:
    for facts, writable in itertools.product((LAYOUTS | LAYOUTS_BEYOND_TORCH).values(), (True, False)):
        yield Traits(framework, CPU, "float64", writable=writable, origin=origin, **facts)
    for dtype, size in itertools.product(HOST_DTYPES, ("small", "large", "empty")):
        yield Traits(framework, CPU, dtype, size=size, origin=origin)
    for dtype in (">float32", "longdouble", "bfloat16"):
        yield Traits(framework, CPU, dtype, spacing="reversed", writable=False, aligned=False, origin=origin)
    yield Traits(framework, CPU, "int64", loose=True, size="empty", writable=False, origin=origin)


def numpy_arrays() -> Iterator[Traits]:
    yield from host_arrays("numpy")
    for facts, writable in itertools.product((LAYOUTS | LAYOUTS_BEYOND_TORCH).values(), (True, False)):
        for origin in ("tensor", "narrowed"):
            yield Traits("numpy", CPU, "float32", origin=origin, writable=writable, **facts)
    for writable, spacing in itertools.product((True, False), ("dense", "strided", "reversed", "odd")):
        yield Traits("numpy", CPU, "int64", origin="memmap", writable=writable, spacing=spacing)


def tensors(device: Device) -> Iterator[Traits]:
    for facts, graph in itertools.product(LAYOUTS.values(), (False, True)):
        yield Traits("torch", device, "float32", graph=graph, **facts)
    for dtype, size, graph in itertools.product(TORCH_DTYPES, ("small", "large", "empty"), (False, True)):
        if (not graph or dtype != "uint8") and dtype not in LACKS.get(device.type, ()):
            yield Traits("torch", device, dtype, size=size, graph=graph)
    for lazy, graph, facts in itertools.product(
        ("conj", "neg", "conj neg", "zero"), (False, True), (LAYOUTS["C"], LAYOUTS["strided-F"], LAYOUTS["overlap"])
    ):
        yield Traits("torch", device, "complex64", lazy=lazy, graph=graph, **facts)
    yield Traits("torch", device, "complex32", lazy="conj")
    if device == CPU:
        for facts, graph in itertools.product(LAYOUTS.values(), (False, True)):
            yield Traits("torch", device, "float32", writable=False, graph=graph, **facts)
    for pinned in (True, False) if device == CPU else (False,):
        yield Traits("torch", device, "float32", pinned=pinned)
        yield Traits("torch", device, "float32", pinned=pinned, spacing="strided", graph=True)


def cupy_arrays(device: Device, framework: str = "cupy", origin: str = "") -> Iterator[Traits]:
    writables = (True,) if framework == "cupy" else (True, False)
    for facts, writable in itertools.product((LAYOUTS | LAYOUTS_BEYOND_TORCH).values(), writables):
        yield Traits(framework, device, "float32", writable=writable, origin=origin, **facts)
    for dtype, size, spacing in itertools.product(CUPY_DTYPES, ("small", "large", "empty"), ("dense", "reversed")):
        yield Traits(framework, device, dtype, size=size, spacing=spacing, origin=origin)


def lists(framework: str, device: Device, dtypes: list[str]) -> Iterator[Traits]:
    for dtype, size in itertools.product(dtypes, ("small", "empty")):
        yield Traits(framework, device, dtype, size=size)
        if framework == "torch list" and dtype.startswith(("float3", "complex")):
            yield Traits(framework, device, dtype, size=size, graph=True)


SOURCES = {
    "numpy": list(numpy_arrays()),
    "torch on the host": list(tensors(CPU)),
    "torch on a GPU": list(tensors(CUDA0)),
    "torch on another device": [*tensors(MPS0), *tensors(XPU1)],
    "cupy": [*cupy_arrays(CUDA0), *cupy_arrays(CUDA1)],
    "foreign on the host": [
        *host_arrays("dlpack"),
        *host_arrays("dlpack", "copied"),
        *(
            Traits(protocol, CPU, dtype, spacing=spacing, writable=writable, origin=origin)
            for (protocol, origin), dtype, spacing, writable in itertools.product(
                (
                    *(("array_interface", ""), ("array_interface", "made"), ("buffer", "")),
                    *(("__array__", "unknown"), ("__array__", "copied"), ("__array__", "made")),
                ),
                ("float32", ">int64"),
                ("dense", "reversed"),
                (True, False),
            )
        ),
    ],
    "foreign on a GPU": [
        *cupy_arrays(CUDA0, "dlpack"),
        *cupy_arrays(CUDA0, "dlpack", "copied"),
        *cupy_arrays(CUDA1, "cuda_array_interface"),
    ],
    "numbers and lists": [
        *(Traits("python scalar", dtype=dtype) for dtype in ("bool", "int64", "float64", "complex128", "bfloat16")),
        *lists("numpy list", CPU, ["float64", "int64", "bfloat16", "longdouble"]),
        *(traits._replace(origin="its chunks are joined") for traits in lists("column", CPU, ["float64", "bool"])),
        *(traits._replace(origin="its columns are joined") for traits in lists("table", CPU, ["int64"])),
        *lists("torch list", CPU, ["float32", "complex64", "float8_e4m3fn", "complex32"]),
        *lists("torch list", CUDA0, ["float32", "float8_e4m3fn"]),
        *lists("torch list", MPS0, ["float32"]),
        *lists("cupy list", CUDA0, ["float32", "bfloat16"]),
    ],
}

COPIES = (None, True, False)
DTYPES = (None, "float32", "float16", "complex128", "int8", "float8_e4m3fn", "longdouble", "complex32",
          "float8_e8m0fnu", "float4_e2m1fn_x2")  # fmt: skip
DEVICES = (None, CPU, CUDA0, CUDA1, MPS0, XPU0)


def wants(source: Device) -> Iterator[Want]:
    """Every wish that the options let through (`_options` refuses the rest before anything is decided)."""
    for dtype, copy, writable in itertools.product(DTYPES, COPIES, COPIES):
        yield Want("numpy", None, dtype, copy, writable)
    for copy, writable in itertools.product(COPIES, COPIES):
        yield Want("numpy", None, None, copy, writable, detach=False)
    for device, dtype, copy in itertools.product(DEVICES, DTYPES, COPIES):
        yield Want("torch", device, dtype, copy, detach=False)
    for device, copy, share, detach, pin, non_blocking in itertools.product(
        (None, CPU), COPIES, (False, True), (False, True), (False, True), (False, True)
    ):
        yield Want("torch", device, None, copy, None, share, detach, pin, non_blocking)
    for device, copy, share, non_blocking in itertools.product((CUDA0, MPS0), COPIES, (False, True), (False, True)):
        yield Want("torch", device, None, copy, None, share, False, False, non_blocking)
    for device, dtype, copy, share in itertools.product((None, CUDA0, CUDA1), DTYPES, COPIES, (False, True)):
        yield Want("cupy", device or (None if source.is_cuda else CUDA0), dtype, copy, None, share)
    for detach, non_blocking in itertools.product((False, True), (False, True)):
        yield Want("cupy", CUDA0, detach=detach, non_blocking=non_blocking)


def outs() -> Iterator[Want]:
    """Every `out` that the options let through: writable, not in a graph, not overlapping."""
    for dtype, writable, facts in itertools.product(
        ("float32", "bfloat16", "complex128", "longdouble", ">float64", "int4"),
        (None, False),
        ({}, LAYOUTS["strided-F"], LAYOUTS_BEYOND_TORCH["reversed"], LAYOUTS_BEYOND_TORCH["odd"]),
    ):
        out = Traits("numpy", CPU, dtype, **facts)
        yield Want("numpy", None, dtype.lstrip(">"), None, writable, out=out)
    for device, dtype, facts, non_blocking in itertools.product(
        (CPU, CUDA0, CUDA1, MPS0, XPU0),
        ("float32", "float16", "complex32", "float8_e4m3fn"),
        ({}, LAYOUTS["strided-F"]),
        (False, True),
    ):
        out = Traits("torch", device, dtype, **facts)
        yield Want("torch", device, dtype, None, non_blocking=non_blocking, out=out, detach=False)
    for device, dtype, facts in itertools.product(
        (CUDA0, CUDA1), ("float32", "float16", "complex128"), ({}, LAYOUTS_BEYOND_TORCH["reversed"])
    ):
        yield Want("cupy", device, dtype, None, out=Traits("cupy", device, dtype, **facts))


# -- Any kind, by chance

KINDS = st.builds(
    Traits,
    framework=st.sampled_from(["numpy", "torch", "cupy", "dlpack", "cuda_array_interface", "torch list", "numpy list"]),
    device=st.sampled_from([CPU, CUDA0, CUDA1, MPS0, XPU1]),
    dtype=st.sampled_from([*sorted(HAS["numpy"] | HAS["torch"]), ">int16", ">float64", ">complex64"]),
    order=st.sampled_from("CFK"),
    spacing=st.sampled_from(["dense", "strided", "reversed", "odd"]),
    overlap=st.booleans(),
    loose=st.booleans(),
    aligned=st.booleans(),
    writable=st.booleans(),
    graph=st.booleans(),
    lazy=st.sampled_from(["", "conj", "neg", "conj neg", "zero"]),
    pinned=st.sampled_from([None, True, False]),
    size=st.sampled_from(["empty", "small", "medium", "large"]),
    origin=st.sampled_from(["", "tensor", "narrowed", "memmap", "copied"]),
)


def possible(traits: Traits) -> Traits:
    """The nearest kind of array that exists."""
    name, dtype = traits.framework.removesuffix(" list"), traits.dtype
    if traits.device.is_other and name != "torch":
        traits = traits._replace(device=CUDA0)
    if name == "numpy" or traits.framework == "cuda_array_interface":
        traits = traits._replace(device=CPU if name == "numpy" else CUDA0)
    if name == "cupy" and traits.device == CPU:
        traits = traits._replace(device=CUDA0)
    if name in ("torch", "cupy") or traits.device != CPU:
        dtype = dtype.lstrip(">")
    if dtype.lstrip(">") not in HAS.get(name, HAS["numpy"] if traits.device == CPU else HAS["cupy"]):
        dtype = "float32"
    if dtype in LACKS.get(traits.device.type, ()):
        dtype = "float32"
    if name != "torch":
        traits = traits._replace(graph=False, lazy="", pinned=None)
    else:
        spacing = traits.spacing if traits.spacing in ("dense", "strided") else "strided"
        lazy = traits.lazy if dtype.startswith("complex") else ""
        graph = traits.graph and dtype.startswith(("float", "bfloat", "complex"))
        traits = traits._replace(spacing=spacing, lazy=lazy, graph=graph, loose=False)
        traits = traits if traits.device == CPU else traits._replace(pinned=False)
    if name in ("torch", "cupy"):
        traits = traits._replace(writable=True)
    if traits.origin not in {"numpy": ("tensor", "narrowed", "memmap"), "dlpack": ("copied",)}.get(name, ()):
        traits = traits._replace(origin="")
    if traits.framework.endswith(" list"):
        traits = Traits(traits.framework, traits.device, graph=traits.graph, size=traits.size)
    return traits._replace(dtype=dtype)
