"""autograd_graph(): the graph behind a tensor as plain data, and pictures of it that a person can read."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from tensorbridge._autograd import _graph
from tensorbridge._autograd._graph import Edge, Node, Saved, autograd_graph
from tensorbridge._errors import GraphError, UnsupportedArrayError


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
        "import sys, numpy as np; from tensorbridge._autograd._graph import autograd_graph as f\n"
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


class LoadingDict(dict):
    def items(self):
        raise RuntimeError("it loads what it holds")


class LoadingList(list):
    def __iter__(self):
        raise RuntimeError("it loads what it holds")


class Lazy(torch.nn.Module):
    def named_parameters(self, *args, **options):
        raise RuntimeError("it loads what it holds")


def test_a_module_that_fails_to_name_its_parameters_names_none():
    net, w = Lazy(), torch.ones(2, requires_grad=True)
    graph = autograd_graph(w * 2)
    assert (leaves(graph), net.training) == (["w"], True)


def test_none_of_the_code_of_the_callers_variables_runs():
    kept = LoadingDict(weight=torch.ones(2, requires_grad=True)), LoadingList([torch.ones(2, requires_grad=True)])
    by_name, by_place = kept
    graph = autograd_graph(by_name["weight"] * by_place[0])
    assert leaves(graph) == ["by_name['weight']", "by_place[0]"]


def test_what_another_thread_fills_meanwhile_is_named_as_far_as_it_was_read(monkeypatch):
    class Trainer:
        def graph(self):
            return autograd_graph(self.first * table["a"] * w)

    def taken(items, number):
        for item in itertools.islice(items, number):
            table[len(table)] = trainer.__dict__[f"new{len(table)}"] = None  # as that thread does between two looks
            yield item

    w, table, trainer = torch.ones(2, requires_grad=True), {"a": torch.ones(2, requires_grad=True)}, Trainer()
    trainer.first = torch.ones(2, requires_grad=True)
    monkeypatch.setattr(_graph, "islice", taken)
    assert set(leaves(trainer.graph())) == {"self.first", "table['a']", "w"}


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


def test_a_graph_that_would_end_the_process_when_it_is_dropped_is_refused():
    total = torch.zeros((), requires_grad=True)
    for _ in range(19_000):
        total = total + 1
    assert len(autograd_graph(total).nodes) == 19_003
    for _ in range(50_000):
        total = total + 1
    with pytest.raises(GraphError, match=r"more than 20000 functions deep[^\n]*\nIf it grows .* loss\.item\(\)"):
        autograd_graph(total)
    del total
