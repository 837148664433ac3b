"""autograd_graph(): the graph behind a tensor as plain data, and pictures of it that a person can read."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest

from tensorbridge._editing import editing
from tensorbridge._errors import UnsupportedArrayError
from tensorbridge._graph import Edge, Graph, Node, Saved, _memory, _overlap, autograd_graph

torch = pytest.importorskip("torch")


def square():
    """The graph of the documentation: ``x @ w``, squared, summed."""
    x, w = torch.ones(4, 3), torch.ones(3, 2, requires_grad=True)
    y = x @ w
    z = (y**2).sum()
    return autograd_graph(z)


def node_of(graph, name):
    (found,) = [node for node in graph.nodes if node.name == name]
    return found


def leaves(graph):
    return [node.variable for node in graph.nodes if node.kind == "leaf"]


# ---------------- nodes, edges


def test_the_graph_of_the_seed_question_reads_as_plain_data():
    graph = square()
    float32 = "float32"
    assert graph.nodes == (
        Node(0, "leaf", "AccumulateGrad", "w", (3, 2), float32),
        Node(1, "op", "MmBackward0", "y", (4, 2), float32, (Saved("self", "x", (4, 3), float32, "held", False),)),
        Node(2, "op", "PowBackward0", "", (4, 2), float32, (Saved("self", "y", (4, 2), float32, "held", False),)),
        Node(3, "op", "SumBackward0", "z", (), float32),
        Node(4, "output", "Tensor", "z", (), float32, shares_view=True),
        Node(5, "numpy", "to_numpy", "", (), float32, shares_view=True),
    )
    assert graph.edges == (Edge(0, 1), Edge(1, 2), Edge(2, 3), Edge(3, 4), Edge(4, 5, cut=True))
    assert graph.about == "z: torch float32 () on cpu, made by 3 operations from 1 leaf"


def test_every_edge_leads_to_a_larger_id_and_arguments_keep_their_order():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    h = a * 2
    graph = autograd_graph((b - h) / h.exp())
    assert [node.id for node in graph.nodes] == list(range(len(graph.nodes)))
    assert all(edge.source < edge.target for edge in graph.edges)
    names = {node.id: node.variable or node.name for node in graph.nodes}
    sub, div = node_of(graph, "SubBackward0").id, node_of(graph, "DivBackward0").id
    assert [names[edge.source] for edge in graph.edges if edge.target == sub] == ["b", "h"]
    assert [names[edge.source] for edge in graph.edges if edge.target == div] == ["SubBackward0", "ExpBackward0"]


def test_which_result_of_several_an_edge_takes_is_kept():
    x = torch.ones(4, requires_grad=True)
    first, second = x.chunk(2)
    graph = autograd_graph(second * first)
    split = node_of(graph, "SplitBackward0")
    assert split.outputs == 2
    assert split.variable == "first, second"
    assert [edge.input_nr for edge in graph.edges if edge.source == split.id] == [1, 0]
    assert "2 results" in str(graph)
    assert '-- "result 1" -->' in graph.to_mermaid()


def test_to_numpy_cuts_between_the_tensor_and_the_array_and_nowhere_else():
    graph = square()
    (cut,) = [edge for edge in graph.edges if edge.cut]
    assert graph.nodes[cut.source].kind == "output"
    assert graph.nodes[cut.target].kind == "numpy"


def test_a_leaf_is_its_own_graph():
    w = torch.ones(3, requires_grad=True)
    graph = autograd_graph(w)
    assert [(node.kind, node.variable) for node in graph.nodes] == [("leaf", "w"), ("numpy", "")]
    assert graph.edges == (Edge(0, 1, cut=True),)


def test_a_tensor_without_a_graph_gives_an_empty_graph_that_says_so(tmp_path):
    x = torch.ones(3, requires_grad=True)
    for tensor in (torch.ones(3), x.detach(), torch.ones(3, dtype=torch.int64)):
        graph = autograd_graph(tensor)
        assert graph.nodes == ()
        assert graph.edges == ()
        assert "does not require grad and has no autograd graph" in str(graph)
        for picture in (graph.to_dot(), graph.to_mermaid(), graph._repr_svg_()):
            assert "autograd graph" in picture
    with torch.no_grad():
        assert autograd_graph(x * 2).nodes == ()


def test_what_is_no_tensor_is_refused():
    with pytest.raises(UnsupportedArrayError, match=r"takes a torch.Tensor, not numpy.ndarray"):
        autograd_graph(np.ones(3))


def test_importing_the_module_does_not_import_torch_and_an_array_is_refused_without_it():
    code = (
        "import sys, numpy as np; from tensorbridge._graph import autograd_graph as f\n"
        "try: f(np.ones(3))\nexcept TypeError: print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ---------------- names

GLOBAL = torch.ones(2, requires_grad=True)


def test_leaves_carry_the_names_of_the_callers_variables():
    alpha, beta = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert leaves(autograd_graph(alpha * beta)) == ["alpha", "beta"]


def test_parameters_carry_the_path_in_the_callers_module():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.BatchNorm1d(3))
    graph = autograd_graph(model(torch.ones(4, 2)))
    assert set(leaves(graph)) == {"model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias"}
    saved = {tensor.name: tensor.variable for tensor in node_of(graph, "NativeBatchNormBackward0").saved}
    assert saved["running_mean"] == "model.2.running_mean"


def test_a_variable_is_a_plainer_name_than_a_path_and_a_path_than_a_place_in_a_list():
    model = torch.nn.Linear(2, 1)
    tensors, w = [model.bias], model.weight
    graph = autograd_graph(model(torch.ones(1, 2)))
    assert set(leaves(graph)) == {"w", "model.bias"}
    assert tensors[0] is not w


def test_members_of_lists_and_dicts_and_of_self_and_globals_are_named():
    class Holder:
        def __init__(self):
            self.w = torch.ones(2, requires_grad=True)
            self.net = torch.nn.Linear(2, 2)

        def graph(self):
            items, table = [torch.ones(2, requires_grad=True)], {"a": torch.ones(2, requires_grad=True)}
            return autograd_graph(self.net(self.w + items[0] + table["a"] + GLOBAL))

    assert set(leaves(Holder().graph())) == {
        "self.w", "self.net.weight", "self.net.bias", "items[0]", "table['a']", "GLOBAL",
    }  # fmt: skip


def test_a_leaf_that_nobody_names_has_no_name():
    graph = autograd_graph(torch.ones(2, requires_grad=True) * 2)
    assert leaves(graph) == [""]
    assert "leaf" in str(graph)


def test_a_key_of_a_dict_is_spelled_out_only_if_that_runs_no_code():
    class Key:
        def __repr__(self):
            raise AssertionError

    table = {Key(): torch.ones(2, requires_grad=True), 7: torch.ones(2, requires_grad=True)}
    assert leaves(autograd_graph(sum(table.values()))) == ["", "table[7]"]


def test_a_script_run_by_exec_keeps_its_variables():
    space = {"torch": torch, "autograd_graph": autograd_graph}
    exec("w = torch.ones(2, requires_grad=True)\ngraph = autograd_graph(w * 2)", space)
    assert leaves(space["graph"]) == ["w"]
    exec("class Body:\n    v = torch.ones(2, requires_grad=True)\n    graph = autograd_graph(v * 2)", space)
    assert leaves(space["Body"].graph) == ["v"]
    assert "v" in vars(space["Body"])


def test_a_context_that_keeps_something_called_variable_is_no_leaf():
    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.variable = a
            return a * 2

        @staticmethod
        def backward(ctx, g):
            return g

    a = torch.ones(2, requires_grad=True)
    assert [node.kind for node in autograd_graph(Named.apply(a)).nodes] == ["leaf", "op", "output", "numpy"]


def test_lazy_proxies_among_the_callers_variables_are_not_woken():
    class Proxy:
        def __getattribute__(self, name):
            raise AssertionError(f"asked for {name}")

    proxy = Proxy()
    w = torch.ones(2, requires_grad=True)
    assert leaves(autograd_graph(w * 2)) == ["w"]
    assert proxy is not None


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
