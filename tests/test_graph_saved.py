"""autograd_graph(): what a graph has saved, what of it shares memory with the tensor; reading it leaves no trace."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref

import pytest
import torch
from test_graph import node_of, square

from tensorbridge._autograd._editing import editing
from tensorbridge._autograd._graph import Edge, Graph, Node, Saved, _memory, _overlap, autograd_graph

# ---------------- saved


def test_saved_tensors_are_named_also_where_torch_hands_out_new_objects():
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    graph = autograd_graph(y.sin())
    assert node_of(graph, "ExpBackward0").saved == (Saved("result", "y", (3,), "float32", "held", False),)
    assert node_of(graph, "SinBackward0").saved == (Saved("self", "y", (3,), "float32", "held", False),)


def test_after_a_backward_saved_tensors_are_freed_and_nothing_raises():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    x = torch.ones(3, requires_grad=True)
    z = (Double.apply(x) ** 2).sum()
    z.backward()
    graph = autograd_graph(z)
    assert node_of(graph, "PowBackward0").saved == (Saved("self", "", None, "", "freed", False),)
    assert [saved.state for saved in node_of(graph, "DoubleBackward").saved] == ["freed"]
    assert "self: freed by a backward" in str(graph)


def test_a_saved_tensor_that_was_written_in_place_is_modified():
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    z = (y**2).sum()
    with editing(y):
        pass
    graph = autograd_graph(z)
    for name in ("ExpBackward0", "PowBackward0"):
        (saved,) = node_of(graph, name).saved
        assert (saved.state, saved.shape) == ("modified", (3,))
    assert "backward raises" in str(graph)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_what_a_hook_packed_stays_packed():
    def unpack(packed):
        raise AssertionError("a hook was called")

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a * 2

        @staticmethod
        def backward(ctx, g):
            return g

    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
        y = Keep.apply(x).exp()
    graph = autograd_graph(y)
    for name, word in (("ExpBackward0", "result"), ("KeepBackward", "tensors[0]")):
        assert node_of(graph, name).saved == (Saved(word, "", None, "", "packed", False),)
    assert "packed by a hook" in str(graph)


def test_several_tensors_under_one_name_are_numbered_and_none_is_left_out():
    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, None, b)
            return a * b

        @staticmethod
        def backward(ctx, g):
            return g, g

    a, b = torch.ones(3, requires_grad=True), torch.ones(3)
    assert [
        (saved.name, saved.variable) for saved in node_of(autograd_graph(Pair.apply(a, b)), "PairBackward").saved
    ] == [
        ("tensors[0]", "a"),
        ("tensors[2]", "b"),
    ]


def test_a_thousand_saved_tensors_do_not_fill_the_picture():
    class Hoard(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, *rest):
            ctx.save_for_backward(*rest)
            return a * 2

        @staticmethod
        def backward(ctx, g):
            return (g, *[None] * 1000)

    a = torch.ones(3, requires_grad=True)
    graph = autograd_graph(Hoard.apply(a, *[torch.ones(1)] * 1000))
    assert len(node_of(graph, "HoardBackward").saved) == 1000
    assert "saved 988 more" in graph.to_mermaid()


# ---------------- shared memory


def test_a_saved_result_that_is_the_tensor_itself_shares_memory_with_the_view():
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    graph = autograd_graph(y)
    assert [saved.shares_view for saved in node_of(graph, "ExpBackward0").saved] == [True]
    assert "result: y (3,) *" in str(graph)
    assert "* shares memory with the NumPy array" in str(graph)
    y.detach().numpy()[:] = 0  # what the mark warns of
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 0]


def test_sharing_is_told_from_the_addresses_not_from_the_storage():
    x = torch.ones(4, 2, requires_grad=True)
    y = x.exp()
    states = {}
    for name, view in {"rows": y[2:], "transposed": y.T, "copy": y.clone(), "none": y[4:]}.items():
        states[name] = node_of(autograd_graph(view), "ExpBackward0").saved[0].shares_view
    assert states == {"rows": True, "transposed": True, "copy": False, "none": False}
    leaf = torch.ones(4, 2, requires_grad=True)
    assert node_of(autograd_graph(leaf[:, 1]), "AccumulateGrad").shares_view
    assert not node_of(autograd_graph(leaf * 1), "AccumulateGrad").shares_view


def test_neighbouring_columns_of_one_storage_do_not_share_memory():
    table = torch.ones(4, 2)
    first, second, row = _memory(table[:, 0]), _memory(table[:, 1]), _memory(table[2])
    assert not _overlap(first, second)
    assert _overlap(first, row)
    assert not _overlap(first, None)
    assert not _overlap(first, first._replace(device="cuda:0"))


def test_where_the_exact_answer_would_take_too_long_sharing_is_assumed():
    memory = torch.empty(2_000_000, dtype=torch.int8)
    one = memory.as_strided((40, 41, 43, 47), (7919, 7907, 7901, 7883))
    other = memory[1:].as_strided((40, 41, 43, 47), (7921, 7909, 7903, 7885))
    assert _overlap(_memory(one), _memory(other))


def test_tensors_without_memory_share_none():
    y = torch.ones(3, device="meta", requires_grad=True).exp()
    assert not node_of(autograd_graph(y), "ExpBackward0").saved[0].shares_view


# ---------------- reading leaves no trace


def test_reading_changes_nothing_and_the_backward_is_right():
    x, w = torch.ones(4, 3), torch.ones(3, 2, requires_grad=True)
    y = x @ w
    z = (y**2).sum()
    versions = x._version, w._version, y._version
    autograd_graph(z)
    assert (x._version, w._version, y._version) == versions
    z.backward()
    assert w.grad.tolist() == [[24, 24]] * 3


def test_the_graph_keeps_no_tensor_alive_and_makes_no_cycle():
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    z = (y**2).sum()
    gone = [weakref.ref(tensor) for tensor in (x, y, z)]
    gc.collect()
    gc.disable()
    try:
        graph = autograd_graph(z)
        del x, y, z
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()
    assert len(graph.nodes) == 6


def test_the_callers_own_locals_dict_is_left_alone():
    x = torch.ones(3, requires_grad=True)
    seen = locals()
    autograd_graph(x * 2)
    assert seen["x"] is x


def test_the_graph_is_plain_data_and_pickles():
    graph = square()
    todo, kinds = [graph], set()
    while todo:
        item = todo.pop()
        kinds.add(type(item))
        todo += item if isinstance(item, tuple) else ()
    assert kinds <= {Graph, Node, Edge, Saved, tuple, str, int, bool, type(None)}
    assert pickle.loads(pickle.dumps(graph)) == graph


def loud():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} was intercepted")

    return (torch.ones(3, requires_grad=True) * 2).as_subclass(Loud)


def double_backward():
    x = torch.ones(3, requires_grad=True)
    return torch.autograd.grad((x**3).sum(), x, create_graph=True)[0]


def in_place():
    y = torch.ones(3, requires_grad=True) * 2
    y[0] = 5
    return y.relu_()


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3, requires_grad=True).exp()


UNUSUAL = {
    "double backward": double_backward,
    "in place": in_place,
    "fake": fake,
    "a subclass": loud,
    "meta": lambda: torch.ones(3, device="meta", requires_grad=True).exp(),
    "sparse": lambda: torch.eye(3).to_sparse().requires_grad_() * 2,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True) * 2,
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged, requires_grad=True
    ).exp(),
    "conj": lambda: torch.ones(3, dtype=torch.complex64, requires_grad=True).conj(),
    "expanded": lambda: torch.ones(1, requires_grad=True).exp().expand(5),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(
        *[torch.ones(1, 2, 3, requires_grad=True)] * 3
    ),
    "lstm": lambda: torch.nn.LSTM(2, 3)(torch.ones(4, 1, 2))[0],
    "index": lambda: torch.ones(3, requires_grad=True).clone().index_put((torch.tensor([0]),), torch.ones(1)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_graphs_are_read_and_drawn_without_an_error_or_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = UNUSUAL[name]()
        warnings.simplefilter("error")
        graph = autograd_graph(tensor)
    assert graph.nodes[-1].kind == "numpy"
    assert str(graph)
    assert graph._repr_svg_()


def test_inside_a_functorch_transform_the_graph_is_read_without_raising():
    seen = []

    def f(x):
        seen.append(autograd_graph(x.exp().sum()))
        return x.sum()

    torch.func.grad(f)(torch.ones(3))
    torch.func.vmap(f)(torch.ones(2, 3, requires_grad=True))
    assert len(seen) == 2
