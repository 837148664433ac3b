"""Version counters, graphs, and tensors that have no memory of their own.

Part of the fact tests: see test_facts.py.
"""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from _facts_probes import address, read_capsule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

peek = torch._C._functorch.peek_interpreter_stack
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


@contextlib.contextmanager
def without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Version counters.

ALIASES = {  # does a write through it move the counter of the tensor?
    "detach": (lambda t: t.detach(), True),
    "a slice": (lambda t: t[1:], True),
    "a slice of detach": (lambda t: t.detach()[1:], True),
    "as_strided of detach": (lambda t: t.detach().as_strided((2,), (1,), 1), True),
    "another dtype": (lambda t: t.detach().view(torch.int32), True),
    "the base of its NumPy view": (lambda t: t.numpy().base, True),
    ".data": (lambda t: t.data, False),
    "set_ to its storage": (lambda t: torch.empty(0).set_(t.untyped_storage(), 0, (4,), (1,)), False),
    "from_dlpack": (torch.from_dlpack, False),
    "from_numpy of its NumPy view": (lambda t: torch.from_numpy(t.numpy()), False),
}


@pytest.mark.parametrize("name", ALIASES)
def test_which_aliases_share_the_version_counter(name):
    alias_of, shares = ALIASES[name]
    t = torch.ones(4)
    alias = alias_of(t)
    before = t._version
    alias.zero_()
    assert alias.data_ptr() in (address(t), address(t) + 4)
    assert (t._version > before) is shares


def test_a_write_by_numpy_moves_no_counter():
    t = torch.ones(4)
    t.numpy()[:] = 5
    assert t.tolist() == [5.0] * 4
    assert t._version == 0


def test_leaves_cut_from_one_block_share_its_counter_unless_each_is_made_by_from_numpy_or_set_():
    def counters(first, second):
        before = second._version
        first.add_(1)
        return second._version - before

    block = np.zeros(8, np.float32)
    whole = torch.from_numpy(block)
    assert counters(whole[:4], whole[4:]) == 1
    assert counters(*whole.split(4)) == 1
    assert counters(*(torch.from_numpy(block[i : i + 4]) for i in (0, 4))) == 0
    assert counters(*(torch.empty(0).set_(whole.untyped_storage(), i, (4,), (1,)) for i in (0, 4))) == 0


def test_training_with_one_leaf_and_writing_another_raises_for_slices_and_not_for_set_():
    weight = torch.ones(4, requires_grad=True)
    block = torch.zeros(8)
    first, second = (torch.empty(0).set_(block.untyped_storage(), i, (4,), (1,)) for i in (0, 4))
    loss = (weight * first).sum()
    second.add_(1)
    loss.backward()
    first, second = block.split(4)
    loss = (weight * first).sum()
    second.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_increment_version_moves_the_counter_of_the_base_and_takes_an_iterable():
    t = torch.ones(4)
    increment_version(t[1:])
    assert t._version == 1
    increment_version([t, t])
    assert t._version == 3


def test_an_inference_tensor_has_no_counter_and_increment_version_says_nothing():
    with torch.inference_mode():
        t = torch.ones(3)
    increment_version(t)
    with pytest.raises(RuntimeError, match="do not track version counter"):
        t._version  # noqa: B018


# Writes that autograd sees, and writes that it does not (pytorch#6990).


def squares():
    """A leaf of ones, a tensor `y` that a graph has saved, and the loss whose gradient in the leaf is 8."""
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    return x, y, (y**2).sum()


UNSEEN = {"numpy": lambda y: y.detach().numpy().fill(0), ".data": lambda y: y.data.zero_()}
SEEN = {
    "detach": lambda y: y.detach().zero_(),
    "the base of a NumPy view": lambda y: y.detach().numpy().base.zero_(),
    "increment_version": increment_version,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_write_that_moves_no_counter_makes_a_wrong_gradient_without_an_error(name):
    x, y, loss = squares()
    UNSEEN[name](y)
    loss.backward()
    assert x.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("name", SEEN)
def test_a_write_that_moves_the_counter_makes_backward_raise(name):
    x, y, loss = squares()
    SEEN[name](y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert x.grad is None


def test_a_saved_input_that_does_not_require_grad_is_overwritten_unseen():
    weight, batch = torch.ones(3, requires_grad=True), torch.ones(3)
    loss = (weight * batch).sum()
    batch.numpy()[:] = 0
    loss.backward()
    assert weight.grad.tolist() == [0.0] * 3


def test_numpy_asks_for_requires_grad_only_while_grad_mode_is_on():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = (x * x).sum()
    with pytest.raises(RuntimeError, match="requires grad"):
        x.numpy()
    with torch.no_grad():
        x.numpy()[0] = 100.0
    y.backward()
    assert x.grad.tolist() == [200.0, 6.0]


def test_a_view_as_integers_leaves_the_graph():
    in_graph = torch.ones(2, dtype=torch.bfloat16, requires_grad=True) * 1
    integers = in_graph.view(torch.uint16)
    assert address(integers) == address(in_graph)
    assert not integers.requires_grad


def test_a_dual_tensor_looks_plain_and_loses_its_tangent_without_a_word():
    with without_warnings(), forward_ad.dual_level():  # as for jvp, below
        dual = forward_ad.make_dual(torch.ones(3), torch.full((3,), 2.0))
        assert type(dual) is torch.Tensor
        assert not dual.requires_grad
        assert not is_wrapped(dual)
        assert peek() is None
        assert dual.numpy().tolist() == [1.0] * 3
        assert forward_ad.unpack_dual(dual).tangent is not None
        assert forward_ad.unpack_dual(dual.detach()).tangent is None


# Tensors that have no memory of their own.


def vmap(look):
    torch.func.vmap(look)(torch.ones(2, 3))


def grad(look):
    torch.func.grad(lambda v: look(v).sum())(torch.ones(3))


def jvp(look):
    with without_warnings():  # torch's own decompositions still call torch.jit.script
        torch.func.jvp(look, (torch.ones(3),), (torch.ones(3),))


def functionalize(look):
    torch.func.functionalize(look)(torch.ones(3))


TRANSFORMS = [vmap, grad, jvp, functionalize]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch_wraps_in_exactly_tensor_and_says_so_when_asked(transform):
    leaked = []

    def look(wrapper):
        assert type(wrapper) is torch.Tensor
        assert wrapper.is_cpu
        assert is_wrapped(wrapper)
        assert peek() is not None
        leaked.append(wrapper)
        return wrapper * 2

    transform(look)
    assert peek() is None
    assert is_wrapped(leaked[0])  # a wrapper that escaped is still one, where the stack no longer tells


@pytest.mark.parametrize("transform", [vmap, grad, jvp])
def test_a_wrapper_has_no_address_inside_its_transform(transform):
    def look(wrapper):
        with pytest.raises(RuntimeError, match="doesn't have storage"):
            wrapper.data_ptr()
        with pytest.raises(RuntimeError):
            wrapper.numpy()
        return wrapper * 2

    transform(look)


def test_a_functionalized_tensor_exports_memory_that_numpy_made_up():
    """Not read: NumPy allocates where torch gives it a null pointer."""

    def look(wrapper):
        assert wrapper.data_ptr() == 0
        assert wrapper.numpy().flags.owndata
        assert read_capsule(wrapper.__dlpack__(max_version=(1, 0))).data is None
        return wrapper * 2

    functionalize(look)


def test_a_functional_tensor_outside_a_transform_is_seen_by_neither_question_of_functorch():
    functional = torch._to_functional_tensor(torch.ones(3))
    assert type(functional) is torch.Tensor
    assert peek() is None
    assert not is_wrapped(functional)
    assert torch._is_functional_tensor(functional)
    assert functional.data_ptr() == 0
    assert functional.numpy().flags.owndata


def test_a_plain_tensor_inside_a_transform_is_plain_though_the_stack_is_not_empty():
    outside = torch.ones(3)

    def look(wrapper):
        assert not is_wrapped(outside)
        assert peek() is not None
        assert address(outside.numpy()) == address(outside)
        return wrapper

    vmap(look)


def test_a_tensor_that_owns_its_memory_exports_an_array_that_does_not():
    assert not torch.ones(3).numpy().flags.owndata


def test_fake_tensors_are_refused_by_numpy_and_exported_as_null_by_dlpack():
    with FakeTensorMode():
        fake = torch.ones(3)
    with pytest.raises(RuntimeError, match="tensor subclasses"):
        fake.numpy()
    with without_warnings():  # torch deprecates the address of a fake tensor, and gives it
        assert read_capsule(fake.__dlpack__(max_version=(1, 0))).data is None


def test_meta_tensors_are_refused_by_type():
    with pytest.raises(TypeError, match="meta"):
        torch.ones(3, device="meta").numpy()
