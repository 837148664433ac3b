"""How long memory is kept once it is used across streams: on a fake of CUDA whose allocators reuse what is freed.

Each race is shown to be there on the raw road first: the same body, without the lease, reads the values of whoever got
the memory next, at the same address.
"""

import gc
import threading

import pytest
from fake_frameworks import cupy_adapter
from races import ON_CUPY, SHAPE, Producer, Race, address, crossings, foreign, plays, raw, with_adapters

import tensorbridge as tb
from tensorbridge._adapters import _torch_cuda
from tensorbridge._cuda import _lease


@pytest.fixture
def machine(monkeypatch):
    yield from with_adapters(monkeypatch)


@pytest.fixture
def torch(machine):
    return machine.torch


@pytest.fixture
def cupy(machine):
    return machine.cupy


OWNERS = pytest.mark.parametrize("owner", ["torch", "cupy"])


def test_memory_is_kept_while_a_finalizer_of_the_same_cycle_uses_it(cupy, monkeypatch):
    """The collector tells weak references first, then it calls `__del__`."""
    monkeypatch.setattr(_lease._Ending, "passed", lambda ending: True)
    seen = []

    class Owner:
        def __del__(self):
            seen.append("owner dropped")

    class Node:
        def __del__(self):
            seen.append("memory used")

    node = Node()
    node.itself = node
    node.memory = cupy.cuda.UnownedMemory(4096, 4, _lease.lend_array(Owner(), 1, 0), 0)
    del node
    gc.collect()
    assert seen == ["memory used", "owner dropped"]


@pytest.mark.parametrize("backend", ["cudaMallocAsync", "pluggable"])
def test_what_another_allocator_of_torchs_has_given_is_leased(machine, backend):
    """torch hands `record_stream` on to it, and it may do nothing, or warn."""
    machine.backend = backend
    race = Race(machine, "torch", crossings())
    freed, taken = plays(race)
    assert taken != freed
    assert race.values == {1.0}
    assert "record_stream" not in machine.names()
    assert race.settled() == 0


@OWNERS
def test_the_raw_road_reads_the_memory_of_its_successor(machine, owner):
    """The negative control of all races here."""
    race = Race(machine, owner, raw(machine))
    freed, taken = plays(race)
    assert taken == freed, "blind: the address was not reused"
    assert race.values == {2.0}


@OWNERS
def test_lent_memory_is_not_reused_before_the_borrowers_stream_is_done(machine, owner):
    race = Race(machine, owner, crossings())
    freed, taken = plays(race)
    assert taken != freed
    assert race.values == {1.0}


@OWNERS
def test_afterwards_the_memory_is_free_again_and_nothing_is_left(machine, owner):
    race = Race(machine, owner, crossings())
    freed, _ = plays(race)
    assert race.settled() == 0
    assert not _lease._leases
    again = [race.successor() for _ in range(2)]
    assert freed in map(address, again)
    pool = machine.torch_memory if owner == "torch" else machine.cupy_memory
    assert pool.used == 2 * 24
    del again
    assert pool.used == 0


@OWNERS
def test_a_view_that_outlives_the_array_keeps_the_memory_and_the_lease(machine, owner):
    race = Race(machine, owner, crossings())
    x, lent = race.lend()
    view = lent.detach() if owner == "cupy" else lent.view()
    where = address(x)
    del x, lent
    gc.collect()
    with machine.hold(0, race.READING):
        race.read_late(view)
        first = race.successor()
        del view
        race.settled()
        second = race.successor()
    assert where not in (address(first), address(second))
    assert race.values == {1.0}


@OWNERS
def test_the_last_view_may_die_in_another_thread(machine, owner):
    race = Race(machine, owner, crossings())
    x, view = race.lend()
    where, box = address(x), [view]
    del x
    with machine.hold(0, race.READING):
        race.read_late(view)
        del view
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        race.settled()
        taken = race.successor()
    assert address(taken) != where
    assert race.values == {1.0}


def test_a_tensor_is_recorded_even_where_the_streams_are_the_same_now(machine, torch):
    """The current stream need not be the one of the allocation."""
    race = Race(machine, "torch", crossings())
    x, view = race.lend()
    machine.current["torch"][0] = race.READING  # current in both, and still another stream than the allocation's
    again = race.cross["torch"](x)
    assert machine.calls.count(("record_stream", race.READING)) == 2
    assert address(again) == address(view)


@OWNERS
def test_the_cupy_stream_that_memory_was_recorded_on_may_be_dropped_first(machine, cupy, owner):
    """torch records an event on it when the block is freed, and CuPy destroys a stream with its object."""
    race = Race(machine, owner, crossings())
    stream = cupy.cuda.Stream()
    stream.use()
    number = stream.ptr
    machine.objects[0] = stream
    x, view = race.lend(reading=number) if owner == "torch" else race.lend()
    if owner == "cupy":
        tb.used_on(view, stream)
    machine.objects[0] = None
    cupy.cuda.Stream.null.use()
    del stream
    gc.collect()
    del x, view  # the fake fails where a destroyed stream is used
    assert (0, number) not in machine.destroyed


@pytest.mark.parametrize("memory", ["of CuPy, by torch", "of a foreign producer"])
def test_a_cupy_stream_may_be_dropped_before_the_lease_that_names_it(machine, cupy, torch, memory):
    """The lease records an event on it when the last view is gone."""
    stream = cupy.cuda.Stream()
    with stream:
        machine.objects[0] = stream
        if memory == "of CuPy, by torch":
            t = crossings()["cupy"](cupy.full(SHAPE, 1.0))
            view = crossings()["torch"](t)
            del t
        else:
            view = cupy_adapter().imported(foreign(Producer()))
    number = stream.ptr
    machine.objects[0] = None
    del stream
    gc.collect()
    del view  # the fake fails where a destroyed stream is used
    gc.collect()
    assert (0, number) not in machine.destroyed
    machine.run()
    assert _lease.settle() == 0


@OWNERS
def test_a_further_stream_is_waited_for_where_used_on_names_it(machine, owner):
    race = Race(machine, owner, crossings())
    freed, taken = plays(race, stream=0x70, keep=lambda x, view: tb.used_on(view, 0x70))
    assert taken != freed
    assert race.values == {1.0}


@OWNERS
def test_a_further_stream_is_not_waited_for_where_nobody_names_it(machine, owner):
    """The negative control of the test above: used_on is needed."""
    race = Race(machine, owner, crossings())
    freed, taken = plays(race, stream=0x70)
    assert (taken, race.values) == (freed, {2.0})


@OWNERS
def test_used_on_keeps_memory_that_never_crossed(machine, owner):
    race = Race(machine, owner, {owner: lambda x: x})
    freed, taken = plays(race, keep=lambda x, view: tb.used_on(x, race.READING))
    assert taken != freed
    assert race.values == {1.0}


def test_used_on_of_a_cupy_view_keeps_the_memory_of_its_base_for_as_long_as_that_lives(machine, cupy):
    race = Race(machine, "cupy", {"cupy": lambda c: c.view()})
    base, view = race.lend()
    tb.used_on(view, race.READING)
    tb.used_on(view, 0x70)  # a second stream joins the first
    where = address(base)
    del view
    race.settled()
    for reading in (race.READING, 0x70):
        with machine.hold(0, reading):
            array = base.array()
            machine.kernel(0, reading, lambda array=array: race.seen.append(array.copy()))
            box, base = [base], base if reading == race.READING else None
            box.clear()
            race.settled()
            if base is None:
                taken = race.successor()
    assert address(taken) != where
    assert {value for seen in race.seen for value in seen.ravel().tolist()} == {1.0}


def test_memory_that_neither_owns_is_kept_by_the_same_lease(machine, torch):
    """A tensor over CuPy's memory goes back to CuPy: torch's record_stream would do nothing, and does not say so."""
    cross = crossings()
    race = Race(machine, "cupy", {"cupy": lambda c: cross["torch"](_torch_cuda.from_cupy(ON_CUPY)(c))})
    machine.current["cupy"][0] = 0x50
    c = machine.cupy.full(SHAPE, 1.0)
    machine.run()
    where = address(c)
    machine.current["cupy"][0] = race.READING  # CuPy reads on another stream than the one it allocated on
    view = race.cross["cupy"](c)
    assert ("record_stream", race.READING) not in machine.calls
    with machine.hold(0, race.READING):
        race.read_late(view)
        del c, view
        race.settled()
        taken = race.successor()
    assert address(taken) != where
    assert race.values == {1.0}
    del taken
    assert race.settled() == 0
    assert machine.cupy_memory.used == 0
