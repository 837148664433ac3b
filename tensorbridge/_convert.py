"""describe, decide, perform: the three verbs in a row."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tensorbridge import _casting, _device_lanes, _dtypes, _lanes, _options, _watch
from tensorbridge import _words as words
from tensorbridge._adapters import Adapter, adapter_of, as_it_is, import_all, named, performer
from tensorbridge._array import CPU, ArrayInfo, Traits
from tensorbridge._cuda import _stream_order, _streams
from tensorbridge._eager import is_inside
from tensorbridge._errors import BridgeError, UnsupportedArrayError
from tensorbridge._loaded import loaded
from tensorbridge._plan import decide
from tensorbridge._refuse import Obstacle, holder
from tensorbridge._roads import BOTH_WAYS
from tensorbridge._step import HERE, Decision, Here, Op, Plan, Want, bind


class Recipe(NamedTuple):
    """A decision for one kind of array, and the functions that perform it."""

    decision: Decision
    functions: tuple[Callable[..., Any], ...]  # none where it is only planned, or refused
    moves: bool  # any byte, so that a guard is asked
    by_torch: bool = False  # torch makes a copy, which a mode or a transform may keep from being written


class Case(NamedTuple):
    """A kind of array, what is wanted of it, and what was decided for that."""

    adapter: Adapter
    traits: Traits
    want: Want  # its device is one that exists
    recipe: Recipe

    def info(self, handle: Any) -> ArrayInfo:
        return self.adapter.describe(handle, self.traits)

    def plan(self, handle: Any) -> Plan:
        return bind(self.recipe.decision.steps, self.info(handle), self.want)


_recipes: dict[tuple[Traits, Want, Here], Recipe] = {}
_RECIPES_KEPT = 4096
WITH_TORCH = HERE._replace(torch=True)
WITH_THREADS = WITH_TORCH._replace(threads=True)
INTERCEPTED = WITH_TORCH._replace(intercepted=True)


def _process_of_threads() -> int:
    """The process in which torch, if it is here before us, was loaded; 0 where that may have been a parent's."""
    multiprocessing: Any = sys.modules.get("multiprocessing")
    child = multiprocessing is not None and multiprocessing.parent_process() is not None
    spawned = child and multiprocessing.get_start_method(allow_none=True) == "spawn"
    return 0 if "torch" in sys.modules and ((child and not spawned) or _was_forked()) else os.getpid()


def _was_forked() -> bool:
    """Whether this process is a copy of its parent, and has started no program since: where Linux says so."""
    try:
        with open("/proc/self/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return False
    return bool(flags & 0x40)  # PF_FORKNOEXEC


imported_in = _process_of_threads()
_lanes.in_child = imported_in == 0


def convert(x: Any, want: Want, out: Any = None) -> Any:
    handle, case = judged(x, want, out)
    recipe = case.recipe
    if _watch.watching and (recipe.moves or _watch.is_traced()):
        return _watch.perform(case.plan(handle), words.call(case.want), lambda: perform(recipe, handle, out))
    return perform(recipe, handle, out)


def planned(x: Any, want: Want, out: Any = None) -> Plan:
    handle, case = judged(x, want, out, planning=True)
    return case.plan(handle)


def judged(x: Any, want: Want, out: Any = None, *, planning: bool = False) -> tuple[Any, Case]:
    """An array opened and decided; what is not to be done is refused. A plan is also made for a device not here."""
    adapter, handle, traits, want = opened(x, want)
    if want.device is not None or want.pin_memory or want.framework == "cupy":
        want = _options.placed(want, traits, planning=planning)
    if out is not None and want.out is not None:
        _options.check_out(adapter.describe(handle, traits), adapter_of(type(out)).describe(out, want.out), want)
    here = moment(traits, want)
    recipe = _recipe(decide(traits, want, here)) if planning else recipe_for(traits, want, here)
    if recipe.decision.refusal is not None:
        raise words.refused(recipe.decision, adapter.describe(handle, traits), want)
    return handle, Case(adapter, traits, want, recipe)


def perform(recipe: Recipe, handle: Any, out: Any) -> Any:
    result = handle
    if out is None:
        for function in recipe.functions:
            result = function(result)
        return result
    for step, function in zip(recipe.decision.steps, recipe.functions, strict=True):
        result = function(result, out) if step.op == Op.FILL else function(result)
    return result


def opened(x: Any, want: Want, call: str = "") -> tuple[Adapter, Any, Traits, Want]:
    """The handle on which steps are performed (a foreign array is imported once, here), the facts, the settled wish."""
    adapter = adapter_of(type(x))
    try:
        return adapter, *adapter.open(x, want)
    except Obstacle as obstacle:
        text = f"{call or words.call(want)}: {obstacle.what} cannot be converted: {obstacle.why}."
        cure = obstacle.refusal.cure.replace("{framework}", want.framework)
        raise UnsupportedArrayError(f"{text}\n{cure}") from None
    except BridgeError as error:
        error.args = (f"{call or words.call(want)}: {error}",)
        raise


def described(x: Any, call: str = "describe") -> ArrayInfo:
    adapter, handle, traits, _ = opened(x, Want("numpy"), call)
    return adapter.describe(handle, traits)


def recipe_for(traits: Traits, want: Want, here: Here) -> Recipe:
    """The recipe of this kind of array; built once a kind."""
    found = _recipes.get((traits, want, here))
    if found is not None:
        return found
    decision = decide(traits, want, here)
    functions = () if decision.refusal is not None else compiled(decision.steps, traits, want, here)
    open_lanes()
    if len(_recipes) >= _RECIPES_KEPT:
        _recipes.clear()
    recipe = _recipes[traits, want, here] = _recipe(decision, functions)
    return recipe


def _recipe(decision: Decision, functions: tuple[Callable[..., Any], ...] = ()) -> Recipe:
    moving = [step for step in decision.steps if step.kind]
    return Recipe(decision, functions, bool(moving), any(step.by == "torch" for step in moving))


def compiled(steps: tuple[Any, ...], traits: Traits, want: Want, here: Here = HERE) -> tuple[Callable[..., Any], ...]:
    """One function a step: what it is given is what the step before it promised."""
    befores = [traits, *(step.after for step in steps)]
    functions = [performer(step, before, want) for step, before in zip(steps, befores, strict=False)]
    for i, step in enumerate(steps):
        if step.by != BOTH_WAYS:
            continue
        read = next(j for j in range(i, len(steps)) if steps[j].kind)
        if step.op == Op.IMPORT:
            whole = _given_back(functions[i : read + 1], befores[read])
            functions[i : read + 1] = [*([as_it_is] * (read - i)), whole]
        else:
            functions[read] = _ordered_back(functions[read], steps[i + 1].after.framework, befores[i])
    if here.intercepted:
        torch: Any = named("torch")
        seen_by_torch = steps[0].op == Op.IMPORT and steps[0].after.framework == "torch"  # a tensor of no mode's
        for i, step in enumerate(steps):
            if seen_by_torch or want.framework != "torch" or step.after.framework == "numpy" or step.op == Op.FILL:
                functions[i] = torch.outside(functions[i])
    return tuple(functions)


def _ordered_back(reads: Callable[..., Any], reader: str, lent: Traits) -> Callable[..., Any]:
    def run(*arrays: Any) -> Any:
        result = reads(*arrays)
        _stream_order.order(reader, lent.framework, lent.device.index)
        return result

    return run


def _given_back(functions: Sequence[Callable[..., Any]], read: Traits) -> Callable[..., Any]:
    """From the import of a foreign array to the step that reads it: then the stream that its producer named waits."""

    def run(x: Any, *out: Any) -> Any:
        *earlier, reads = functions
        result = x
        for function in earlier:
            result = function(result)
        result = reads(result, *out)
        if x.stream is not None:
            index = read.device.index
            _stream_order.link(_streams.current(read.framework, index), x.stream, index)
        return result

    return run


def open_lanes() -> None:
    if _lanes._Tensor is None:
        tensor = getattr(loaded("torch"), "Tensor", None)
        if tensor is None:
            return
        _lanes.open(adapter_of(tensor))
    if _device_lanes._Tensor is None and loaded("cupy"):
        _device_lanes.open(adapter_of(_lanes._Tensor), named("cupy"))


def import_ahead() -> None:
    """What conversions import when they first need it, by who is about to start a thread. One that imports while the
    process forks leaves the child a lock that nobody opens again: the child's own import would wait for good.
    """
    import_all()
    open_lanes()


# Sizes and dtypes of arrays that may have the 32 768 elements from which on torch uses threads.
_THREADED_SIZES = frozenset({"medium", "large", "huge", "beyond"})
_THREADED_DTYPES = frozenset(name for name, row in _dtypes.DTYPES.items() if row.itemsize == 1)


def _starts_threads() -> bool:
    """Whether torch would use threads, which are OpenMP's."""
    torch = loaded("torch")
    return torch is not None and bool(torch.get_num_threads() > 1)


def has_lost_threads() -> bool:
    """Whether torch would wait for threads that a forked process does not have."""
    return os.getpid() != imported_in and _starts_threads()


def waits_for_threads(traits: Traits) -> bool:
    """Whether it would, to copy an array of this kind."""
    return (traits.size in _THREADED_SIZES or traits.dtype in _THREADED_DTYPES) and has_lost_threads()


def has_threads() -> bool:
    """Whether torch's threads may share a huge copy: not where it is done beside other work, by another thread, nor
    where fewer cores are idle than there are threads. One that has to wait for a core holds up all of them.
    """
    if not _starts_threads() or threading.current_thread() is not threading.main_thread():
        return False
    free: int = (os.cpu_count() or 1) - (loaded("torch").get_num_threads() - 1)  # for this thread and what else runs
    return _busy_cores() <= free or _busy_cores() - _waiting_workers() <= free


def _busy_cores() -> int:
    """How many threads of all processes are running at this moment, where Linux says so; else this one alone."""
    try:
        return int(_told("/proc/loadavg").split()[3].partition(b"/")[0])
    except (OSError, ValueError, IndexError):
        return 1


def _waiting_workers() -> int:
    """How many running threads of this process are none of Python's: torch's own, which spin for a while after each
    task, and are about to share the copy. They do so all together: of many, a few are asked.
    """
    known = {str(thread.native_id) for thread in threading.enumerate()}
    with contextlib.suppress(OSError):  # a thread that has just ended
        others = sorted(set(os.listdir("/proc/self/task")) - known)
        asked = others[:: len(others) // _ASKED + 1]
        running = [task for task in asked if _told(f"/proc/self/task/{task}/stat").rpartition(b") ")[2][:1] == b"R"]
        return len(others) * len(running) // max(len(asked), 1)
    return 0


_ASKED = 8


def _told(path: str) -> bytes:
    """What a short file of the kernel says: in less than half the time of one opened as Python's."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 1024)
    finally:
        os.close(file)


def is_intercepted() -> bool:
    """Whether a mode or a transform answers for torch: its kernels may write nothing, and tensors have no memory."""
    open_lanes()
    return bool(_lanes._intercepted())


def moment(traits: Traits, want: Want) -> Here:
    """Facts of the moment, read once per call. On the host it is most often one of two constants."""
    on_host = WITH_TORCH if want.framework == "torch" or loaded("torch") else HERE
    if on_host is WITH_TORCH and is_intercepted():
        on_host = INTERCEPTED
    if waits_for_threads(traits):
        on_host = on_host._replace(worker=True)
    elif traits.size == "huge" and on_host is WITH_TORCH and has_threads():
        on_host = WITH_THREADS
    if on_host.torch and _casting.is_heard():
        on_host = on_host._replace(heard=True)
    if is_inside():
        on_host = on_host._replace(compiled=True)
    lies_there = traits.device != CPU and traits.device.is_cuda
    if not lies_there and (want.device is None or not want.device.is_cuda):
        pins = want.pin_memory and _streams.usable("torch") and not _streams.forked()
        return on_host._replace(capturing=_streams.capturing()) if pins else on_host
    forked = _streams.forked()
    if forked or (not lies_there and not _streams.usable(want.framework)):
        return on_host._replace(forked=forked)
    sides = {holder(traits, want, HERE), want.framework}
    crosses = sides == {"torch", "cupy"} and all(map(loaded, sides))
    index = traits.device.index if lies_there else 0
    lent = crosses or (traits.framework != "cupy" and "cupy" in sides and lies_there)
    return Here(
        same_stream=not (crosses and _streams.usable("torch")) or _streams.same(index),
        capturing=_streams.capturing(),
        gpu=_streams.mover(),
        torch=loaded("torch") is not None,
        intercepted=on_host.intercepted,
        heard=on_host.heard,
        per_thread=lent and _streams.usable("cupy") and _streams.current("cupy", index) == _streams.PER_THREAD_DEFAULT,
    )
