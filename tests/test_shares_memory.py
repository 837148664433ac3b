"""`shares_memory` against sets of addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import ARRAYS, FOREIGN, NUMPY, digits, frozen, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorbridge as tb
from tensorbridge._memory import first_meeting, infos_share


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_shares_memory_says_what_the_sets_of_addresses_say(data):
    base = np.zeros(48, dtype="int16")
    one, two = (data.draw(windows(base)) for _ in range(2))
    common = addresses(one) & addresses(two)
    assert tb.shares_memory(one, tb.to_torch(two) if min(two.strides, default=0) >= 0 and two.size else two) == bool(
        common
    )


@st.composite
def windows(draw: Any, base: Any) -> Any:
    a = base.reshape(draw(st.sampled_from([(48,), (6, 8), (2, 4, 6)])))
    for axis, length in enumerate(a.shape):
        start, stop = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
        step = draw(st.sampled_from([1, 2, 3, -1]))
        a = a[(slice(None),) * axis + (slice(start, stop, step) if step > 0 else slice(None, None, step),)]
    return a


def addresses(a: Any) -> set[int]:
    first = a.__array_interface__["data"][0]
    return {
        first + sum(i * s for i, s in zip(index, a.strides, strict=True)) + byte
        for index in np.ndindex(a.shape)
        for byte in range(a.itemsize)
    }


@pytest.mark.parametrize("name", [*(f"numpy-{n}" for n in NUMPY), *(f"foreign-{n}" for n in FOREIGN)])
def test_shares_memory_of_an_array_with_itself_unless_it_is_empty_or_copied_by_its_producer(name):
    array = ARRAYS[name]()
    assert tb.shares_memory(array, array) == ("empty" not in name and "copied" not in name)


def test_one_address_on_two_devices_is_two_memories():
    info = tb.describe(digits(6))
    assert infos_share(info, info)
    assert not infos_share(info, info._replace(device=tb.Device("cuda:0")))


def test_what_has_no_memory_yet_shares_nothing():
    assert not tb.shares_memory([1, 2], [1, 2])
    assert not tb.shares_memory(1.0, 1.0)
    assert not tb.shares_memory(digits(2)[:0], digits(2)[:0])


def test_arrays_apart_share_nothing():
    a = frozen(digits(8))
    assert not tb.shares_memory(a, a.copy())
    assert not tb.shares_memory(a[::2], a[1::2])
    assert tb.shares_memory(a[::2], a[2:3])
    assert not tb.shares_memory(tensor(3), tensor(3))
    assert not tb.shares_memory(a, [1, 2])


@pytest.mark.parametrize("seed", range(40))
def test_first_meeting_is_found_wherever_two_arrays_meet(seed):
    """Beside a comparison of all pairs, over views of one block."""
    rng = np.random.default_rng(seed)
    block = np.zeros(60)

    def view():
        start, count, step = rng.integers(0, 40), rng.integers(0, 5), rng.integers(1, 5)
        return tb.describe(block[start : start + count * step : step][:: rng.choice([1, -1])])

    written, read = {i: view() for i in range(3)}, {i: view() for i in range(4)}
    every = {(j, i, True) for j in written for i in written if i < j and infos_share(written[i], written[j])}
    every |= {(i, j, False) for i in written for j in read if i != j and infos_share(written[i], read[j])}
    met = first_meeting(written, read)
    assert met in every if every else met is None


@pytest.mark.parametrize(
    ("device", "has"), [("cpu", True), ("cuda:1", True), ("xpu:0", True), ("mps:0", False), ("other:0", False)]
)
def test_addresses_are_compared_across_storages_where_they_are_addresses(device, has):
    """Intel's are (a storage that came by DLPack begins at the view); Apple's are handles."""
    assert tb.Device(device).has_addresses is has
    whole = tb.describe(np.zeros(8))._replace(framework="torch", device=tb.Device(device))
    part = whole._replace(address=whole.address + 32, shape=(4,), nbytes=32)
    if not has:
        whole, part = whole._replace(storage=1), part._replace(storage=2)
    assert infos_share(whole, part) is has
