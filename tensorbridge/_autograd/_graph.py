"""torch's autograd graph, read as plain data.

A graph is made of functions of the backward pass. Each keeps alive what it needs of the forward pass: what it "saved".
NumPy has no place for any of it, so a graph ends where `to_numpy` begins. Reading leaves no trace: no hook is called,
nothing is computed, and the result holds no tensor.
"""

from __future__ import annotations

import contextlib
import os
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorbridge._adapters import named
from tensorbridge._array import Device, shape_text
from tensorbridge._autograd import _picture
from tensorbridge._autograd._editing import on_host, torch_of
from tensorbridge._dtypes import of_torch
from tensorbridge._eager import eager
from tensorbridge._errors import GraphError
from tensorbridge._loaded import Named
from tensorbridge._memory import elements, overlap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

    import torch

    Shape = tuple[int, ...]
else:
    torch = Named("torch")

DEEPEST = 20_000  # functions in a row: 50 000 that Python had looked at ended the process when torch dropped them


class Saved(NamedTuple):
    """A tensor that a node keeps for the backward pass."""

    name: str  # the operation's own word for it: "self", "mat2", "result"
    variable: str  # what the caller calls it; "" where that cannot be known
    shape: Shape | None  # None: freed, or packed by a hook
    dtype: str
    state: str  # "held"; "freed": a backward has run; "modified": backward will raise; "packed": by saved_tensors_hooks
    shares_view: bool  # its memory overlaps the tensor's: a write through a shared view changes it


class Node(NamedTuple):
    """A node of a graph. Ids count up from the leaves, so that every edge leads to a larger one.

    `kind` is "leaf" (where ``.grad`` arrives), "op", "output" (the tensor asked about) or "numpy" (beyond the cut).
    """

    id: int
    kind: str
    name: str  # torch's name: "AccumulateGrad", "PowBackward0"; "Tensor" for the output; "to_numpy" beyond the cut
    variable: str  # what the caller calls the leaf, or the result of the operation: "w", "model.0.weight"; or ""
    shape: Shape | None  # of the (first) result; None: unknown
    dtype: str
    saved: tuple[Saved, ...] = ()
    shares_view: bool = False  # a leaf or an output whose memory overlaps the tensor's
    outputs: int = 1  # how many results the operation has


class Edge(NamedTuple):
    """Values flow from source to target in the forward pass; gradients flow back in the backward pass."""

    source: int
    target: int
    input_nr: int = 0  # which result of the source, as torch counts (`next_functions`)
    cut: bool = False  # to_numpy would cut here: no gradient comes back over this edge


class Graph(NamedTuple):
    """The autograd graph behind a tensor, as plain data that keeps no tensor alive; ``str(graph)`` is a table of it.

    Pictures and table fold what has too many nodes, and say so; `nodes` and `edges` are always complete.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]  # those into one node are neighbours, in the order of its arguments
    about: str  # one sentence; for a tensor without a graph, that it has none

    @eager
    def __str__(self) -> str:
        return _picture.to_text(self)

    @eager
    def __repr__(self) -> str:
        return f"<Graph: {self.about}>"

    def _repr_svg_(self) -> str:  # so that a notebook shows the picture
        return _picture.to_svg(self)

    @eager
    def to_mermaid(self) -> str:
        """Return the graph in mermaid's flowchart language, which GitHub and most notebooks draw."""
        return _picture.to_mermaid(self)

    @eager
    def to_dot(self) -> str:
        """Return the graph in the DOT language of Graphviz."""
        return _picture.to_dot(self)

    @eager
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to `path` as a picture; nothing else need be installed.

        Parameters
        ----------
        path : path ending in ``.svg`` (drawn here, without Graphviz), ``.mmd`` (mermaid) or ``.dot``

        Raises
        ------
        ValueError
            `path` ends in anything else.
        OSError
            `path` cannot be written.
        """
        writers = {".svg": _picture.to_svg, ".mmd": _picture.to_mermaid, ".dot": _picture.to_dot}
        write = writers.get(os.path.splitext(path)[1].lower())
        if write is None:
            raise ValueError(
                f"save: {os.fspath(path)!r} must end in .svg, .mmd or .dot, the pictures that a graph can be."
            )
        text = write(self)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)


@eager
def autograd_graph(tensor: torch.Tensor) -> Graph:
    """Return the autograd graph behind `tensor` as plain data: what made it, what was saved, where `to_numpy` cuts.

    Variables carry the names by which the calling function knows them: its own variables, modules (``model.0.weight``),
    lists, dicts, attributes of ``self``, globals. After a backward, what nodes saved is "freed", under every name that
    the operation might have used; what was written in place since is "modified".

    Parameters
    ----------
    tensor : torch.Tensor

    Returns
    -------
    Graph
        ``nodes``, ``edges`` and ``about``, fresh; empty for a tensor that does not require grad, and ``about`` says so.

    Raises
    ------
    UnsupportedArrayError
        `tensor` is no torch.Tensor.
    GraphError
        The graph is more than 20 000 functions deep: looked at, so long a chain may end the process when it is dropped.

    Cost
    ----
    No element is read, no hook is called, nothing is waited for. Some tens of microseconds a node.

    Examples
    --------
    >>> import torch
    >>> x, w = torch.ones(4, 3), torch.ones(3, 2, requires_grad=True)
    >>> y = x @ w
    >>> graph = autograd_graph((y**2).sum())
    >>> [(node.name, node.variable) for node in graph.nodes[:2]]
    [('AccumulateGrad', 'w'), ('MmBackward0', 'y')]
    >>> graph.nodes[2].saved
    (Saved(name='self', variable='y', shape=(4, 2), dtype='float32', state='held', shares_view=False),)
    >>> [(edge.source, edge.target) for edge in graph.edges if edge.cut]
    [(4, 5)]
    >>> autograd_graph(x).about
    'x: torch float32 (4, 3) on cpu does not require grad and has no autograd graph; to_numpy cuts nothing'
    """
    torch = torch_of(tensor, "autograd_graph")
    with torch._C.DisableTorchFunctionSubclass():  # the tensor itself, whatever a subclass makes of looking at it
        return _Reader(torch, tensor, sys._getframe(1)).graph()


class _Reader:
    """Reads one graph. Tensors and functions are held only as long as it lives."""

    def __init__(self, torch: Any, tensor: torch.Tensor, frame: FrameType) -> None:
        self.tensor, self.memory = tensor, _memory(tensor)
        self.by_id: dict[int, str] = {}
        self.by_origin: dict[tuple[Any, int], str] = {}  # (function, which result): a saved result is a new object
        self.attributes: dict[type, list[str]] = {}
        self.held: list[torch.Tensor] = []  # so that ids stay true
        for name, variable in _named_tensors(torch, frame):
            self.held.append(variable)
            self.by_id.setdefault(id(variable), name)
            if variable.grad_fn is not None:
                self.by_origin.setdefault((variable.grad_fn, variable.output_nr), name)

    def graph(self) -> Graph:
        tensor, root, name = self.tensor, self.tensor.grad_fn, self.name_of(self.tensor)
        shape, dtype = _shape(tensor), of_torch(tensor.dtype)
        about = f"{name + ': ' if name else ''}torch {dtype} {shape_text(shape)} on {tensor.device}"
        if not tensor.requires_grad:
            return Graph((), (), f"{about} does not require grad and has no autograd graph; to_numpy cuts nothing")
        nodes: list[Node] = []
        edges: list[Edge] = []
        index: dict[Any, int] = {}
        for function in _inputs_first(root) if root is not None else ():
            index[function] = len(nodes)
            nodes.append(self.node(len(nodes), function))
            edges += [Edge(index[f], index[function], nr) for f, nr in function.next_functions if f is not None]
        if root is None:
            nodes.append(Node(0, "leaf", "AccumulateGrad", name, shape, dtype, shares_view=True))
        else:
            edges.append(Edge(index[root], len(nodes), tensor.output_nr))
            nodes.append(Node(len(nodes), "output", "Tensor", name, shape, dtype, shares_view=True))
        edges.append(Edge(len(nodes) - 1, len(nodes), cut=True))
        nodes.append(Node(len(nodes), "numpy", "to_numpy", "", shape, dtype, shares_view=on_host(tensor)))
        return Graph(tuple(nodes), tuple(edges), f"{about}, made by {_picture.count_text(n.kind for n in nodes)}")

    def name_of(self, tensor: torch.Tensor) -> str:
        name = self.by_id.get(id(tensor), "")
        if not name and tensor.grad_fn is not None:
            name = self.by_origin.get((tensor.grad_fn, tensor.output_nr), "")
        return name

    def node(self, number: int, function: Any) -> Node:
        name = function.name().removeprefix("struct ").removeprefix("torch::autograd::")
        if type(function).__name__ == "AccumulateGrad":
            leaf = function.variable
            shares = _overlap(self.memory, _memory(leaf))
            return Node(
                number, "leaf", name, self.name_of(leaf), _shape(leaf), of_torch(leaf.dtype), shares_view=shares
            )
        results = function._input_metadata  # what goes into the backward function came out of the forward one
        variable = ", ".join(filter(None, (self.by_origin.get((function, nr)) for nr in range(len(results)))))
        shape = tuple(results[0].shape) if results and not results[0].is_nested_tensor else None
        dtype = of_torch(results[0].dtype) if results else ""
        return Node(number, "op", name, variable, shape, dtype, tuple(self.saved(function)), outputs=len(results))

    def saved(self, function: Any) -> Iterator[Saved]:
        """What a function saved. What a hook has packed stays packed: unpacking it may run a whole model again."""
        kind = type(function)
        if kind not in self.attributes:
            self.attributes[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
        for attribute in self.attributes[kind]:
            name = attribute.removeprefix("_raw_saved_")
            try:
                raw = getattr(function, attribute)
            except RuntimeError:  # freed by a backward, says a torch.autograd.Function
                yield Saved(name, "", None, "", "freed", False)
                continue
            several = isinstance(raw, (tuple, list))
            raws = list(raw) if several else [raw]
            state, values = "held", [r.data for r in raws]
            if not any(r.unpack_hook for r in raws):
                try:  # this read raises what a backward would raise: freed, or the version counter has moved
                    value = getattr(function, f"_saved_{name}" if hasattr(kind, f"_saved_{name}") else "saved_tensors")
                    values = list(value) if several else [value]
                except RuntimeError:
                    state = "modified"
            for number, (r, value) in enumerate(zip(raws, values)):
                label = f"{name}[{number}]" if several else name
                if r.unpack_hook:
                    yield Saved(label, "", None, "", "packed", False)
                elif value is not None:
                    shares = _overlap(self.memory, _memory(value))
                    yield Saved(label, self.name_of(value), _shape(value), of_torch(value.dtype), state, shares)
                elif state == "modified":  # nothing there any more
                    yield Saved(label, "", None, "", "freed", False)


_TOO_DEEP = (
    f"autograd_graph: the graph is more than {DEEPEST} functions deep. Once Python has looked at so long a chain, "
    "torch drops it by as many nested calls, which may end the process.\nIf it grows with every step of a loop, "
    "something adds up with its graph: total += loss.item(), or loss.detach()."
)


def _inputs_first(root: Any) -> Iterator[Any]:
    """Every function once, after those whose results it takes. Iterative: graphs are deeper than Python's stack."""
    seen, path = {root}, [(root, iter(root.next_functions))]
    while path:
        function, inputs = path[-1]
        source = next((f for f, _ in inputs if f is not None and f not in seen), None)
        if source is None:
            path.pop()
            yield function
        else:
            if len(path) >= DEEPEST:
                raise GraphError(_TOO_DEEP)
            seen.add(source)
            path.append((source, iter(source.next_functions)))


def _named_tensors(torch: Any, frame: FrameType) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a frame can name, the plainest name first: variables, members of modules, of containers."""
    found: list[tuple[int, str, torch.Tensor]] = []
    for name, value in _variables(frame):
        found += _tensors_in(torch, name, value, 0)
        for path, item in _items(torch, name, value):
            found += _tensors_in(torch, path, item, 2)
    found.sort(key=lambda entry: (entry[1].startswith("_"), entry[0]))  # stable: locals stay before globals
    return [(name, tensor) for _, name, tensor in found]


def _tensors_in(torch: Any, name: str, value: Any, rank: int) -> Iterator[tuple[int, str, torch.Tensor]]:
    kind = type(value)  # not isinstance, which runs the code of lazy proxies
    if issubclass(kind, torch.Tensor):
        yield rank, name, value
    elif issubclass(kind, torch.nn.Module):
        with contextlib.suppress(Exception):  # a name more or less: a module of the caller's may fail at this
            for path, member in (*value.named_parameters(), *value.named_buffers()):
                yield rank + 1, f"{name}.{path}", member


def _items(torch: Any, name: str, value: Any) -> list[tuple[str, Any]]:
    """What one level of containers holds, as far as it is quick to look."""
    kind = type(value)
    items: Iterable[tuple[str, Any]] = ()
    if issubclass(kind, dict):
        items = ((f"{name}[{key!r}]", item) for key, item in dict.items(value) if type(key) in (str, int))
    elif issubclass(kind, (list, tuple)):
        stored = list.__iter__ if issubclass(kind, list) else tuple.__iter__  # nothing runs code of the caller's
        items = ((f"{name}[{number}]", item) for number, item in enumerate(stored(value)))
    elif name == "self" and not issubclass(kind, torch.nn.Module):
        items = ((f"self.{key}", item) for key, item in getattr(value, "__dict__", {}).items())
    found: list[tuple[str, Any]] = []
    with contextlib.suppress(RuntimeError):  # another thread changes the dict: a name more or less
        found.extend(islice(items, 1000))
    return found


def _variables(frame: FrameType) -> list[tuple[str, object]]:
    local = frame.f_locals
    found = list(local.items())
    if local is not frame.f_globals:
        found += list(frame.f_globals.items())
    # Before Python 3.13 the f_locals of a function is a snapshot that lives as long as the call, and so do its tensors.
    if type(local) is dict and frame.f_code.co_flags & 1 and sys.getrefcount(local) == 3:  # and nobody else looks at it
        local.clear()
    return found


def _shape(tensor: torch.Tensor) -> Shape | None:
    return None if tensor.is_nested else tuple(tensor.shape)


class _Extent(NamedTuple):
    """Where a tensor's elements lie: addresses for NumPy's overlap test, never read from."""

    device: str
    storage: int  # inside which addresses can be compared, where they may be handles
    addresses: Any


def _memory(tensor: torch.Tensor) -> _Extent | None:
    adapter: Any = named("torch")
    if adapter.intercepts(tensor):  # to ask a fake tensor for its address makes torch warn
        return None
    try:
        address, strides, size = tensor.data_ptr(), tensor.stride(), tensor.element_size()
        storage = 0 if Device(str(tensor.device)).has_addresses else tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, nested, functorch: no memory with strides
        return None
    if not address:  # empty, or meta
        return None
    strides = tuple(step * size for step in strides)
    return _Extent(str(tensor.device), storage, elements(address, tuple(tensor.shape), strides, size))


def _overlap(one: _Extent | None, other: _Extent | None) -> bool:
    if one is None or other is None or one[:2] != other[:2]:
        return False
    return overlap(one.addresses, other.addresses)
