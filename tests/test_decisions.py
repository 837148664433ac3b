"""Decisions as plain data: every source, target and option against the oracle, without a framework and without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import HAS, HOST_PROTOCOLS, WIDTH, expect, holder_of, place

from tensorbridge import CopyRequiredError, Device, GraphError, Traits
from tensorbridge._plan import HERE, Decision, Here, Want, decide

CPU, CUDA0, CUDA1 = Device("cpu"), Device("cuda:0"), Device("cuda:1")


# -- The specification, to be read


def numpy_like(**facts: object) -> Traits:
    return Traits("numpy", **facts)  # type: ignore[arg-type]


def torch_on(device: Device, **facts: object) -> Traits:
    return Traits("torch", device, **facts)  # type: ignore[arg-type]


def cupy_on(device: Device, **facts: object) -> Traits:
    return Traits("cupy", device, **facts)  # type: ignore[arg-type]


def ops(decision: Decision) -> list[str]:
    return [step.op for step in decision.steps]


CUPY0 = Want("cupy", CUDA0)
SPECIFICATION = [
    ("a plain array is shared", numpy_like(), Want("torch"), "share"),
    ("and back", torch_on(CPU), Want("numpy"), "share"),
    ("a reversed array is packed", numpy_like(spacing="reversed"), Want("torch"), "pack share"),
    ("but not for NumPy", numpy_like(spacing="reversed"), Want("numpy"), "share"),
    ("an odd stride is packed", numpy_like(spacing="odd"), Want("torch"), "pack share"),
    ("a gap is no reason", numpy_like(spacing="strided", order="F"), Want("torch"), "share"),
    ("a meaningless stride is replaced", numpy_like(loose=True), Want("torch"), "restride share"),
    ("unaligned elements are packed", numpy_like(aligned=False), Want("torch"), "pack share"),
    ("read-only memory is copied", numpy_like(writable=False), Want("torch"), "copy share"),
    ("unless told to share", numpy_like(writable=False), Want("torch", share_readonly=True), "share"),
    ("or on its way back", numpy_like(writable=False, origin="tensor"), Want("torch"), "share"),
    ("an overlap is copied", numpy_like(overlap=True), Want("torch"), "copy share"),
    ("and is read-only in NumPy", torch_on(CPU, overlap=True), Want("numpy"), "share protect"),
    ("bytes are swapped", numpy_like(dtype=">float32"), Want("torch"), "byteswap share"),
    ("but not for NumPy itself", numpy_like(dtype=">float32"), Want("numpy"), "share"),
    ("a cast swaps too", numpy_like(dtype=">float32"), Want("torch", dtype="float16"), "cast share"),
    ("a graph is left, read-only", torch_on(CPU, graph=True), Want("numpy"), "detach share protect"),
    ("writable on your word", torch_on(CPU, graph=True), Want("numpy", writable=True), "detach share"),
    ("a graph stays in torch", torch_on(CPU, graph=True), Want("torch", detach=False), "share"),
    ("unless detached", torch_on(CPU, graph=True), Want("torch"), "detach share"),
    ("a lazy bit is resolved", torch_on(CPU, dtype="complex64", lazy="conj"), Want("numpy"), "resolve share"),
    ("but not inside torch", torch_on(CPU, dtype="complex64", lazy="conj"), Want("torch"), "share"),
    ("complex32 is cast by torch", torch_on(CPU, dtype="complex32"), Want("numpy", dtype="complex64"), "cast share"),
    ("a copy is one copy", numpy_like(), Want("torch", copy=True), "copy share"),
    ("packing is that copy", numpy_like(spacing="reversed"), Want("torch", copy=True), "pack share"),
    ("a number is free", Traits("python scalar", dtype="float64"), Want("torch", copy=False), "wrap share"),
    ("a list is stacked", Traits("numpy list", dtype="float64"), Want("torch"), "stack share"),
    ("a foreign array is imported", Traits("dlpack"), Want("torch"), "import share"),
    ("read-only, it is copied", Traits("dlpack", writable=False), Want("torch"), "import copy share"),
    ("torch and CuPy share the GPU", torch_on(CUDA0), Want("cupy"), "detach share"),
    ("CuPy and torch too", cupy_on(CUDA0), Want("torch"), "share"),
    ("CuPy reverses, torch does not", cupy_on(CUDA0, spacing="reversed"), Want("torch"), "pack share"),
    ("a graph is copied for CuPy", torch_on(CUDA0, graph=True), Want("cupy"), "detach copy share"),
    ("down from torch", torch_on(CUDA0), Want("numpy"), "detach to_host share"),
    ("down from CuPy", cupy_on(CUDA0), Want("numpy"), "to_host share"),
    ("up to torch", numpy_like(), Want("torch", CUDA0), "share to_device"),
    ("up, read-only or not", numpy_like(writable=False), Want("torch", CUDA0), "share to_device"),
    ("up to CuPy", numpy_like(), CUPY0, "to_device"),
    ("up to CuPy from torch", torch_on(CPU), CUPY0, "share to_device"),
    ("narrow before the bus", numpy_like(dtype="float64"), Want("torch", CUDA0, "float16"), "cast share to_device"),
    ("widen behind it", numpy_like(dtype="uint8"), Want("torch", CUDA0, "float32"), "share to_device cast"),
    ("narrow on the device", torch_on(CUDA0), Want("numpy", dtype="float16"), "detach cast to_host share"),
    ("widen on the host", torch_on(CUDA0), Want("numpy", dtype="float64"), "detach to_host share cast"),
    ("from device to device", torch_on(CUDA0), Want("torch", CUDA1), "share to_device"),
    ("into the caller's array", numpy_like(spacing="reversed"), Want("torch", CPU, out=torch_on(CPU)), "fill"),
]


@pytest.mark.parametrize(("rule", "traits", "want", "steps"), SPECIFICATION, ids=[rule for rule, *_ in SPECIFICATION])
def test_specification(rule, traits, want, steps):
    assert ops(decide(traits, want)) == steps.split()


def test_streams_that_differ_are_ordered_before_sharing_and_streams_that_are_one_are_not():
    apart = HERE._replace(same_stream=False)
    assert ops(decide(torch_on(CUDA0), Want("cupy"), apart)) == ["detach", "order", "share"]
    assert ops(decide(cupy_on(CUDA0), Want("torch"), apart)) == ["order", "share"]
    assert ops(decide(cupy_on(CUDA0, spacing="reversed"), Want("torch"), apart)) == ["pack", "order", "share"]
    assert ops(decide(torch_on(CUDA0), Want("torch"), apart)) == ["share"]
    assert ops(decide(torch_on(CUDA0), Want("numpy"), apart)) == ["detach", "to_host", "share"]


def test_writable_graph_with_detach_false_is_a_graph_error_first():
    want = Want("numpy", writable=True, detach=False, copy=False, dtype="float4_e2m1fn_x2")
    assert decide(torch_on(CPU, graph=True, overlap=True), want).refusal.error is GraphError


# -- Every kind of array

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


def host_arrays(framework: str) -> Iterator[Traits]:
    origin = "unknown" if framework == "__array__" else ""
    for facts, writable in itertools.product((LAYOUTS | LAYOUTS_BEYOND_TORCH).values(), (True, False)):
        yield Traits(framework, CPU, "float64", writable=writable, origin=origin, **facts)
    for dtype, size in itertools.product(HOST_DTYPES, ("small", "large", "empty")):
        yield Traits(framework, CPU, dtype, size=size, origin=origin)
    for dtype in (">float32", "longdouble", "bfloat16"):
        yield Traits(framework, CPU, dtype, spacing="reversed", writable=False, aligned=False, origin=origin)
    yield Traits(framework, CPU, "int64", loose=True, size="empty", writable=False, origin=origin)


def numpy_arrays() -> Iterator[Traits]:
    yield from host_arrays("numpy")
    for facts, writable in itertools.product(LAYOUTS.values(), (True, False)):
        yield Traits("numpy", CPU, "float32", origin="tensor", writable=writable, **facts)
    for writable, spacing in itertools.product((True, False), ("dense", "strided", "reversed", "odd")):
        yield Traits("numpy", CPU, "int64", origin="memmap", writable=writable, spacing=spacing)


def tensors(device: Device) -> Iterator[Traits]:
    for facts, graph in itertools.product(LAYOUTS.values(), (False, True)):
        yield Traits("torch", device, "float32", graph=graph, **facts)
    for dtype, size, graph in itertools.product(TORCH_DTYPES, ("small", "large", "empty"), (False, True)):
        if not graph or dtype != "uint8":
            yield Traits("torch", device, dtype, size=size, graph=graph)
    for lazy, graph, facts in itertools.product(
        ("conj", "neg", "conj neg", "zero"), (False, True), (LAYOUTS["C"], LAYOUTS["strided-F"], LAYOUTS["overlap"])
    ):
        yield Traits("torch", device, "complex64", lazy=lazy, graph=graph, **facts)
    yield Traits("torch", device, "complex32", lazy="conj")
    for pinned in (True, False) if device == CPU else (False,):
        yield Traits("torch", device, "float32", pinned=pinned)
        yield Traits("torch", device, "float32", pinned=pinned, spacing="strided", graph=True)


def cupy_arrays(device: Device, framework: str = "cupy") -> Iterator[Traits]:
    writables = (True,) if framework == "cupy" else (True, False)
    for facts, writable in itertools.product((LAYOUTS | LAYOUTS_BEYOND_TORCH).values(), writables):
        yield Traits(framework, device, "float32", writable=writable, **facts)
    for dtype, size, spacing in itertools.product(CUPY_DTYPES, ("small", "large", "empty"), ("dense", "reversed")):
        yield Traits(framework, device, dtype, size=size, spacing=spacing)


def lists(framework: str, device: Device, dtypes: list[str]) -> Iterator[Traits]:
    for dtype, size in itertools.product(dtypes, ("small", "empty")):
        yield Traits(framework, device, dtype, size=size)
        if framework == "torch list" and dtype.startswith(("float3", "complex")):
            yield Traits(framework, device, dtype, size=size, graph=True)


SOURCES = {
    "numpy": list(numpy_arrays()),
    "torch on the host": list(tensors(CPU)),
    "torch on a GPU": list(tensors(CUDA0)),
    "cupy": [*cupy_arrays(CUDA0), *cupy_arrays(CUDA1)],
    "foreign on the host": [
        *host_arrays("dlpack"),
        *(
            Traits(
                protocol, CPU, dtype, spacing=spacing, writable=writable, origin="unknown" * (protocol == "__array__")
            )
            for protocol, dtype, spacing, writable in itertools.product(
                ("array_interface", "buffer", "__array__"), ("float32", ">int64"), ("dense", "reversed"), (True, False)
            )
        ),
    ],
    "foreign on a GPU": [*cupy_arrays(CUDA0, "dlpack"), *cupy_arrays(CUDA1, "cuda_array_interface")],
    "numbers and lists": [
        *(Traits("python scalar", dtype=dtype) for dtype in ("bool", "int64", "float64", "complex128", "bfloat16")),
        *lists("numpy list", CPU, ["float64", "int64", "bfloat16", "longdouble"]),
        *lists("torch list", CPU, ["float32", "complex64", "float8_e4m3fn", "complex32"]),
        *lists("torch list", CUDA0, ["float32", "float8_e4m3fn"]),
        *lists("cupy list", CUDA0, ["float32", "bfloat16"]),
    ],
}

COPIES = (None, True, False)
DTYPES = (None, "float32", "float16", "complex128", "int8", "float8_e4m3fn", "longdouble", "complex32", "float8_e8m0fnu",
          "float4_e2m1fn_x2")  # fmt: skip
DEVICES = (None, CPU, CUDA0, CUDA1)


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
    for copy, share, non_blocking in itertools.product(COPIES, (False, True), (False, True)):
        yield Want("torch", CUDA0, None, copy, None, share, False, False, non_blocking)
    for device, dtype, copy, share in itertools.product((None, CUDA0, CUDA1), DTYPES, COPIES, (False, True)):
        yield Want("cupy", device or (CUDA0 if source == CPU else None), dtype, copy, None, share)
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
        (CPU, CUDA0, CUDA1),
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


HERES = [Here(*facts) for facts in itertools.product((True, False), (True, False), (True, False))]
WANTED_IN_ANY_MOMENT = [
    Want("numpy"),
    Want("numpy", copy=True, writable=False),
    Want("torch", detach=False),
    Want("torch", CPU, detach=False),
    Want("torch", CUDA0, "float16", detach=False),
    Want("torch", CUDA0, copy=True),
    Want("torch", CUDA1, copy=False),
    Want("cupy", CUDA0),
    Want("cupy", CUDA0, copy=False, share_readonly=True),
    Want("cupy", CUDA1, "float64"),
]


# -- What every decision keeps


def side(device: Device) -> str:
    return "h" if device == CPU else "d"


FREE = {"detach", "wrap", "import", "restride", "order", "share", "protect"}
CHANGES_DTYPE = {"cast", "byteswap", "fill", "stack"}
CHANGES_FRAMEWORK = {"share", "import", "wrap", "stack", "to_host", "to_device", "fill"}


def assert_consistent(traits: Traits, want: Want, decision: Decision) -> None:
    """Invariants of the steps, whatever they are."""
    before = traits
    for step in decision.steps:
        after = step.after
        moves = step.op not in FREE
        if moves and traits.size != "empty":
            assert step.kind == side(before.device) + "2" + side(after.device), f"{step.op}: kind {step.kind!r}"
        else:
            assert step.kind == "", f"{step.op} moves nothing, yet says {step.kind!r}"
        if before.device != after.device:
            assert step.op in ("to_host", "to_device", "fill"), f"{step.op} changes the device"
        if before.dtype != after.dtype:
            assert step.op in CHANGES_DTYPE, f"{step.op} changes the dtype"
            assert after.dtype.lstrip(">") in (before.dtype.lstrip(">"), want.dtype, "complex64"), (
                "a dtype nobody asked for"
            )
        if before.framework != after.framework:
            assert step.op in CHANGES_FRAMEWORK, f"{step.op} changes the framework"
        if before.graph != after.graph:
            assert step.op in ("detach", "cast", "fill"), f"{step.op} cuts the graph"
        assert after.framework != "torch" or (after.spacing in ("dense", "strided") and not after.dtype.startswith(">"))
        assert after.framework not in HAS or after.dtype.lstrip(">") in HAS[after.framework], (
            f"{after.framework} has no {after.dtype}"
        )
        assert after.framework != "numpy" or (after.device == CPU and not after.graph and not after.lazy)
        assert after.framework != "cupy" or after.device != CPU
        assert after.framework not in ("torch", "cupy") or after.writable, f"{after.framework} has no read-only flag"
        assert step.why
        assert after.size == traits.size
        before = after
    assert [step.op for step in decision.steps].count("share") <= 1


def assert_as_expected(traits: Traits, want: Want, here: Here) -> None:
    decision, expected = decide(traits, want, here), expect(traits, want, here)
    case = f"{traits}\n{want}\n{here}\n{expected}\n{decision}"
    try:
        if decision.refusal is not None:
            assert decision.refusal.error in expected.errors, decision.refusal
            assert decision.refusal.error is not CopyRequiredError or traits.size != "empty"
            return
        assert not expected.errors, "not refused"
        assert_consistent(traits, want, decision)
        steps, end = decision.steps, decision.steps[-1].after
        kinds = [step.kind for step in steps if step.op not in FREE]
        if traits.size != "empty":
            assert expected.passes[0] <= len(kinds) <= expected.passes[1], "passes"
            assert sum(kind in ("h2d", "d2h") for kind in kinds) == expected.crossings
            assert not (want.copy is False and any(step.kind for step in steps))
            assert kinds == [] if expected.shares else True
        assert end.framework == want.framework
        assert end.dtype in expected.dtypes or want.out is not None and end.dtype == want.out.dtype
        assert end.device == expected.device
        assert traits.size == "empty" or end.writable == expected.writable
        assert end.graph == expected.graph
        assert not expected.pinned or end.pinned
        if expected.bus_width is not None and want.out is None:
            across = next(step for step in steps if step.op in ("to_host", "to_device"))
            assert WIDTH[across.after.dtype.lstrip(">")] == expected.bus_width, "bytes over the bus"
        if expected.ordered is not None and want.out is None:
            assert ("order" in ops(decision)) == expected.ordered
    except AssertionError as error:
        raise AssertionError(f"{error}\n{case}") from None


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_and_option_is_decided_as_the_oracle_says(source):
    for traits in SOURCES[source]:
        for want in wants(traits.device):
            assert_as_expected(traits, want, HERE)


@pytest.mark.parametrize("source", SOURCES)
def test_every_out_is_decided_as_the_oracle_says(source):
    for traits in SOURCES[source]:
        for want in outs():
            assert_as_expected(traits, want, HERE)


@pytest.mark.parametrize("source", SOURCES)
def test_capture_fork_and_streams_are_decided_as_the_oracle_says(source):
    for traits, want, here in itertools.product(SOURCES[source], WANTED_IN_ANY_MOMENT, HERES):
        on_device = CPU not in (traits.device, place(traits, want))
        crosses = on_device and {holder_of(traits, want, here), want.framework} == {"torch", "cupy"}
        if (want.device is not None or traits.device != CPU) and (crosses or here.same_stream):  # else one stream only
            assert_as_expected(traits, want, here)


# -- The rest of the product, by chance

KINDS = st.builds(
    Traits,
    framework=st.sampled_from(["numpy", "torch", "cupy", "dlpack", "cuda_array_interface", "torch list", "numpy list"]),
    device=st.sampled_from([CPU, CUDA0, CUDA1]),
    dtype=st.sampled_from(sorted(HAS["numpy"] | HAS["torch"]) + [">int16", ">float64", ">complex64"]),
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
    origin=st.sampled_from(["", "tensor", "memmap"]),
)


def possible(traits: Traits) -> Traits:
    """The nearest kind of array that exists."""
    name, dtype = traits.framework.removesuffix(" list"), traits.dtype
    if name == "numpy" or traits.framework == "cuda_array_interface":
        traits = traits._replace(device=CPU if name == "numpy" else CUDA0)
    if name == "cupy" and traits.device == CPU:
        traits = traits._replace(device=CUDA0)
    if name in ("torch", "cupy") or traits.device != CPU:
        dtype = dtype.lstrip(">")
    if dtype.lstrip(">") not in HAS.get(name, HAS["numpy"] if traits.device == CPU else HAS["cupy"]):
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
    if name != "numpy" or (traits.origin == "tensor" and traits.spacing in ("reversed", "odd")):
        traits = traits._replace(origin="")
    if traits.origin == "tensor" and dtype not in HAS["torch"]:
        traits = traits._replace(origin="")
    if traits.framework.endswith(" list"):
        traits = Traits(traits.framework, traits.device, graph=traits.graph, size=traits.size)
    return traits._replace(dtype=dtype)


@settings(max_examples=2000, deadline=None)
@given(KINDS.map(possible), st.data())
def test_any_kind_of_array_and_any_wish_is_decided_as_the_oracle_says(traits, data):
    assert_as_expected(traits, data.draw(st.sampled_from(WISHES[traits.device == CPU])), data.draw(MOMENTS))


WISHES = {on_host: [*wants(CPU if on_host else CUDA0), *outs()] for on_host in (True, False)}
MOMENTS = st.sampled_from([HERE, HERE._replace(forked=True), HERE._replace(worker=True), HERE._replace(gpu="cupy")])


# -- What a reader may want to know at a glance


TWICE = {
    ("stack", "cast"): "a list is stacked as it is, then cast",
    ("stack", "fill"): "a list is stacked, then written into out",
    ("stack", "pin"): "a list is stacked, then pinned",
    ("pack", "pin"): "torch pins what it can hold",
    ("byteswap", "pin"): "torch pins what it can hold",
    ("cast", "pin"): "torch pins what it has cast",
    ("resolve", "pin"): "torch pins what it has resolved",
    ("resolve", "fill"): "NumPy fills what torch has resolved",
    ("cast", "fill"): "NumPy fills what torch has cast",
}


@pytest.mark.parametrize("source", [name for name in SOURCES if "GPU" not in name and name != "cupy"])
def test_host_memory_is_written_twice_only_for_lists_pinned_results_and_odd_outs(source):
    for traits in SOURCES[source]:
        for want in (*wants(CPU), *outs()):
            if CPU in (want.device, Device(want.framework == "numpy" and "cpu" or "")) and traits.device == CPU:
                writes = tuple(step.op for step in decide(traits, want).steps if step.kind)
                assert len(writes) <= 1 or writes in TWICE or writes == ("stack", "cast", "pin"), (traits, want, writes)
