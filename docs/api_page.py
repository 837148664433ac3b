"""Writes docs/api.md, the reference, from the public signatures and docstrings, so that none of it is from memory.

python docs/api_page.py            after a signature or a docstring has changed
python docs/api_page.py --check    say whether the page is what they give
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorbridge as tb
from tensorbridge import _events
from tensorbridge._autograd import _graph
from tensorbridge._commands import _info, _matrix

PAGE = Path(__file__).with_name("api.md")
GROUPS = {
    "Convert": "to_numpy to_torch to_cupy",
    "Look before you pay": "plan describe shares_memory info",
    "Forbid and record": "copy_guard trace",
    "Trees and batches": "tree.to_numpy tree.to_torch tree.to_cupy tree.plan collate prefetch",
    "Gradients": "editing autograd_graph",
    "On the GPU": "to_numpy_async use_stream used_on share_memory_pool",
    "Errors and warnings": "BridgeError CopyRequiredError GraphError UnsupportedArrayError DeviceError "
    "MissingFrameworkError ProducerError CopyWarning",
    "What comes back": "Plan Step ArrayInfo Traits Device Info Trace Event tree.TreePlan tree.LeafPlan tree.LeftPart "
    "Prefetch Graph Transfer",
}
NAMES = [name for names in GROUPS.values() for name in names.split()]
# Records that are reached through others, and told with them.
PARTS: dict[str, tuple[type, ...]] = {
    "Info": (_info.Framework, _matrix.Cell),
    "Trace": (_events.Totals,),
    "Graph": (_graph.Node, _graph.Edge, _graph.Saved),
}
OPTIONS = {
    "copy": """None shares where no promise is broken, and copies once where one would be. False raises
        `CopyRequiredError` rather than move a byte: so no cast of an array, no other device, no `out`. True gives fresh
        memory, and leaves `share_readonly` nothing to do.""",
    "dtype": """None keeps the dtype of `x`; a cast of an array is a copy. One for every array, or a mapping from what
        an array has to what it gets: `{"float64": "float32"}` leaves what is not float64 as it is. A key is a dtype or
        a kind of the array API standard ("bool", "signed integer", "unsigned integer", "integral", "real floating",
        "complex floating", "numeric", or NumPy's `np.floating` and the like); a dtype counts before a kind, and of two
        kinds the first. bfloat16 and float8 are "real floating" too. What is made of several arrays, a list of them or
        a table, is cast part by part, and has to come to one dtype. Beside `out` leave it out: the dtype of `out`
        counts.""",
    "device": """None is where `x` is; for `to_cupy` and host memory, the current device. Beside `out` leave it out.
        `to_numpy` always gives host memory.""",
    "writable": """Only NumPy arrays can be read-only, so only `to_numpy` has it. None is as writable as is safe. True
        copies what must not be written, but shares a tensor that requires grad: you promise to change nothing that a
        backward needs. False gives a read-only view, of a copy too.""",
    "share_readonly": """torch and CuPy have no read-only arrays, so what must not be written is copied for them. True
        shares it: you promise that nothing will write. `copy=False` refuses such memory without it.""",
    "detach": """True in `to_numpy` and `to_cupy`, since an array cannot carry an autograd graph: False asks for an
        error instead. False in `to_torch`, since a tensor can: the result, or `out`, is part of the graph, unless you
        say True or ask for a `dtype` without gradients.""",
    "pin_memory": """The result lies in page-locked host memory, which torch has where it sees a CUDA device. So it goes
        with neither a CUDA `device` nor `out`, and is a copy unless `x` is page-locked already.""",
    "non_blocking": """From the host to a device, the call may return before `x` has been read: leave `x` alone until
        then. What comes to the host is waited for all the same; `to_numpy_async` is for that.""",
    "out": """Filled and returned: always a copy, into memory that you have. It decides dtype and device, and goes with
        neither `copy=False` nor `pin_memory`.""",
}
HEAD = """
# API reference

<!-- Written by docs/api_page.py from signatures and docstrings: change those, and run it. -->

Every public name, in the words of its docstring. Functions of `tree` are called as `tensorbridge.tree.to_torch(batch)`.
[sources.md](sources.md) lists what can be converted beside arrays of NumPy, torch and CuPy. *Cost* says which bytes
move and what is waited for. The examples are run by the tests, but for those that need a GPU.

## Which function do I want?
"""
OPTIONS_HEAD = (
    "All are given by keyword; the table has their defaults. `plan` and `tree.plan` take those of the function whose "
    "steps they show. The functions of `tree` have one more, `pack`."
)


def found(name: str) -> Any:
    return getattr(tb.tree, name[5:]) if name.startswith("tree.") else getattr(tb, name)


def is_type(name: str) -> bool:
    return name.removeprefix("tree.")[0].isupper()


def heading(name: str) -> str:
    return f"class {name}" if is_type(name) else name  # `plan` and `Plan` would have one anchor


def link(name: str, text: str = "") -> str:
    anchor = re.sub(r"[^\w -]", "", heading(name).lower()).replace(" ", "-")  # as GitHub makes it
    return f"[`{text or name}`](#{anchor})"


def linked(text: str, own: str = "") -> str:
    """Public names in single backticks lead to their entries, but for the entry's own name and parameters."""
    known = {own, *(inspect.signature(found(own)).parameters if own and not is_type(own) else ())}

    def lead(match: re.Match[str]) -> str:
        name = match[2].removeprefix("tensorbridge.")
        return link(name, match[2]) if len(match[1]) == 1 and name in {*NAMES} - known else f"`{match[2]}`"

    return re.sub(r"(``?)([^`]+)\1", lead, text)


def filled(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, 120, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def standing_alone(session: str, own: str) -> str:
    """With the imports that a docstring takes for granted, after those that it has."""
    code = ast.parse("".join(example.source for example in doctest.DocTestParser().get_examples(session)))
    used: set[str] = set()
    made: set[str] = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Name):
            (made if isinstance(node.ctx, ast.Store) else used).add(node.id)
        elif isinstance(node, ast.Import):
            made |= {alias.asname or alias.name for alias in node.names}
    home = tb.tree if own.startswith("tree.") else tb
    ours = ", ".join(sorted((used - made) & {*home.__all__}))
    lines = [">>> import numpy as np"] * ("np" in used - made) + session.splitlines()
    first = next(n for n, line in enumerate(lines) if not line.startswith(">>> import "))
    return "\n".join([*lines[:first], *[f">>> from {home.__name__} import {ours}"] * bool(ours), *lines[first:]])


def prose(text: str, own: str) -> Iterator[str]:
    """Paragraphs, sessions and literal blocks."""
    for part in re.split(r"\n\n+", text):
        if part.startswith(">>>"):
            yield f"```pycon\n{standing_alone(part, own)}\n\n```"
        elif part.startswith("    "):
            code = re.sub(" +#", "  #", textwrap.dedent(part))  # as ruff formats what stands in a page
            yield f"```python\n{code}\n```"
        elif part != "::":
            yield filled(linked(re.sub("::$", ":", part), own))


def item(section: str, text: str, own: str) -> str:
    """A parameter, an error or a result, and below it what is said of it."""
    title, _, body = text.partition("\n")
    if section == "Returns":
        types = {name.removeprefix("tree."): name for name in NAMES if is_type(name)}
        title = re.sub(r"\w+", lambda word: link(types[word[0]]) if word[0] in types else word[0], linked(title, own))
    else:
        names, colon, kind = title.partition(" : ")
        title = ", ".join(link(n) if n in NAMES and section == "Raises" else f"`{n}`" for n in names.split(", "))
        title += colon.strip() and ": " + linked(kind, own)
    lines = [filled(title, "* ", "  "), *([filled(linked(textwrap.dedent(body), own), "  ", "  ")] if body else [])]
    return "\\\n".join(lines)


def docstring(value: object, own: str) -> Iterator[str]:
    about, *sections = re.split(r"^(\w+)\n-+\n", inspect.getdoc(value) or "", flags=re.MULTILINE)
    yield from prose(about.strip(), own)
    for section, body in zip(sections[::2], sections[1::2], strict=True):
        yield f"**{section}**"
        if section in ("Parameters", "Returns", "Raises"):
            yield "\n".join(item(section, text, own) for text in re.split(r"\n(?=\S)", body.strip()))
        else:
            yield from prose(body.strip("\n"), own)


def signature(function: Any, name: str) -> str:
    """Names and defaults; the docstring says the types."""
    shown = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values() if p.name != "self"]
    text = f"{name}{inspect.Signature(shown)}".replace("'", '"')
    return textwrap.fill(text, 100, subsequent_indent="    ", break_on_hyphens=False)


def members(cls: type, name: str) -> Iterator[str]:
    """The fields of a record, with the comments beside them or above; the documented methods and the properties."""
    above, items = "", []
    source = inspect.getsource(cls).split("    def ")[0] if hasattr(cls, "_fields") else ""
    for line in source.splitlines() or [f"    {key}: {kind}" for key, kind in inspect.get_annotations(cls).items()]:
        match = re.fullmatch(r"    (\w+: .+?)(?: = .+?)?(?:  # (.+))?", line)
        if match:
            said = f"{above} {match[2] or ''}".strip()
            items.append(filled(f"`{match[1]}`" + (f": {linked(said)}" if said else ""), "* ", "  "))
        above = f"{above} {line[6:]}" if line.startswith("    # ") else ""
    yield "\n".join(items)
    for key, value in vars(cls).items():
        if isinstance(value, property):
            yield f"**`{name}.{key}`**: `{inspect.signature(value.fget).return_annotation}`"  # type: ignore[arg-type]
        elif inspect.isfunction(value) and key[0] != "_" and value.__doc__:
            yield f"**`{signature(value, f'{name}.{key}')}`**"
            yield from docstring(value, name)


def entry(name: str) -> Iterator[str]:
    value = found(name)
    yield f"### {heading(name)}"
    if not is_type(name):
        yield f"```python\n{signature(value, name)}\n```"
    elif issubclass(value, Exception):
        yield f"```python\nclass {name}({', '.join(base.__name__ for base in value.__bases__)})\n```"
    yield from docstring(value, name)
    if is_type(name):
        yield from members(value, name.removeprefix("tree."))
    for part in PARTS.get(name, ()):
        yield f"**`{part.__name__}`**"
        if not (part.__doc__ or "").startswith(part.__name__):  # what NamedTuple makes up where there is none
            yield from docstring(part, name)
        yield from members(part, part.__name__)


def index() -> Iterator[str]:
    yield "| purpose | function | what it does |\n|---|---|---|"
    for title, names in GROUPS.items():
        for number, name in enumerate(() if is_type(names) else names.split()):
            said = (inspect.getdoc(found(name)) or "").partition("\n")[0].replace("``", "`")
            yield f"| {'' if number else title} | {link(name)} | {said} |"
    for title, names in GROUPS.items():
        if is_type(names):
            yield "\n" + filled(f"{title}: {', '.join(map(link, names.split()))}.")


def options() -> Iterator[str]:
    """Which function has which; those that agree in all of them share a column."""
    yield filled(linked(OPTIONS_HEAD)) + "\n"
    columns: dict[tuple[str, ...], list[str]] = {}
    for name in NAMES:
        has = {} if is_type(name) else inspect.signature(found(name)).parameters
        cells = tuple(f"`{has[option].default!r}`" if option in has else "" for option in OPTIONS)
        if any(cells):
            columns.setdefault(cells, []).append(link(name))
    yield f"| | {' | '.join(', '.join(names) for names in columns.values())} |\n|---{'|---' * len(columns)}|"
    for option, row in zip(OPTIONS, zip(*columns, strict=True), strict=True):
        yield f"| `{option}` | {' | '.join(row)} |"
    yield ""
    yield from (filled(f"`{option}`: {linked(' '.join(said.split()))}", "* ", "  ") for option, said in OPTIONS.items())


def page() -> str:
    """Raises LookupError where a public name has no place, or a place no public name."""
    public = {*tb.__all__, *(f"tree.{name}" for name in tb.tree.__all__)} - {"tree"}
    if public != {*NAMES}:
        raise LookupError(f"in GROUPS or in `__all__`, not in both: {public ^ {*NAMES}}")
    parts = [HEAD.strip(), "\n".join(index()), "## Options of the conversions", "\n".join(options())]
    for title, names in GROUPS.items():
        parts += [f"## {title}", *(part for name in names.split() for part in entry(name) if part)]
    return "\n\n".join(parts) + "\n"


def main(check: bool) -> int:
    text = page()
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    if stale and not check:
        PAGE.write_text(text, encoding="utf-8")
    said = ("not what the docstrings give: " if check else "written: ") + PAGE.name
    print(said if stale else "as the docstrings say")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
