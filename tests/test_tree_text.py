"""Arrays of text in a tree stay as they are, as any text does; what might hold numbers is refused by its name."""

import containers
import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge import tree
from tensorbridge._trees._walk import flatten

TEXTS = {
    "str": lambda: np.array(["a", "bc"]),
    "bytes": lambda: np.array([b"a", b"bc"]),
    "of any length": lambda: np.array(["a", "bc"], dtype=np.dtypes.StringDType()),
    "objects": lambda: np.array(["a", "bc"], dtype=object),
    "objects, of NumPy's own": lambda: np.array([np.str_("a"), np.bytes_(b"bc")], dtype=object),
    "mapped": lambda: np.array(["a", "bc"]).view(np.memmap),
    "objects, some missing": lambda: np.array([["a", None], [b"bc", "d"]], dtype=object),
    "empty": lambda: np.array([], dtype="U5"),
    "a single one": lambda: np.array("a"),
}
CALLS = {
    "shared": {},
    "copied": {"copy": True},
    "cast": {"dtype": "float32"},
    "cast by kind": {"dtype": {"real floating": "float32"}},
    "detached": {"detach": True},
    "not packed": {"pack": False},
}


@pytest.fixture(params=TEXTS)
def text(request):
    return TEXTS[request.param]()


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_text_stays_the_same_object(text, options):
    source = {"x": np.ones(3), "names": text, "inner": [text, (torch.zeros(2), "a")], "t": torch.ones(4)}
    for convert, array in ((tree.to_torch, torch.Tensor), (tree.to_numpy, np.ndarray)):
        for _ in range(2):  # decided, then remembered
            made = convert(source, **options)
            assert made["names"] is text
            assert made["inner"][0] is text
            assert isinstance(made["x"], array)
            assert isinstance(made["inner"][1][0], array)
            assert made["x"].tolist() == [1.0] * 3


MAKES = "dataclass with fields that init does not take"  # of the arrays, anew each time
NESTED = {name: make for name, make in containers.CONTAINERS.items() if name not in ("torch return type", MAKES)}


@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED)
def test_text_stays_in_every_container(make):
    text = np.array(["a", "bc"])
    before = make(text)
    made = tree.to_torch([before, np.ones(2)])
    assert isinstance(made[1], torch.Tensor)
    values, again = (flatten(x, everything=True).leaves for x in (before, made[0]))
    assert len(values) == len(again)
    assert all(x is y for x, y in zip(values, again, strict=True))


def test_guards_and_traces_see_the_arrays_alone(text):
    source = {"names": text, "x": np.ones(3)}
    with tb.copy_guard("error"):
        assert tree.to_torch(source)["names"] is text
    with tb.trace() as seen:
        assert tree.to_torch(source, copy=True)["names"] is text
    assert len(seen.events) == 1


def test_the_plan_names_what_is_left(text):
    made = tree.plan({"names": text, "x": np.ones(3)}, "torch")
    assert [leaf.path for leaf in made.leaves] == ["batch['x']"]
    assert made.left == (("batch['names']", "text"),)
    assert str(made).endswith("1 x left as it is: batch['names'] (text)")


def test_out_keeps_its_own(text):
    source = {"names": text, "x": np.ones(3)}
    theirs = np.array(["z"])
    for out in ({"x": torch.zeros(3)}, {"x": torch.zeros(3), "names": theirs}, {"names": theirs, "x": torch.zeros(3)}):
        for _ in range(2):
            assert tree.to_torch(source, out=out) is out
            assert out["x"].tolist() == [1.0] * 3
            assert out.get("names", theirs) is theirs
    assert tree.plan(source, "torch", out=out).left == (("batch['names']", "text"),)
    with pytest.raises(ValueError, match=r"another tree: it has batch\['names'\], which is text in the source$"):
        tree.to_torch(source, out={"names": torch.zeros(2)})


def test_in_the_background(text):
    source = {"names": text, "x": torch.ones(3)}
    assert tb.to_numpy_async(source).result()["names"] is text
    with tb.prefetch([source, source], device="cpu") as batches:
        assert [batch["names"] is text for batch in batches] == [True, True]


REFUSED = {
    "numbers among it": lambda: np.array(["a", 1], dtype=object),
    "nothing but what is missing": lambda: np.array([None, None], dtype=object),
    "no elements, of any kind": lambda: np.array([], dtype=object),
    "arrays": lambda: np.array([np.ones(1), np.ones(2), None], dtype=object),
    "dates": lambda: np.array(["2020-01-01"], dtype="M8[D]"),
    "fields": lambda: np.zeros(2, dtype=[("a", "U3")]),
    "masked text": lambda: np.ma.masked_array(["a", "b"], mask=[True, False]),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_may_hold_numbers_is_refused(make):
    for convert in (tree.to_torch, tree.to_numpy):
        with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['bad'\]: "):
            convert({"x": np.ones(3), "bad": make()})


def test_text_itself_is_refused(text):
    for convert in (tree.to_torch, tree.to_numpy, tb.to_torch, tb.to_numpy):
        with pytest.raises(tb.UnsupportedArrayError, match=r"text is not a number|Python references"):
            convert(text)


def test_an_archive_gives_its_text(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.ones(2), names=["a", "bc"])
    with np.load(tmp_path / "data.npz") as archive:
        made = tree.to_torch(archive)
    assert made["x"].tolist() == [1.0, 1.0]
    assert made["names"].tolist() == ["a", "bc"]
