"""Who holds memory, and what moves or frees it under a view; nothing here reads memory that was freed.

Part of the fact tests: see test_facts.py. Addresses are compared, and weak references say what is still alive.
"""

import array
import io
import mmap
import warnings
import weakref
from multiprocessing.shared_memory import SharedMemory

import ml_dtypes
import numpy as np
import pytest
import torch
from _facts_probes import address, capsule_name, fate, read_capsule


def is_resizable(t):
    return t.untyped_storage().resizable()


# A storage changes under a foreign view.


def assign_data(t):
    t.data = torch.zeros(64)


def grow_by_out(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an output was resized: deprecated, done
        torch.add(torch.ones(256), 1, out=t)


ACTS = {  # the fate of the memory under t.numpy(), np.from_dlpack(t), np.from_dlpack(t.detach())
    "resize_ to more": (lambda t: t.resize_(256), "refused", "freed", "freed"),
    "resize_ to less": (lambda t: t.resize_(10), "intact", "intact", "intact"),
    "storage to nothing, as FSDP does": (lambda t: t.untyped_storage().resize_(0), "refused", "freed", "freed"),
    "storage to more": (lambda t: t.untyped_storage().resize_(4096), "refused", "freed", "freed"),
    "set_": (lambda t: t.set_(torch.zeros(64)), "intact", "freed", "intact"),
    ".data =": (assign_data, "intact", "freed", "intact"),
    "an out= that grows": (grow_by_out, "refused", "freed", "freed"),
    "share_memory_": (lambda t: t.share_memory_(), "freed", "freed", "freed"),
    "swap_tensors": (lambda t: torch.utils.swap_tensors(t, torch.zeros(64)), "intact", "refused", "intact"),
    "unsqueeze_": (lambda t: t.unsqueeze_(0), "intact", "intact", "intact"),
}
EXPORTS = {
    "numpy": lambda t: t.numpy(),
    "from_dlpack": np.from_dlpack,
    "from_dlpack of an alias": lambda t: np.from_dlpack(t.detach()),
}


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("act", ACTS)
def test_what_becomes_of_the_memory_under_a_view(act, export):
    """pytorch#164161, #162111: a capsule holds the live TensorImpl. pytorch#51849: `share_memory_`, open since 2021."""
    does, *fates = ACTS[act]
    assert fate(EXPORTS[export], does) == dict(zip(EXPORTS, fates))[export]


@pytest.mark.parametrize("export", EXPORTS)
def test_module_to_frees_the_memory_under_dlpack_of_the_weight_itself(export):
    module = torch.nn.Linear(4, 4).requires_grad_(False)
    storage, view = weakref.ref(module.weight.untyped_storage()), EXPORTS[export](module.weight)
    module.to(torch.float64)
    freed = storage() is None
    del view  # not to be read
    assert freed == (export == "from_dlpack")


def test_share_memory_frees_what_the_storage_was_made_over():
    owner = np.arange(64.0)
    gone = weakref.ref(owner)
    t = torch.from_numpy(owner)
    view, before = t.numpy(), address(t)
    del owner
    t.share_memory_()
    freed = gone() is None
    del view  # not to be read
    assert freed
    assert address(t) != before


def test_a_pending_capsule_shows_what_is_done_to_the_tensor_but_not_to_its_source():
    t = torch.arange(4.0)
    of_itself, of_an_alias = (x.__dlpack__(max_version=(1, 0)) for x in (t, t.detach()))
    t.unsqueeze_(0)
    assert read_capsule(of_itself).strides == (4,)  # the pointer is torch's own, and torch has moved on
    assert read_capsule(of_an_alias).strides == (1,)
    del of_itself, of_an_alias


def test_exporting_by_numpy_makes_the_storage_not_resizable_for_good():
    t = torch.zeros(4)
    assert is_resizable(t)
    t.detach().numpy()
    assert not is_resizable(t)
    with pytest.raises(RuntimeError, match="not resizable"):
        t.resize_(100)


def test_a_view_by_integers_freezes_the_storage_of_a_bfloat16_too():
    t = torch.zeros(4, dtype=torch.bfloat16)
    a = t.view(torch.uint16).numpy()
    assert not is_resizable(t)
    assert a.view(ml_dtypes.bfloat16).base is a
    with pytest.raises(RuntimeError, match="not resizable"):
        t.untyped_storage().resize_(0)


def test_an_empty_alias_of_bytes_freezes_any_storage():
    t = torch.zeros(4, dtype=torch.bfloat16)
    torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage(), 0, (0,), (1,)).numpy()
    assert not is_resizable(t)


@pytest.mark.parametrize("share", [torch.from_numpy, torch.from_dlpack, torch.frombuffer])
def test_a_storage_over_foreign_memory_is_not_resizable(share):
    source = bytearray(4) if share is torch.frombuffer else np.zeros(4)
    t = share(source, dtype=torch.uint8) if share is torch.frombuffer else share(source)
    assert not is_resizable(t)


def test_numpy_refuses_to_resize_what_torch_shares():
    for share in torch.from_numpy, torch.from_dlpack:
        a = np.arange(3.0)
        t = share(a)
        with pytest.raises(ValueError, match="cannot resize"):
            a.resize(100)
        assert address(t) == address(a)


# Bases: what a NumPy array that came from torch holds.


def test_the_base_of_an_exported_array_is_an_alias_that_shares_the_version_counter():
    t = torch.arange(6.0)
    base = t.numpy().base
    assert type(base) is torch.Tensor
    assert base is not t
    assert address(base) == address(t)
    assert t.numpy().base is not base
    t.add_(1)
    assert base._version == t._version == 1
    base.add_(1)
    assert t._version == 2


def test_the_base_does_not_require_grad_even_under_no_grad():
    leaf = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        base = leaf.numpy().base
    assert base is not leaf
    assert not base.requires_grad


def test_views_collapse_onto_the_array_that_holds_something_else():
    a = torch.arange(8.0).numpy()
    for view in a[1:], a[1:][1:], a.reshape(2, 4).T[1:], a.view(np.uint32)[1:]:
        assert view.base is a
    assert type(a.base) is torch.Tensor


def test_views_collapse_only_within_one_class():
    class Named(np.ndarray):
        pass

    owner = np.arange(8.0)
    named = owner.view(Named)
    assert named.base is owner
    part = named[1:]
    assert part.base is named
    assert np.asarray(part).base is part
    assert owner[1:][1:].base is owner


def test_a_memmap_is_the_base_of_its_plain_view(tmp_path):
    mapped = np.memmap(tmp_path / "file", mode="w+", shape=8)
    plain = np.asarray(mapped)
    assert plain.base is mapped
    assert plain[1:].base is plain
    assert type(mapped[1:].base) is np.memmap


def test_a_view_of_a_tensor_that_is_made_read_only_stays_so_and_earlier_views_do_not_follow():
    a = torch.arange(8.0).numpy()
    earlier = a[:]
    a.setflags(write=False)
    assert earlier.flags.writeable
    assert not a[:].flags.writeable
    for view in a, a[:]:
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.setflags(write=True)


def test_an_array_of_ones_own_can_be_made_writable_again():
    a = np.arange(3.0)
    view = a[:]
    view.setflags(write=False)
    view.setflags(write=True)
    assert view.flags.writeable


def test_an_expanded_tensor_exports_a_writable_array():
    overlapping = torch.zeros(3).expand(2, 3).numpy()
    assert overlapping.strides == (0, 4)
    assert overlapping.flags.writeable
    assert np.from_dlpack(torch.zeros(3).expand(2, 3)).flags.writeable


def test_an_empty_tensor_exports_an_array_with_memory_of_its_own_and_other_strides():
    t = torch.ones(0, 3)
    a = t.numpy()
    assert t.stride() == (3, 1)
    assert a.strides == (0, 0)
    assert t.data_ptr() == 0
    assert a.flags.owndata


def test_an_array_interface_is_held_by_the_array_made_from_it():
    class Memory:
        def __init__(self, array):
            self.__array_interface__ = array.__array_interface__

    owner = np.arange(4.0)
    memory = Memory(owner)
    assert np.asarray(memory).base is memory


# A finalizer on the storage: the hook for lifetimes.


def a_capsule(t):
    return t.__dlpack__(max_version=(1, 0))


HOLDERS = {
    "an alias": lambda t: t.detach(),
    "a view": lambda t: t[2:],
    "a NumPy view": lambda t: t.numpy()[1:],
    "a NumPy view by DLPack": lambda t: np.from_dlpack(t)[1:],
    "a torch view by DLPack": torch.from_dlpack,
    "a capsule": a_capsule,
    "a legacy capsule": lambda t: t.__dlpack__(),
    "a graph that saved it": lambda t: (torch.ones(4, requires_grad=True) * t).sum(),
    "another tensor that was set_ to its storage": lambda t: torch.empty(0).set_(t.untyped_storage(), 0, (2,), (1,)),
    "the storage": lambda t: t.untyped_storage(),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_finalizer_on_the_storage_fires_once_when_the_last_holder_is_gone(name):
    fired = []
    t = torch.arange(4.0)
    weakref.finalize(t.untyped_storage(), fired.append, True)
    holder = HOLDERS[name](t)
    del t
    assert fired == []
    assert holder is not None
    del holder
    assert fired == [True]


def test_a_graph_lets_go_of_what_it_saved_when_backward_is_done():
    fired = []
    t = torch.arange(4.0)
    weakref.finalize(t.untyped_storage(), fired.append, True)
    loss = (torch.ones(4, requires_grad=True) * t).sum()
    del t
    loss.backward()
    assert fired == [True]


def test_the_producer_is_alive_inside_the_finalizer_and_gone_after_it():
    owner = np.arange(4.0)
    alive, seen = weakref.ref(owner), []
    t = torch.from_dlpack(owner)
    weakref.finalize(t.untyped_storage(), lambda: seen.append(alive() is not None))
    del owner, t
    assert seen == [True]
    assert alive() is None


def test_all_aliases_have_one_storage_object():
    t = torch.arange(4.0)
    assert t.untyped_storage() is t[1:].untyped_storage() is t.detach().view(torch.int32).untyped_storage()


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_a_capsule_that_nobody_takes_frees_itself(max_version):
    owner = np.arange(4.0)
    alive = weakref.ref(owner)
    capsule = owner.__dlpack__(max_version=max_version)
    del owner
    assert alive() is not None
    del capsule
    assert alive() is None


@pytest.mark.parametrize("share", [torch.from_numpy, torch.from_dlpack, np.from_dlpack, torch.as_tensor, torch.asarray])
def test_a_shared_array_lives_as_long_as_its_last_user(share):
    owner = np.arange(4.0)
    alive = weakref.ref(owner)
    shared = share(owner)
    last = shared[1:]
    del owner, shared
    assert alive() is not None
    del last
    assert alive() is None


def test_numpy_keeps_the_capsule_of_a_dlpack_import_as_its_base():
    assert capsule_name(np.from_dlpack(torch.ones(2)).base) == "numpy_dltensor_versioned"


# Buffers: who holds the export (pytorch#46741, numpy#18294).


def holds_the_export(make, change, view):
    """Whether `change` to what `make` gives is refused while ``view(what make gives)`` is alive."""
    source = make()
    alive = view(source)
    try:
        change(source)
        held = False
    except BufferError:
        held = True
    del alive
    if held:
        change(source)  # and let go of with the view
    return held


def a_shared_memory():
    memory = SharedMemory(create=True, size=4096)
    memory.unlink()
    return memory


BUFFERS = {  # make, what would take the memory away, its bytes
    "bytearray": (lambda: bytearray(4096), lambda b: b.extend(b"more" * 4096), lambda b: b),
    "array.array": (lambda: array.array("B", bytes(4096)), lambda b: b.append(1), lambda b: b),
    "mmap": (lambda: mmap.mmap(-1, 4096), lambda m: m.close(), lambda m: m),
    "SharedMemory": (a_shared_memory, lambda m: m.close(), lambda m: m.buf),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_numpy_holds_the_export_of_a_buffer_and_torch_frombuffer_does_not(name):
    make, change, memory = BUFFERS[name]
    assert holds_the_export(make, change, lambda x: np.asarray(memoryview(memory(x))))
    assert holds_the_export(make, change, lambda x: np.frombuffer(memory(x), np.uint8))
    assert holds_the_export(make, change, lambda x: torch.from_numpy(np.asarray(memoryview(memory(x)))))
    assert not holds_the_export(make, change, lambda x: torch.frombuffer(memory(x), dtype=torch.uint8))


def test_numpy_holds_no_export_of_a_buffer_that_it_was_given_by_keyword():
    """`numpy.ndarray(buffer=...)`, and so `numpy.memmap`: nothing to be seen in the array that comes in."""
    make, change, memory = BUFFERS["SharedMemory"]
    assert not holds_the_export(make, change, lambda x: np.ndarray((4096,), np.uint8, buffer=memory(x)))


def test_the_mapping_under_a_memmap_can_be_closed(tmp_path):
    a = np.memmap(tmp_path / "file", mode="w+", shape=8)
    a._mmap.close()
    assert a._mmap.closed


def test_bytes_are_read_only_in_numpy_and_written_to_by_torch_frombuffer():
    frozen = bytes(bytearray(b"frozen"))
    assert not np.asarray(memoryview(frozen)).flags.writeable
    assert np.asarray(frozen).dtype == np.dtype("S6")  # not its bytes: a string
    with pytest.warns(UserWarning, match="not writable"):
        torch.frombuffer(frozen, dtype=torch.uint8)[0] = ord("F")
    assert frozen == b"Frozen"


# What is saved.


def saved(t):
    file = io.BytesIO()
    torch.save(t, file)
    return file.tell()


def test_torch_save_of_a_view_writes_the_whole_storage():
    block = torch.zeros(100_000)
    leaf = torch.empty(0).set_(block.untyped_storage(), 0, (1,), (1,))
    assert saved(block[:1]) > block.nbytes
    assert saved(leaf) > block.nbytes  # a version counter of its own, but no storage
    assert saved(block[:1].clone()) < 10_000
    assert saved(torch.from_numpy(block.numpy()[:1])) < 10_000
