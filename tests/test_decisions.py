"""Decisions as plain data, without a framework and without a GPU: every source and every option, against an oracle."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import CPU, CUDA0, CUDA1, KINDS, MPS0, SOURCES, XPU0, XPU1, outs, possible, wants
from oracle import HAS, WIDTH, expect, holder_of, place

from tensorbridge import CopyRequiredError, Device, GraphError, Traits
from tensorbridge._plan import decide
from tensorbridge._roads import BOTH_WAYS
from tensorbridge._step import HERE, Decision, Here, Want

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
INT64 = Want("torch", dtype="int64", detach=False)
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
    ("an integer has no graph", torch_on(CPU, graph=True), INT64, "detach cast share"),
    ("unless detached", torch_on(CPU, graph=True), Want("torch"), "detach share"),
    ("a lazy bit is resolved", torch_on(CPU, dtype="complex64", lazy="conj"), Want("numpy"), "resolve share"),
    ("but not inside torch", torch_on(CPU, dtype="complex64", lazy="conj"), Want("torch"), "share"),
    ("complex32 is cast by torch", torch_on(CPU, dtype="complex32"), Want("numpy", dtype="complex64"), "cast share"),
    ("a copy is one copy", numpy_like(), Want("torch", copy=True), "copy share"),
    ("packing is that copy", numpy_like(spacing="reversed"), Want("torch", copy=True), "pack share"),
    ("a number is free", Traits("python scalar", dtype="float64"), Want("torch", copy=False), "wrap share"),
    ("of any dtype", Traits("python scalar", dtype="int64"), Want("torch", dtype="bfloat16", copy=False), "wrap share"),
    ("a list is stacked", Traits("numpy list", dtype="float64"), Want("torch"), "stack share"),
    ("a column is made an array", Traits("column", dtype="bool", origin="unpacked"), Want("torch"), "stack share"),
    ("a foreign array is imported", Traits("dlpack"), Want("torch"), "import share"),
    ("read-only, it is copied", Traits("dlpack", writable=False), Want("torch"), "import copy share"),
    ("a copy that it made is shown", Traits("dlpack", origin="copied"), Want("torch"), "export share"),
    ("and is fresh memory", Traits("dlpack", origin="copied"), Want("numpy", copy=True), "export share"),
    ("unless read-only", Traits("dlpack", writable=False, origin="copied"), Want("torch"), "export copy share"),
    ("so is one that it made", Traits("__array__", origin="made"), Want("torch", copy=True), "export share"),
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
    ("down from Apple's GPU", torch_on(MPS0), Want("numpy"), "detach to_host share"),
    ("widen on the host", torch_on(MPS0), Want("numpy", dtype="float64"), "detach to_host share cast"),
    ("or as wide", torch_on(MPS0, dtype="int64"), Want("numpy", dtype="float64"), "detach to_host share cast"),
    ("narrow on it", torch_on(MPS0), Want("numpy", dtype="float16"), "detach cast to_host share"),
    (
        "a bit is resolved there",
        torch_on(XPU0, dtype="complex64", lazy="conj"),
        Want("numpy"),
        "detach resolve to_host share",
    ),
    ("up to it", numpy_like(), Want("torch", MPS0), "share to_device"),
    (
        "what it has not stays behind",
        numpy_like(dtype="float64"),
        Want("torch", MPS0, "float32"),
        "cast share to_device",
    ),
    ("it is shared where it is", torch_on(MPS0), Want("torch", MPS0), "share"),
    ("to another of its kind", torch_on(XPU0), Want("torch", XPU1), "share to_device"),
    ("to CUDA by the host", torch_on(XPU0), Want("torch", CUDA0), "to_host share to_device"),
    ("and back", cupy_on(CUDA0), Want("torch", XPU0), "to_host share to_device"),
    ("to CuPy too", torch_on(XPU0), Want("cupy"), "detach to_host share to_device"),
    ("into an array, as it is", torch_on(MPS0), Want("torch", CPU, out=torch_on(CPU)), "fill"),
    ("or cast on the host", torch_on(MPS0), Want("torch", CPU, out=torch_on(CPU, dtype="float64")), "to_host fill"),
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


@pytest.mark.parametrize("same_stream", [True, False])
@pytest.mark.parametrize(
    ("traits", "want", "reads"),
    [
        (torch_on(CUDA0), Want("cupy"), False),
        (torch_on(CUDA0), Want("cupy", copy=True), False),  # torch copies, on its own stream
        (torch_on(CUDA0), Want("cupy", out=cupy_on(CUDA0)), True),
        (torch_on(CUDA0), Want("cupy", CUDA1), True),
        (cupy_on(CUDA0), Want("torch", out=torch_on(CUDA0)), True),
        (cupy_on(CUDA0), Want("torch", CUDA1), True),
    ],
    ids=str,
)
def test_the_giver_waits_until_what_it_lends_was_copied_and_the_plan_says_so(traits, want, reads, same_stream):
    steps = decide(traits, want, HERE._replace(same_stream=same_stream)).steps
    back = [step for step in steps if step.by == BOTH_WAYS]
    assert bool(back) == (reads and not same_stream)
    assert all(step.op == "order" and step.why.endswith("and back, when the copy has been made") for step in back)


def test_a_copy_that_the_producer_made_keeps_its_layout_has_bytes_and_may_not_be_where_none_may():
    kind = Traits("dlpack", order="F", spacing="strided", origin="copied")
    decision = decide(kind, Want("numpy"))
    assert [(step.op, step.kind) for step in decision.steps] == [("export", "h2h"), ("share", "")]
    assert decision.steps[0].after == Traits("numpy", order="F", spacing="strided")
    assert decide(kind, Want("numpy", copy=False)).refusal.error is CopyRequiredError
    assert decide(kind._replace(size="empty"), Want("numpy", copy=False)).refusal is None


def test_writable_graph_with_detach_false_is_a_graph_error_first():
    want = Want("numpy", writable=True, detach=False, copy=False, dtype="float4_e2m1fn_x2")
    assert decide(torch_on(CPU, graph=True, overlap=True), want).refusal.error is GraphError


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
CHANGES_DTYPE = {"cast", "byteswap", "fill", "stack", "wrap"}
CHANGES_FRAMEWORK = {"share", "import", "export", "wrap", "stack", "to_host", "to_device", "fill"}


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
        if after.pinned and (moves or not before.pinned):
            assert step.op in ("pin", "fill") or step.by == "pinned", f"{step.op} makes ordinary memory"
        if before.dtype != after.dtype:
            assert step.op in CHANGES_DTYPE, f"{step.op} changes the dtype"
            widths = [WIDTH[array.dtype.lstrip(">")] for array in (before, after)]
            assert "fewer bytes cross" not in step.why or widths[0] != widths[1], "a cast that saves nothing"
            assert after.dtype.lstrip(">") in (before.dtype.lstrip(">"), want.dtype), "a dtype that nobody asked for"
        if before.framework != after.framework:
            assert step.op in CHANGES_FRAMEWORK, f"{step.op} changes the framework"
        if before.graph != after.graph:
            assert step.op == "detach", f"{step.op} cuts the graph"
        assert after.framework != "torch" or (after.spacing in ("dense", "strided") and not after.dtype.startswith(">"))
        assert after.framework not in HAS or after.dtype.lstrip(">") in HAS[after.framework], (
            f"{after.framework} has no {after.dtype}"
        )
        assert after.framework != "numpy" or (after.device == CPU and not after.graph and not after.lazy)
        assert after.framework != "cupy" or after.device != CPU
        assert after.framework != "cupy" or after.writable, "cupy has no read-only flag"
        assert after.framework != "torch" or after.writable or not traits.writable, "a tensor is what its memory was"
        assert step.why
        assert after.size == traits.size
        before = after
    assert [step.op for step in decision.steps].count("share") <= 1


def assert_as_expected(traits: Traits, want: Want, here: Here) -> None:
    decision, expected = decide(traits, want, here), expect(traits, want, here)
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
            assert not (expected.shares and kinds)
        assert end.framework == want.framework
        assert end.dtype in expected.dtypes or (want.out is not None and end.dtype == want.out.dtype)
        assert end.device == expected.device
        assert traits.size == "empty" or end.writable == expected.writable
        assert end.graph == expected.graph
        assert not expected.pinned or end.pinned
        if expected.bus_width is not None and want.out is None:
            across = next(step for step in steps if step.op in ("to_host", "to_device"))
            assert WIDTH[across.after.dtype.lstrip(">")] == expected.bus_width, "bytes over the bus"
        if expected.ordered is not None:
            assert ("order" in ops(decision)) == expected.ordered
    except AssertionError as error:
        raise AssertionError(f"{error}\n{traits}\n{want}\n{here}\n{expected}\n{decision}") from None


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_and_option_is_decided_as_the_oracle_says(source):
    for traits in SOURCES[source]:
        for want in wants(traits.device):
            assert_as_expected(traits, want, HERE)


@pytest.mark.parametrize("source", ["numpy", "torch on the host", "foreign on the host", "numbers and lists"])
def test_every_source_and_option_inside_compiled_code_is_decided_as_the_oracle_says(source):
    for traits in SOURCES[source]:
        for want in wants(CPU):
            assert_as_expected(traits, want, HERE._replace(compiled=True))


def test_what_torch_casts_for_numpy_is_cast_before_the_bus_too():
    """With torch loaded, its kernels are the better ones for some casts: they run on the host as well."""
    want = Want("torch", CUDA0, "float16", detach=False)
    assert ops(decide(numpy_like(), want, HERE._replace(torch=True))) == ["share", "cast", "to_device"]


@pytest.mark.parametrize("source", SOURCES)
def test_every_out_is_decided_as_the_oracle_says(source):
    for traits in SOURCES[source]:
        for want in outs():
            assert_as_expected(traits, want, HERE)


@pytest.mark.parametrize("source", SOURCES)
def test_capture_fork_and_streams_are_decided_as_the_oracle_says(source):
    for traits, want, here in itertools.product(SOURCES[source], WANTED_IN_ANY_MOMENT, HERES):
        on_device = traits.device.is_cuda and place(traits, want).is_cuda
        crosses = on_device and {holder_of(traits, want, here), want.framework} == {"torch", "cupy"}
        if (want.device is not None or traits.device != CPU) and (crosses or here.same_stream):  # else one stream only
            assert_as_expected(traits, want, here)


# -- The rest of the product, by chance


WISHES = {device.type: [*wants(device), *outs()] for device in (CPU, CUDA0, MPS0, XPU0)}
MOMENTS = st.sampled_from(
    [
        HERE,
        HERE._replace(forked=True),
        HERE._replace(worker=True),
        HERE._replace(gpu="cupy"),
        HERE._replace(torch=True),
        HERE._replace(compiled=True),
    ]
)


@settings(max_examples=1000, deadline=None)
@given(KINDS.map(possible), st.data())
def test_any_kind_of_array_and_any_wish_is_decided_as_the_oracle_says(traits, data):
    assert_as_expected(traits, data.draw(st.sampled_from(WISHES[traits.device.type])), data.draw(MOMENTS))


# -- Once is enough


TWICE = {
    ("stack", "cast"): "a list is stacked as it is, then cast",
    ("stack", "cast", "pin"): "and pinned",
    ("stack", "fill"): "a list is stacked, then written into out",
    ("stack", "pin"): "a list is stacked, then pinned",
    ("pack", "pin"): "torch pins what it can hold",
    ("byteswap", "pin"): "torch pins what it can hold",
    ("cast", "pin"): "torch pins what it has cast",
    ("resolve", "fill"): "NumPy fills what torch has resolved",
    ("cast", "fill"): "NumPy fills what torch has cast",
}
if "complex32" not in HAS["numpy"]:  # an ml_dtypes before 0.6
    TWICE |= {
        ("pack", "cast"): "torch casts to complex32 what it can hold",
        ("byteswap", "cast"): "torch casts to complex32 what it can hold",
        ("pack", "fill"): "torch casts to complex32 what it can hold",
        ("byteswap", "fill"): "torch casts to complex32 what it can hold",
        ("stack", "cast", "fill"): "NumPy fills what torch has stacked, and cast from complex32",
    }


@pytest.mark.parametrize("source", ["numpy", "torch on the host", "foreign on the host", "numbers and lists"])
def test_host_memory_is_written_twice_only_for_lists_pinned_results_and_odd_outs(source):
    """By us: what a producer has written before is its own affair."""
    for traits in SOURCES[source]:
        for want in (*wants(CPU), *outs()):
            if traits.device == place(traits, want) == CPU and want.framework != "cupy":
                writes = tuple(step.op for step in decide(traits, want).steps if step.kind and step.op != "export")
                assert len(writes) <= 1 or writes in TWICE, (traits, want)
