"""Pictures of a graph: a table, mermaid, DOT, and SVG in which nothing overlaps; folded where there is too much."""

from __future__ import annotations

import itertools
import random
import re
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from tensorbridge._autograd import _picture, _svg
from tensorbridge._autograd._graph import autograd_graph


def square():
    """The graph of the documentation: ``x @ w``, squared, summed."""
    x, w = torch.ones(4, 3), torch.ones(3, 2, requires_grad=True)
    y = x @ w
    z = (y**2).sum()
    return autograd_graph(z)


# ---------------- terminal


def test_the_table_of_the_seed_question_reads_well():
    assert str(square()).splitlines() == [
        "z: torch float32 () on cpu, made by 3 operations from 1 leaf",
        "#  node          result             from  saved for backward",
        "0  leaf          w: float32 (3, 2)",
        "1  MmBackward0   y: float32 (4, 2)  0     self: x (4, 3)",
        "2  PowBackward0  float32 (4, 2)     1     self: y (4, 2)",
        "3  SumBackward0  z: float32 ()      2",
        "4  the tensor    z: float32 ()      3",
        "   - - - to_numpy would cut here: no gradient comes back - - -",
        "5  NumPy array   float32 ()         4     the memory of the tensor *",
        "* shares memory with the NumPy array: a write to the array changes it",
    ]
    assert repr(square()) == "<Graph: z: torch float32 () on cpu, made by 3 operations from 1 leaf>"


# ---------------- mermaid, DOT


def awkward():
    """Names that every format has to escape."""
    names = ['a"<b>&`c`#1;\\n]-->', "权重", "x\x00\x1b\u202e", "long" * 40]
    table = {name: torch.ones(3, requires_grad=True) for name in names}
    module = torch.nn.Module()
    module.register_parameter('x\x00\x1b\ud800"', torch.nn.Parameter(torch.ones(3)))
    return autograd_graph((sum(table.values()) + next(module.parameters())).exp())


def test_mermaid_declares_every_node_once_and_links_them():
    text = square().to_mermaid()
    assert text.splitlines()[:4] == [
        "---",
        'title: "z: torch float32 () on cpu, made by 3 operations from 1 leaf"',
        "---",
        "flowchart TD",
    ]
    assert re.findall(r"^  n(\d+)\[", text, re.M) == list("012345")
    assert re.findall(r"^  n(\d+) .*> n(\d+)$", text, re.M) == [
        ("0", "1"),
        ("1", "2"),
        ("2", "3"),
        ("3", "4"),
        ("4", "5"),
    ]
    assert 'n4 -. "to_numpy would cut here" .-> n5' in text


def test_mermaid_labels_hold_no_character_that_mermaid_reads():
    for label in re.findall(r'\["(.*)"\]:::', awkward().to_mermaid()):
        assert not set('"`\\') & set(label.replace("<br/>", ""))
        assert "<" not in label.replace("<br/>", "")


def test_dot_strings_are_closed_where_they_should_be():
    text = awkward().to_dot()
    for line in text.splitlines():
        assert line.isprintable()
        assert len(re.findall(r'(?<!\\)(?:\\\\)*"', line)) % 2 == 0
    assert re.findall(r"^  n(\d+) \[", text, re.M) == [str(n) for n in range(len(awkward().nodes))]


# ---------------- SVG

SVG = "{http://www.w3.org/2000/svg}"


def boxes_of(root):
    """(left, top, right, bottom) of every box."""
    found = []
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("rx"):
            x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
            found.append((x, y, x + w, y + h))
    return found


CURVE = re.compile(r"M(N) (N)V(N)C(N) (N) (N) (N) (N) (N)V(N)".replace("N", r"[-\d.]+"))


def curves_of(root):
    """The ten numbers of every link between two layers."""
    matches = (CURVE.fullmatch(path.get("d")) for path in root.iter(f"{SVG}path"))
    return [tuple(map(float, match.groups())) for match in matches if match]


def assert_is_clean(svg):
    """No box overlaps another, no text leaves its box, no link crosses a box, nothing leaves the picture."""
    root = ElementTree.fromstring(svg)
    left, top, width, height = map(float, root.get("viewBox").split())
    assert (left, top) == (0, 0)
    background = root.find(f"{SVG}rect")
    assert (background.get("fill"), background.get("width")) == ("#ffffff", root.get("width"))
    group = root.find(f"{SVG}g")
    shift = float(re.match(r"translate\(([-\d.]+) 0\)", group.get("transform"))[1])
    boxes = boxes_of(group)
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1], (one, other)
    for x1, y1, x2, y2 in boxes:
        assert x1 + shift > 0
        assert x2 + shift < width
        assert y1 > 0
        assert y2 < height
    for text in root.iter(f"{SVG}text"):
        half = _svg._width(text.text) / 2
        x, y = float(text.get("x")), float(text.get("y"))
        if text.get("text-anchor") == "middle":
            assert any(x1 <= x - half and x + half <= x2 and y1 < y < y2 for x1, y1, x2, y2 in boxes), text.text
        else:
            assert x + 2 * half <= width, text.text
    for x1, y1, y2, _, _, _, _, x3, y3, y4 in curves_of(root):
        sides = sorted((x1, x3))
        for bx1, by1, bx2, by2 in boxes:  # upright, sideways within a gap, upright
            assert not (bx1 < x1 < bx2 and y1 < by2 - 0.2 and y2 > by1 + 0.2)
            assert not (bx1 < x3 < bx2 and y3 < by2 - 0.2 and y4 > by1 + 0.2)
            assert not (sides[0] < bx2 and sides[1] > bx1 and y2 < by2 - 0.2 and y3 > by1 + 0.2)
    return root


def words_of(svg):
    return " ".join(text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text"))


def residual():
    conv, norm = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)
    image = torch.randn(1, 3, 8, 8)
    h = conv(image)
    return autograd_graph((h + conv(torch.relu(norm(h))) * torch.sigmoid(h.mean())).relu())


def transformer():
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    return autograd_graph(model(torch.randn(2, 5, 16)).sum())


def many_leaves(count=40):
    return autograd_graph(torch.stack([torch.ones(3, requires_grad=True) for _ in range(count)]).sum())


GRAPHS = {
    "square": square,
    "residual": residual,
    "transformer": transformer,
    "many leaves": many_leaves,
    "awkward names": awkward,
    "one leaf": lambda: autograd_graph(torch.ones(3, requires_grad=True)),
    "nothing": lambda: autograd_graph(torch.ones(3)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GRAPHS)
def test_in_the_svg_nothing_overlaps_and_nothing_is_cut_off(name):
    assert_is_clean(GRAPHS[name]()._repr_svg_())


@pytest.mark.parametrize("seed", range(25))
def test_in_the_svg_of_a_random_graph_nothing_overlaps(seed):
    chance = random.Random(seed)
    count = chance.randrange(2, 60)
    boxes = [
        _svg.Box("op", (("w" * chance.randrange(1, 30), "title"), *[("plain", "plain")] * chance.randrange(0, 6)))
        for _ in range(count)
    ]
    links = []
    for target in range(1, count):
        for source in chance.sample(range(target), min(target, chance.choice((0, 1, 1, 1, 2, 3)))):
            links.append(_svg.Link(max(source, target - chance.choice((1, 2, 30))), target, 0, False))
    svg = _svg.draw(boxes, links, "random", ["caption"], ["above", "below"])
    assert len(boxes_of(assert_is_clean(svg).find(f"{SVG}g"))) == count


def test_the_trunk_is_drawn_straight_and_its_parameters_stand_beside_it():
    model = torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(3, 3), torch.nn.Tanh())])
    trunks = (
        (autograd_graph(model(torch.ones(2, 3))), ("AddmmBackward0", "TanhBackward0")),
        (ladder(20), ("MulBackward0", "TanhBackward0")),
    )
    for graph, trunk in trunks:
        root = assert_is_clean(graph._repr_svg_())
        places = {text.get("x") for text in root.iter(f"{SVG}text") if text.text in trunk}
        assert len(places) == 1
        assert len(curves_of(root)) == len(graph.edges)  # every link from one layer to the next


def test_a_link_over_many_layers_is_one_straight_line_beside_the_boxes():
    for graph in (residual(), transformer()):
        root = assert_is_clean(graph._repr_svg_())
        ends = {round(bottom, 1) for _, _, _, bottom in boxes_of(root.find(f"{SVG}g"))}
        tips = {path.get("d").split("h")[0] for path in root.iter(f"{SVG}path") if path.get("d").endswith("z")}
        lanes = 0
        for x1, y1, _, _, _, _, _, x3, _, y4 in curves_of(root):
            into_box = f"M{x3 - 3.5:.1f} {y4 - 2:.1f}" in tips
            if not into_box and round(y1, 1) not in ends:
                lanes += 1
                assert x1 == x3
        assert lanes


def test_many_leaves_of_one_operation_stand_in_rows():
    width = float(many_leaves(40)._repr_svg_().split('viewBox="0 0 ')[1].split()[0])
    assert width < 5000


def test_the_svg_says_what_the_graph_says():
    words = words_of(square()._repr_svg_())
    cut = ("to_numpy would cut here", "no gradient comes back", "NumPy array")
    for part in ("MmBackward0", "saved self: x (4, 3)", *cut):
        assert part in words
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    assert "● saved result: y (3,)" in words_of(autograd_graph(y)._repr_svg_())
    assert "No autograd graph" in words_of(autograd_graph(torch.ones(1))._repr_svg_())


def test_the_same_graph_gives_the_same_picture():
    assert square()._repr_svg_() == square()._repr_svg_()
    assert square() == square()


# ---------------- folding


def chain(length):
    w = torch.ones(3, requires_grad=True)
    t = w
    for _ in range(length):
        t = t * 1.5
    return autograd_graph(t.sum())


def ladder(length):
    steps = [torch.ones(3, requires_grad=True) for _ in range(length)]
    t = steps[0]
    for w in steps[1:]:
        t = (t * w).tanh()
    return autograd_graph(t.sum())


def dense(length):
    """Everything feeds everything."""
    outs = [torch.ones(1, requires_grad=True)]
    for _ in range(length):
        outs.append(torch.cat(outs).sum())
        outs[-1] = outs[-1].reshape(1)
    return autograd_graph(outs[-1])


def test_a_chain_of_ten_thousand_nodes_is_folded_says_so_and_hangs_nothing():
    start = time.perf_counter()
    graph = chain(10_000)
    pictures = [graph._repr_svg_(), graph.to_mermaid(), graph.to_dot(), str(graph)]
    assert time.perf_counter() - start < 5
    assert len(graph.nodes) == 10_004
    for picture in pictures:
        assert "… 9 997 nodes" in picture
        assert len(picture) < 20_000
    assert "Folded: 9 997 of 10 004 nodes" in words_of(pictures[0])
    root = assert_is_clean(pictures[0])
    assert len(boxes_of(root.find(f"{SVG}g"))) == 8


FOLDED = {
    "a ladder of leaves": lambda: ladder(1500),
    "many leaves": lambda: many_leaves(4000),
    "everything feeds everything": lambda: dense(60),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_has_no_chains_is_folded_between_its_beginning_and_its_end(name):
    graph = FOLDED[name]()
    start = time.perf_counter()
    boxes, links, note = _picture.sketch(graph)
    svg = graph._repr_svg_()
    assert time.perf_counter() - start < 3
    assert len(boxes) <= _picture.LIMIT
    assert note.startswith("Folded: ")
    assert all(link.source < link.target for link in links)
    assert boxes[0].kind == "leaf"
    assert [box.kind for box in boxes[-2:]] == ["output", "numpy"]
    assert_is_clean(svg)


def test_some_hundred_nodes_are_drawn_whole():
    graph = ladder(90)
    boxes, _, note = _picture.sketch(graph)
    assert 200 < len(boxes) == len(graph.nodes)
    assert note == ""


def test_a_fold_tells_what_is_in_it_and_every_node_is_in_one_box():
    graph = ladder(1500)
    box_of, members = _picture._fold(graph, _picture.LIMIT)
    assert [node.id for group in members for node in group] == list(range(len(graph.nodes)))
    assert len(box_of) == len(graph.nodes)
    (fold,) = [box for box in _picture.sketch(graph).boxes if box.kind == "fold"]
    words = " ".join(text for text, _ in fold.lines)
    assert "of them leaves" in words
    assert "TanhBackward0" in words


# ---------------- save


@pytest.mark.parametrize(
    ("name", "begins"), [("g.svg", "<svg "), ("g.mmd", "---\ntitle"), ("g.dot", "digraph"), ("G.SVG", "<svg ")]
)
def test_save_writes_what_the_suffix_says(name, begins, tmp_path):
    graph = awkward()
    graph.save(tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(begins)
    graph.save(str(tmp_path / name))


@pytest.mark.parametrize("name", ["g.png", "g", "svg", ".svg"])
def test_save_with_another_suffix_is_refused_with_the_three_that_work(name, tmp_path):
    with pytest.raises(ValueError, match=r"\.svg, \.mmd or \.dot"):
        square().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_to_a_place_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        square().save(tmp_path / "nowhere" / "g.svg")
