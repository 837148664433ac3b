"""`dtype=` as a mapping: from what an array has to what it gets, by dtype or by a kind of the array API standard."""

import ml_dtypes
import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import _dtypes

KINDS = {
    "bool": {"bool"},
    "signed integer": {"int8", "int16", "int32", "int64"},
    "unsigned integer": {"uint8", "uint16", "uint32", "uint64"},
    "integral": {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"},
    "real floating": {"float32", "float64"},
    "complex floating": {"complex64", "complex128"},
}


@pytest.mark.parametrize("kind", [*KINDS, "numeric"])
def test_a_kind_holds_what_numpys_isdtype_says(kind):
    """The standard's words have the standard's meaning, for the dtypes that NumPy knows of itself."""
    casts = _dtypes.parse_casts({kind: "float16" if kind == "bool" else "bool"})
    for row in _dtypes.DTYPES.values():
        if row.numpy is not None and row.numpy.isbuiltin == 1:
            meant = np.isdtype(row.numpy, kind)
            assert (casts.of(row.name) is not None) == meant, row.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_holds_what_the_standard_lists(kind):
    casts = _dtypes.parse_casts({kind: "float16"})
    listed = set().union(*KINDS.values())
    assert {name for name in listed if casts.of(name)} == KINDS[kind]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "longdouble"])
def test_small_and_long_floats_are_real_floating(name):
    casts = _dtypes.parse_casts({"real floating": "float32"})
    assert casts.of(name) == "float32"


def test_a_dtype_counts_before_a_kind_and_kinds_in_their_order():
    casts = _dtypes.parse_casts({"real floating": "float32", "float64": "float16", "numeric": "int8"})
    assert [casts.of(name) for name in ("float64", "bfloat16", "int64", "bool")] == ["float16", "float32", "int8", None]


def test_swapped_bytes_are_of_the_same_dtype():
    t = tb.to_torch(np.arange(3, dtype=">f8"), dtype={"float64": "float32"})
    assert (t.dtype, t.tolist()) == (torch.float32, [0.0, 1.0, 2.0])


@pytest.mark.parametrize("key", ["float64", np.float64, np.dtype("float64"), torch.float64, float, "real floating"])
@pytest.mark.parametrize("value", ["float32", np.float32, torch.float32])
def test_keys_and_values_are_written_as_any_dtype_is(key, value):
    assert tb.to_torch(np.zeros(2), dtype={key: value}).dtype == torch.float32


def test_one_array_is_cast_if_it_is_meant_and_shared_if_not():
    casts = {"float64": "float32"}
    assert tb.to_numpy(torch.zeros(2, dtype=torch.float64), dtype=casts).dtype == np.float32
    labels = torch.arange(3)
    assert tb.shares_memory(tb.to_numpy(labels, dtype=casts), labels)
    assert tb.plan(labels, "numpy", dtype=casts).zero_copy
    assert tb.plan(labels.double(), "numpy", dtype=casts).bytes_moved == 12
    assert tb.to_torch([0.5, 1.5], dtype=casts).dtype == torch.float32
    assert tb.to_torch([1, 2], dtype=casts).dtype == torch.int64


def test_a_list_is_cast_by_what_it_holds():
    made = tb.to_numpy([torch.zeros(2, dtype=torch.bfloat16)] * 2, dtype={"bfloat16": "float32"})
    assert (made.dtype, made.shape) == (np.float32, (2, 2))


@pytest.mark.parametrize(
    ("numbers", "kind", "wanted"),
    [
        ([300], "int64", "uint8"),
        (-1, "integral", "uint8"),
        ([1.5, 300.0], "float64", "uint8"),
        ([2**40], "int64", "int32"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused_as_without_a_mapping(numbers, kind, wanted):
    with pytest.raises(tb.UnsupportedArrayError, match=f"it does not fit {wanted}"):
        tb.to_numpy(numbers, dtype=wanted)
    with pytest.raises(tb.UnsupportedArrayError, match=f"it does not fit {wanted}"):
        tb.to_numpy(numbers, dtype={kind: wanted})


def test_numbers_that_fit_are_cast_once():
    assert tb.to_numpy([1, 2], dtype={"int64": "uint8"}).dtype == np.uint8
    assert tb.to_torch([0.5], dtype={"float64": "float32", "float32": "float64"}).dtype == torch.float32
    assert tb.to_numpy(True, dtype={"bool": "int8", "int8": "int64"}).dtype == np.int8


def test_a_list_of_several_dtypes_is_made_of_the_one_that_the_mapping_makes_of_them():
    parts = [np.ones(2, "f4"), np.full(2, 2.0)]
    made = tb.to_numpy(parts, dtype={"real floating": "float32"})
    assert (made.dtype, made.tolist()) == (np.float32, [[1, 1], [2, 2]])
    for casts in ({"float32": "float64", "float64": "float32"}, {"float64": "float16"}):
        with pytest.raises(tb.UnsupportedArrayError, match="different dtypes: float32, float64"):
            tb.to_numpy(parts, dtype=casts)


def test_every_part_of_a_list_is_cast_once():
    """What the mapping would make of the dtype that they come to have in common is another matter."""
    casts = {"integral": "float64", "float64": "float32"}
    parts = [np.array([1, 2]), np.array([3, 4], "int32")]
    for made in (tb.to_numpy(parts, dtype=casts), tb.to_numpy([torch.from_numpy(part) for part in parts], dtype=casts)):
        assert (made.dtype, made.tolist()) == (np.float64, [[1, 2], [3, 4]])


def test_a_list_whose_parts_stay_different_is_refused_with_the_dtype_that_holds_what_they_become():
    with pytest.raises(tb.UnsupportedArrayError, match='int16, int32\\.\nSay dtype="float64"'):
        tb.to_numpy([np.ones(2, "i2"), np.ones(2, "i4")], dtype={"int16": "float32"})


def test_numbers_are_made_at_once_of_what_the_mapping_says():
    for numbers in ([1, 2], 3):
        assert tb.plan(numbers, "numpy", dtype={"int64": "uint8"}) == tb.plan(numbers, "numpy", dtype="uint8")
    assert tb.to_numpy([2**63], dtype={"integral": "uint64"}).tolist() == [2**63]
    assert tb.to_numpy([2**53 + 1, 0.0], dtype={"float64": "int64"}).tolist() == [2**53 + 1, 0]
    with pytest.raises(tb.UnsupportedArrayError, match="a Python integer is int64 here"):
        tb.to_numpy([2**63], dtype={"real floating": "uint64"})


BATCH = {
    "obs": np.ones((2, 3)),
    "image": np.zeros((2, 2), np.uint8),
    "weights": (torch.ones(2, dtype=torch.bfloat16), np.ones(2, np.float32)),
    "label": np.arange(2),
    "mask": np.array([True, False]),
    "name": "first",
}


def test_a_tree_keeps_its_labels_and_masks():
    made = tb.tree.to_torch(BATCH, dtype={"real floating": "float32"})
    assert made["obs"].dtype == torch.float32
    assert [w.dtype for w in made["weights"]] == [torch.float32] * 2
    assert tb.shares_memory(made["weights"][1], BATCH["weights"][1])
    for kept in ("image", "label", "mask"):
        assert tb.shares_memory(made[kept], BATCH[kept])
    assert made["name"] == "first"


def test_the_plan_of_a_tree_is_what_is_done():
    casts = {"real floating": "float32"}
    plan = tb.tree.plan(BATCH, "torch", dtype=casts)
    assert plan.bytes_moved == 24 + 8
    with tb.trace() as seen:
        tb.tree.to_torch(BATCH, dtype=casts)
    assert sum(event.nbytes for event in seen.events) == plan.bytes_moved


def test_a_checkpoint_of_small_floats_becomes_one_to_compute_with():
    state = {"w": torch.full((1000,), 0.1, dtype=torch.bfloat16), "step": torch.tensor(3)}
    made = tb.tree.to_numpy(state, dtype={"bfloat16": "float32", "float8_e4m3fn": "float32"})
    assert made["w"].sum() == pytest.approx(100, rel=1e-2)
    assert made["step"].dtype == np.int64
    assert tb.tree.to_numpy(state)["w"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("many", [1, 40])
@pytest.mark.parametrize("copy", [None, True])
def test_leaves_of_every_kind_get_what_the_mapping_says(many, copy):
    """Few leaves and many, since many of one kind are decided together."""
    tree = [np.ones(3, name) for name in ("float64", "float32", "int32", "bool") for _ in range(many)]
    tree += [torch.ones(3, dtype=d) for d in (torch.float64, torch.float16, torch.int16) for _ in range(many)]
    casts = {"float64": "float32", "float16": "float32", "int16": "int64"}
    for made, source in zip(tb.tree.to_torch(tree, dtype=casts, copy=copy), tree, strict=True):
        had = tb.describe(source).dtype
        assert tb.describe(made).dtype == casts.get(had, had)
        assert made.tolist() == source.tolist()


def test_copy_false_refuses_the_leaf_that_would_be_cast():
    with pytest.raises(
        tb.CopyRequiredError, match=r"^batch\['obs'\]: to_torch\(dtype='float32', copy=False\): numpy f"
    ):
        tb.tree.to_torch(BATCH, copy=False, dtype={"float64": "float32"})
    assert tb.tree.to_torch(BATCH, copy=False, dtype={"int8": "float32"})["obs"].dtype == torch.float64


def test_what_has_no_partner_gets_one():
    tree = {"x": np.ones(2, np.longdouble), "y": np.arange(2)}
    made = tb.tree.to_torch(tree, dtype={"longdouble": "float64"})
    assert (made["x"].dtype, made["y"].dtype) == (torch.float64, torch.int64)


def test_a_leaf_that_needs_a_dtype_of_its_own_is_told_of_the_mapping():
    tree = {"x": np.ones(2, np.longdouble), "y": np.arange(2)}
    with pytest.raises(tb.UnsupportedArrayError) as caught:
        tb.tree.to_torch(tree)
    assert str(caught.value).endswith(
        'Use dtype="float64": a copy of 16 B.\n'
        'In a tree that casts every array: dtype={"longdouble": "float64"} casts those of this dtype alone.'
    )


def test_prefetch_casts_what_is_meant():
    with tb.prefetch([BATCH, BATCH], device="cpu", dtype={"float64": "float32"}) as ready:
        for batch in ready:
            assert (batch["obs"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    with tb.prefetch([{"x": np.zeros(2)}], device="cpu", dtype="float16") as ready:
        assert next(ready)["x"].dtype == torch.float16


def test_prefetch_casts_for_numpy_too():
    with tb.prefetch([BATCH], to="numpy", dtype={"float64": "float32"}) as ready:
        assert next(ready)["obs"].dtype == np.float32


def test_a_call_that_fails_before_the_array_is_known_is_quoted_with_its_mapping():
    with pytest.raises(tb.UnsupportedArrayError, match=r"^to_torch\(dtype=\{'float64': 'float32'\}\): str cannot be"):
        tb.to_torch("text", dtype={"float64": "float32"})


def test_beside_out_it_is_refused_as_any_other_dtype():
    with pytest.raises(ValueError, match=r"out is float32, and dtype=\{'float64': 'float32'\} was asked for; leave"):
        tb.to_torch(np.zeros(2), dtype={"float64": "float32"}, out=torch.zeros(2))


def test_an_empty_mapping_casts_nothing():
    a = np.zeros(2)
    assert tb.shares_memory(tb.to_torch(a, dtype={}), a)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (
            {"floating": "float32"},
            "dtype={'floating': 'float32'}: 'floating' is neither a dtype nor one of the kinds 'bo",
        ),
        ({"real floatin": "float32"}, "; did you mean 'real floating'?"),
        ({"float64": "flaot32"}, "dtype={'float64': 'flaot32'}: 'flaot32' is not an element type"),
        ({"float64": "real floating"}, "'real floating' is not an element type"),
        ({"float64": None}, "None is not an element type"),
        ({"bf16": "float32"}, "'numeric'; did you mean 'bfloat16'?"),
        ({"flaot64": "float32"}, "'numeric'; did you mean 'float64'?"),
        ({("float64", "int8"): "float32"}, "'float32'}: ('float64', 'int8') is not an element type"),
        ({np.generic: "float32"}, "<class 'numpy.generic'> is not an element type"),
        ({">f8": "float32"}, "ask for 'float64'"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused(dtype, text):
    with pytest.raises(TypeError) as caught:
        tb.tree.to_torch(BATCH, dtype=dtype)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        ({"float64": "float32", np.float64: "float16"}, "float64 is to become both float32 and float16; name it once"),
        ({torch.float16: "float32", "half": "bfloat16"}, "float16 is to become both float32 and bfloat16"),
        ({"real floating": "float32", np.floating: "float16"}, "real floating is to become both float32 and float16"),
    ],
)
def test_two_names_of_one_dtype_must_not_contradict(dtype, text):
    for call in (tb.to_numpy, tb.to_torch, tb.tree.to_torch):
        with pytest.raises(ValueError, match=text):
            call(object(), dtype=dtype)


def test_two_names_of_one_dtype_may_say_the_same():
    casts = {"float64": "float32", np.float64: torch.float32, "real floating": "float16", np.floating: "half"}
    assert _dtypes.parse_casts(casts) == _dtypes.parse_casts({"float64": "float32", "real floating": "float16"})
    assert tb.to_torch(np.ones(2), dtype=casts).dtype == torch.float32


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (np.signedinteger, "signed integer"),
        (np.unsignedinteger, "unsigned integer"),
        (np.integer, "integral"),
        (np.floating, "real floating"),
        (np.complexfloating, "complex floating"),
        (np.number, "numeric"),
    ],
)
def test_abstract_types_of_numpy_are_kinds(cls, kind):
    for x in BATCH["obs"], np.arange(2), np.arange(2, dtype="uint8"), np.ones(2, "complex64"):
        meant = tb.plan(x, "torch", dtype={kind: "complex128"})
        assert tb.plan(x, "torch", dtype={cls: "complex128"}) == meant


@pytest.mark.parametrize("dtype", [("float64", "int8"), ("V8", "V16")])
def test_a_tuple_is_no_dtype(dtype):
    """NumPy raises a ValueError of its own for some."""
    with pytest.raises(TypeError, match="is not an element type"):
        tb.to_numpy(np.zeros(2), dtype=dtype)


def test_the_callers_mapping_is_read_when_it_is_given():
    """As with any option: a later change of the dict changes nothing that was begun."""
    casts = {"float64": "float32"}
    ready = tb.prefetch([{"x": np.zeros(2)}] * 2, device="cpu", dtype=casts)
    casts["float64"] = "int8"
    with ready:
        assert {batch["x"].dtype for batch in ready} == {torch.float32}
