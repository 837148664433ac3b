"""Foreign producers that copy: asked not to where none may, seen in the plan where they say so, refused by a guard."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from _facts_probes import address
from _producers import AGES, Producer, laid_out, numbers

import tensorbridge as tb

TARGETS = {"numpy": tb.to_numpy, "torch": tb.to_torch}
READ_ONLY, IS_COPIED = 1, 2


def is_never(words):
    return words.get("copy", True) is False


class CopiesUnlessTold(Producer):
    """Copies, and refuses where it may not, as the protocol says it should."""

    refusal: Exception = BufferError("it is stored in tiles.")

    def __dlpack__(self, **words):
        if is_never(words):
            self.asked.append(words)
            raise self.refusal
        copy = Producer(self.made.memory.copy(), **self.made.fields, flags=IS_COPIED)
        return copy.__dlpack__(**words)


def copier():
    return CopiesUnlessTold(laid_out((3,), (1,)))


# -- DLPack: copy=False is said to whoever knows the word


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("error", [BufferError("it is stored in tiles."), ValueError("it is stored in tiles")])
def test_a_producer_is_told_that_no_copy_may_be_and_its_refusal_is_ours(error, target, monkeypatch):
    monkeypatch.setattr(CopiesUnlessTold, "refusal", error)
    producer = copier()
    with pytest.raises(tb.CopyRequiredError) as caught:
        TARGETS[target](producer, copy=False)
    assert producer.asked == [{"max_version": (1, 0), "copy": False}]
    assert caught.value.__cause__ is error
    assert str(caught.value) == (
        f"to_{target}(copy=False): CopiesUnlessTold cannot be shared, for its __dlpack__(copy=False) says: "
        "it is stored in tiles.\n"
        "Allow the copy with copy=None."
    )


@pytest.mark.parametrize("copy", [None, True])
def test_only_copy_false_is_said_for_a_copy_that_may_be_is_ours_to_make(copy):
    producer = Producer(laid_out((3,), (1,)))
    tb.to_numpy(producer, copy=copy)
    assert producer.asked == [{"max_version": (1, 0)}]


class VersionOnly(Producer):
    def __dlpack__(self, *, stream=None, max_version=None):
        return super().__dlpack__(stream=stream, max_version=max_version)


class CopyOnly(Producer):
    def __dlpack__(self, *, stream=None, copy=None):
        return super().__dlpack__(stream=stream, copy=copy)


KNOWN = {
    **{name: (age, {} if name in ("2021", "stream only", "no keywords") else None) for name, age in AGES.items()},
    "version only": (VersionOnly, {"max_version": (1, 0)}),
    "copy only": (CopyOnly, {"copy": False}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("age", KNOWN)
def test_words_that_a_producer_does_not_know_are_left_out_and_no_others(age, target):
    cls, heard = KNOWN[age]
    producer = cls(laid_out((3,), (1,)))
    share = {"share_readonly": True} if target == "torch" else {}
    assert address(TARGETS[target](producer, copy=False, **share)) == address(producer.made.memory)
    assert producer.asked == [{"max_version": (1, 0), "copy": False} if heard is None else heard]


def busy(self, *, stream=None, max_version=None):
    raise BufferError("busy")


@pytest.mark.parametrize("answer", [busy, lambda self, stream=None: busy(self)])
def test_a_refusal_by_one_who_was_not_told_is_no_word_about_copies(answer):
    producer = type("Busy", (Producer,), {"__dlpack__": answer})(laid_out((3,), (1,)))
    with pytest.raises(tb.ProducerError, match="busy"):
        tb.to_numpy(producer, copy=False)


def test_a_type_error_of_the_producer_s_own_is_not_asked_for_again_with_copy_false_either():
    class Own(TypeError):
        pass

    asked = []

    class Refuses(Producer):
        def __dlpack__(self, **words):
            asked.append(words)
            raise Own("nulls")

    with pytest.raises(tb.UnsupportedArrayError, match="nulls"):
        tb.to_numpy(Refuses(laid_out((3,), (1,))), copy=False)
    assert asked == [{"max_version": (1, 0), "copy": False}]


def test_a_producer_on_a_device_is_told_too(monkeypatch):
    monkeypatch.setattr("tensorbridge._cuda._streams.current", lambda framework, index: 7)
    monkeypatch.setattr(
        "tensorbridge._cuda._streams.on_device", contextlib.nullcontext
    )  # a machine may have fewer devices

    class OnCuda(CopiesUnlessTold):
        def __dlpack_device__(self):
            return 2, 3

    producer = OnCuda(laid_out((3,), (1,)), device=(2, 3))
    with pytest.raises(tb.CopyRequiredError, match="stored in tiles"):
        tb.plan(producer, "torch", copy=False)
    assert producer.asked == [{"max_version": (1, 0), "copy": False, "stream": 7}]
    steps = tb.plan(producer, "torch").steps
    assert [(step.op, step.kind, step.nbytes) for step in steps] == [("export", "d2d", 24), ("share", "", 0)]


# -- DLPack: a capsule that says it is a copy


@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_that_the_capsule_tells_of_is_in_the_plan_with_its_bytes(target):
    plan = tb.plan(copier(), target)
    assert [(step.op, step.nbytes, step.kind) for step in plan.steps] == [("export", 24, "h2h"), ("share", 0, "")]
    assert (plan.zero_copy, plan.bytes_moved) == (False, 24)
    assert "export  24 B   the producer gave a copy, and says so" in str(plan)


@pytest.mark.parametrize("target", TARGETS)
def test_a_guard_forbids_the_copy_of_a_producer(target):
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match="the producer gave a copy"):
        TARGETS[target](copier())
    with tb.trace() as events:
        TARGETS[target](copier())
    assert sum(event.nbytes for event in events.events) == 24


@pytest.mark.parametrize("target", TARGETS)
def test_one_that_copies_all_the_same_is_found_out_by_its_flag(target):
    producer = Producer(laid_out((3,), (1,)), flags=IS_COPIED)
    with pytest.raises(tb.CopyRequiredError) as caught:
        TARGETS[target](producer, copy=False)
    assert caught.value.plan.bytes_moved == 24
    share = {"numpy": "the same array", "torch": "torch.from_numpy: the same memory"}[target]
    assert str(caught.value) == (
        f"to_{target}(copy=False): dlpack int64 (3,) on cpu cannot be shared.\n"
        "  export  24 B   the producer gave a copy, and says so\n"
        f"  share    0 B   {share}\n"
        "Allow the copy with copy=None."
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_is_fresh_memory_and_not_copied_again(target):
    for copy in (None, True):
        producer = Producer(laid_out((3,), (1,)), flags=IS_COPIED)
        result = TARGETS[target](producer, copy=copy)
        assert address(result) == address(producer.made.memory)
        result[0] = 7  # writable
        assert producer.made.memory[0] == 7
    assert tb.to_numpy(producer, writable=True, copy=True).flags.writeable


def test_a_copy_that_must_not_be_written_is_copied_for_whoever_could():
    def frozen():
        return Producer(laid_out((3,), (1,)), flags=IS_COPIED | READ_ONLY)

    assert not tb.to_numpy(frozen()).flags.writeable
    assert [step.op for step in tb.plan(frozen(), "torch").steps] == ["export", "copy", "share"]
    for result in (tb.to_numpy(frozen(), copy=True), tb.to_numpy(frozen(), writable=True)):
        assert result.flags.writeable
    producer = frozen()
    tb.to_torch(producer).zero_()
    assert producer.made.memory.tolist() == [1, 2, 3]


LAYOUTS = {"F": ((2, 3), (1, 2)), "reversed": ((3,), (-1,)), "overlapping": ((2, 3), (0, 1)), "empty": ((0, 3), (3, 1))}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_of_any_layout_is_read_as_it_is(layout, target):
    memory = laid_out(*LAYOUTS[layout])
    producer = Producer(memory, flags=IS_COPIED)
    plan, result = tb.plan(producer, target), TARGETS[target](producer)
    assert numbers(result).tolist() == numbers(memory).tolist()
    assert plan.zero_copy == (not memory.size)
    assert (plan.steps[0].op, plan.steps[0].nbytes) == ("export", memory.nbytes)
    assert layout != "overlapping" or target != "numpy" or not result.flags.writeable


def test_an_empty_array_has_no_byte_that_could_have_been_copied():
    assert tb.to_numpy(Producer(np.empty((0, 3)), flags=IS_COPIED), copy=False).shape == (0, 3)


def test_a_copy_shares_memory_with_nothing_though_the_next_may_lie_where_it_was():
    producer = copier()
    assert not tb.shares_memory(producer, producer)
    assert tb.describe(producer).address == 0


def test_the_copy_lives_as_long_as_the_result():
    producer = Producer(laid_out((3,), (1,)), flags=IS_COPIED)
    t = tb.to_torch(producer, copy=True)
    assert (producer.made.freed, t.tolist()) == (0, [1, 2, 3])
    del t
    assert producer.made.freed == 1


def test_real_producers_take_the_word():
    for memory in (np.arange(3.0), torch.arange(3.0)):

        class Wrapper:
            def __dlpack__(self, wrapped=memory, **words):
                return wrapped.__dlpack__(**words)

            def __dlpack_device__(self):
                return 1, 0

        assert address(tb.to_numpy(Wrapper(), copy=False)) == address(memory)


# -- __array__: whoever refuses copy=False has to copy


class Array:
    """`__array__` of a thing that is stored otherwise; `asked` holds the word about copies of each request."""

    refusal: Exception = ValueError("it is stored in tiles")

    def __init__(self, memory):
        self.memory, self.asked, self.given = memory, [], []

    def __array__(self, dtype=None, copy=None):
        self.asked.append(copy)
        if copy is False:
            raise self.refusal
        self.given.append(self.memory.copy())
        return self.given[-1]


@pytest.fixture(params=[ValueError("it is stored in tiles"), RuntimeError("cannot convert without a copy")])
def array(request, monkeypatch):
    monkeypatch.setattr(Array, "refusal", request.param)
    return Array(np.arange(3.0))


@pytest.mark.parametrize("target", TARGETS)
def test_array_that_has_to_copy_is_in_the_plan_with_its_bytes_and_a_guard_forbids_it(target, array):
    plan = tb.plan(array, target)
    assert [(step.op, step.nbytes, step.kind) for step in plan.steps] == [("export", 24, "h2h"), ("share", 0, "")]
    assert (plan.zero_copy, plan.bytes_moved, plan.source.address) == (False, 24, 0)
    with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError, match="the producer gave a copy"):
        TARGETS[target](array)
    assert not tb.shares_memory(array, array)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("copy", [None, True])
def test_array_that_has_to_copy_is_asked_for_one_copy_and_no_more_is_made(copy, target, array):
    result = TARGETS[target](array, copy=copy)
    assert array.asked == [False, copy]
    assert [address(a) for a in array.given] == [address(result)]
    result[0] = 7
    assert (array.given[0][0], array.memory[0]) == (7, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_copy_true_is_fresh_memory_though_the_producer_keeps_what_it_made(target):
    class Caches(Array):
        def __array__(self, dtype=None, copy=None):
            if copy is False:
                raise ValueError("nothing is loaded yet")
            return self.memory.copy() if copy else self.memory

    producer = Caches(np.zeros(3))
    TARGETS[target](producer, copy=True)[0] = 1
    assert producer.memory.tolist() == [0, 0, 0]


def test_array_that_shares_is_asked_once():
    class Shares(Array):
        def __array__(self, dtype=None, copy=None):
            self.asked.append(copy)
            return self.memory

    for copy in (None, False, True):
        producer = Shares(np.arange(3.0))
        tb.to_numpy(producer, copy=copy)
        assert producer.asked == [False]
    assert tb.plan(producer, "numpy").zero_copy


@pytest.mark.parametrize("error", [RuntimeError("not now"), NotImplementedError(), FutureWarning("will raise")])
def test_any_other_failure_at_the_word_about_copies_says_nothing_and_the_plain_request_decides(error, monkeypatch):
    monkeypatch.setattr(Array, "refusal", error)
    producer = Array(np.arange(3.0))
    assert tb.to_numpy(producer).tolist() == [0, 1, 2]
    assert "the object decides" in str(tb.plan(producer, "numpy"))
    with pytest.raises(tb.ProducerError) as caught:
        tb.to_numpy(producer, copy=False)
    assert caught.value.__cause__ is error


def test_a_mask_is_not_lost_in_a_copy_of_the_producer_s():
    producer = Array(np.ma.masked_array([1, 2], [0, 1]))
    for copy in (None, True):
        with pytest.raises(tb.UnsupportedArrayError, match="mask"):
            tb.to_numpy(producer, copy=copy)


def test_a_list_of_arrays_that_have_to_copy_is_stacked(array):
    assert tb.to_torch([array, Array(np.arange(3.0))]).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_in_a_tree_each_array_that_has_to_copy_is_copied_by_its_producer_once(array):
    assert "export" in str(tb.tree.plan({"a": array}, "torch"))
    other = Array(np.ones(3))
    result = tb.tree.to_torch({"a": array, "b": other, "c": other})
    assert [t.tolist() for t in result.values()] == [[0, 1, 2], [1, 1, 1], [1, 1, 1]]
    assert len(other.given) == 1
    with pytest.raises(tb.CopyRequiredError, match="does not promise that no byte moves"):
        tb.tree.to_torch({"a": array}, copy=False)


@pytest.mark.parametrize("copy", [True, False])
def test_parts_of_a_list_are_asked_for_no_copy_and_not_forbidden_one(copy):
    """They are copied into the whole in any case, and that is what copy=False is about."""
    parts = [Producer(laid_out((3,), (1,))) for _ in range(2)]
    refused = (
        contextlib.nullcontext() if copy else pytest.raises(tb.CopyRequiredError, match="the list becomes one array")
    )
    with refused:
        tb.to_numpy(parts, copy=copy)
    assert not any("copy" in words for part in parts for words in part.asked)
