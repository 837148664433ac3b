"""editing() refuses what NumPy cannot write into, and says what works."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensorbridge import to_torch
from tensorbridge._autograd._editing import editing
from tensorbridge._errors import BridgeError, UnsupportedArrayError


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(3)


def outgrown():
    """`resize_` has set the shape before it finds that the storage cannot grow; a write would go past its end."""
    t = torch.from_numpy(np.ones(4, "f4"))
    with pytest.raises(RuntimeError, match="not resizable"):
        t.resize_(64)
    return t


def shared_readonly():
    a = np.ones(3)
    a.setflags(write=False)
    return to_torch(a, share_readonly=True)[1:]


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse", "to_dense()"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "sparse", "to_dense()"),
    "mkldnn": (lambda: torch.zeros(3).to_mkldnn(), "oneDNN", "to_dense()"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "lengths", "unbind()"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "lengths",
        "unbind()",
    ),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "scale", "dequantize()"),
    "meta": (lambda: torch.zeros(3, device="meta"), "no data", "torch.zeros_like"),
    "fake": (fake, "no data", "FakeTensorMode"),
    "functional": (lambda: torch._to_functional_tensor(torch.zeros(3)), "no memory of its own", "outside"),
    "zero": (lambda: torch._efficientzerotensor((3,)), "no memory", "torch.zeros_like"),
    "conj": (lambda: torch.zeros(3, dtype=torch.complex64).conj(), "conjugate bit", "editing(t.conj())"),
    "neg": (lambda: torch.zeros(3, dtype=torch.complex64).conj().imag, "negative bit", "resolve_neg()"),
    "expanded": (lambda: torch.zeros(3, 1).expand(3, 4), "one write", "t.contiguous()"),
    "sliding": (lambda: torch.zeros(9).unfold(0, 3, 1), "one write", "t.contiguous()"),
    "float4": (lambda: torch.empty(3, dtype=torch.float4_e2m1fn_x2), "numpy has no float4", "x.view(torch.uint8)"),
    "outgrown": (outgrown, "it needs 256 B and its storage holds 16 B", "Edit what is there, torch.empty(0"),
    "65 axes": (lambda: torch.zeros((1,) * 65), "at most 64 axes", "x.flatten()"),
    "uninitialized": (lambda: torch.nn.LazyLinear(3).weight, "has not given it a shape", "forward"),
    "read-only": (shared_readonly, "read-only, and was shared on your word", "t.clone()"),
    "an array": (lambda: np.zeros(3), "torch.Tensor", "numpy.ndarray"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_through_numpy_is_refused_with_the_cure(name):
    make, why, cure = REFUSED[name]
    t = make()
    with pytest.raises(UnsupportedArrayError) as caught:
        editing(t)
    message = str(caught.value)
    assert message.startswith("editing")
    assert why in message
    assert cure in message


def test_a_real_tensor_that_a_fake_mode_answers_for_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    t = torch.zeros(3)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(UnsupportedArrayError, match="FakeTensorMode"):
        editing(t)
    with FakeTensorMode(), pytest.raises(UnsupportedArrayError, match="FakeTensorMode"):
        editing(t)


def test_inside_a_functorch_transform_every_tensor_is_refused_wrapped_or_not():
    seen = []
    outside = torch.zeros(3)

    def f(x):
        for t in (x, outside):
            with pytest.raises(UnsupportedArrayError, match=r"torch\.func"):
                editing(t)
            seen.append(t)
        return x.sum()

    torch.func.grad(f)(torch.ones(3))
    torch.func.vmap(f)(torch.ones(2, 3))
    assert len(seen) == 4


def test_a_subclass_that_intercepts_every_operation_is_refused_by_name():
    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError

    t = torch.Tensor._make_wrapper_subclass(Wrapped, (3,))
    with pytest.raises(UnsupportedArrayError, match="Wrapped"):
        editing(t)


@pytest.mark.filterwarnings("ignore")
def test_the_cures_work_and_reach_the_tensor_and_its_counter():
    z = torch.zeros(2, dtype=torch.complex64)
    lazy, before = z.conj(), z._version
    with editing(lazy.conj()) as a:
        a[:] = 1j
    assert z.tolist() == [1j, 1j]
    assert z._version > before
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)
        before = nested._version
        with editing(nested.unbind()[1]) as a:
            a[:] = 1
        assert nested.unbind()[1].tolist() == [1, 1, 1]
        assert nested._version > before
    expanded = torch.zeros(3, 1).expand(3, 4)
    with editing(expanded.contiguous()) as a:
        a[0, 0] = 1
        assert a.sum() == 1


def test_an_axis_of_length_one_may_carry_any_stride():
    t = torch.zeros(5).as_strided((1, 5), (0, 1))
    with editing(t) as a:
        a[:] = 1
    assert t.tolist() == [[1] * 5]


def test_a_refusal_leaves_the_version_counter_alone():
    t = torch.zeros(3, 1).expand(3, 4)
    before = t._version
    with pytest.raises(BridgeError):
        editing(t)
    assert t._version == before


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_a_tensor_that_outlived_its_transform_is_refused(transform):
    kept = []
    transform(lambda x: (kept.append(x), x.sum())[1])(
        torch.ones(2) if transform is torch.func.grad else torch.ones(2, 3)
    )
    with pytest.raises(UnsupportedArrayError, match=r"inside torch\.func.* no memory of its own"):
        editing(kept[0])
