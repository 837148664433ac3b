"""Memory of decisions: what was converted before, by its kind and in the same words, is done by the same recipe.

Only plain arrays on the host, and only once torch is there: then a decision rests on no more of the moment than is
asked here (forks, threads, modes, `np.errstate`). The kind of an array is its `Traits`, told by its adapter in a few
questions; options are taken as the caller wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from tensorbridge import _casting, _convert, _dtypes, _lanes, _options, _watch
from tensorbridge._adapters import adapter_of
from tensorbridge._array import CPU, Traits
from tensorbridge._eager import eager
from tensorbridge._step import Want

_F = TypeVar("_F", bound=Callable[..., Any])
_Recipes = dict[Any, _convert.Recipe]  # by what `_key` says

_quick_traits: dict[type, Callable[[Any], Traits | None]] = {}  # of the types that have plain arrays
_asked: dict[tuple[Any, ...], _Recipes | None] = {}  # by the options in the caller's words; None: leads off the host
_leaves: dict[Want, _Recipes] = {}  # of trees, by what was wanted
_NOTHING: _Recipes = {}
_borrowed: Callable[[Any], Any] = lambda x: x  # a tensor's memory as an array
_address: Callable[[Any], int]
_WORDS: set[type] = {bool, type(None), str, type, *map(type, _dtypes.OF_NUMPY)}  # types of options that may be a key
_KEPT = 1024


def remembering(full: _F) -> _F:
    """A memory in front of a public function."""
    framework = full.__name__.removeprefix("to_")

    @wraps(full)
    def convert_again(x: Any, **options: Any) -> Any:
        tell = _quick_traits.get(type(x))
        if tell is None:
            result = full(x, **options)
            if not _quick_traits and _lanes._Tensor is not None:
                _open()
            return result
        out = options.get("out")
        if out is None:
            written: list[Any] = []
            for value in options.values():
                if type(value) not in _WORDS:
                    if type(value) is not dict or not {*map(type, value), *map(type, value.values())} <= _WORDS:
                        return full(x, **options)
                    value = tuple(value.items())
                written.append(value)
            words = (framework, *options, *written)
        else:
            filled = _traits_of_out(out, x) if len(options) == 1 else None
            if filled is None:
                return full(x, **options)
            words = (framework, filled)
        recipes = _asked.get(words, _NOTHING)
        if recipes is None:
            return full(x, **options)
        traits = tell(x)
        recipe = recipes.get(_key(traits))
        watched = _watch.watching and (recipe is None or recipe.moves or _watch.is_traced())
        if (
            recipe is None
            or traits is None
            or watched
            or _convert.waits_for_threads(traits)
            or (recipe.by_torch and _may_be_otherwise())
            or not (out is None or _are_apart(x, traits, out))
        ):
            result = full(x, **options)
            joined = out is not None and traits is not None and traits.graph  # out, now in that graph
            if recipe is None and traits is not None and not joined:
                _remember(words, options, traits)
            return result
        if len(recipe.functions) == 1 and out is None:
            return recipe.functions[0](x)
        return _convert.perform(recipe, x, out)

    return eager(convert_again)  # type: ignore[return-value]


def again(want: Want, leaves: Sequence[Any]) -> list[_convert.Recipe] | None:
    """How each of these is converted, if all that was decided before, and no two that move are one memory. None: that
    takes a closer look.
    """
    recipes = _leaves.get(want)
    if not recipes or len(set(map(id, leaves))) < len(leaves):
        return None
    found: list[_convert.Recipe] = []
    moving: list[Any] = []
    for x in leaves:
        tell = _quick_traits.get(type(x))
        traits = None if tell is None else tell(x)
        recipe = recipes.get(_key(traits))
        if traits is None or recipe is None or _convert.waits_for_threads(traits):
            return None
        found.append(recipe)
        if recipe.moves:
            moving.append(x)
    if _may_be_otherwise() and any(recipe.by_torch for recipe in found):
        return None
    apart = all(type(x) is np.ndarray and x.base is None for x in moving)  # as arrays that own their memory are
    return found if apart or len(set(map(_address, moving))) == len(moving) else None


def remember_leaves(want: Want, leaves: Sequence[Any]) -> None:
    """Keep how these were converted, where `again` did not know it."""
    if want.framework == "cupy" or want.device not in (None, CPU) or want.pin_memory:
        return
    if not _quick_traits and _lanes._Tensor is not None:
        _open()
    if len(_leaves) >= _KEPT:
        _leaves.clear()
    recipes = _leaves.setdefault(want, {})
    for x in leaves:
        tell = _quick_traits.get(type(x))
        traits = None if tell is None else tell(x)
        if traits is not None and _key(traits) not in recipes:
            _keep(recipes, want, traits)


def fills(framework: str, sources: Sequence[Any], outs: Sequence[Any]) -> list[_convert.Recipe] | None:
    """How each of `outs` is filled, if all that was decided before, and none of them has a byte in common with another
    array. None: that takes a closer look.
    """
    found: list[_convert.Recipe] = []
    spans: list[tuple[int, int, bool]] = []
    for x, out in zip(sources, outs, strict=True):
        tell = _quick_traits.get(type(x))
        filled = None if tell is None else _traits_of_out(out, x)
        recipes = None if filled is None else _asked.get((framework, filled))
        traits = tell(x) if recipes and tell is not None else None
        if traits is None or traits.spacing != "dense" or _convert.waits_for_threads(traits):
            return None
        recipe = recipes.get(_key(traits)) if recipes else None
        if recipe is None:
            return None
        found.append(recipe)
        read, written = _address(x), _address(out)
        spans += (read, read + x.nbytes, False), (written, written + out.nbytes, True)
    if _may_be_otherwise() and any(recipe.by_torch for recipe in found):
        return None
    return found if _no_write_meets(spans) else None


def _no_write_meets(spans: list[tuple[int, int, bool]]) -> bool:
    """Of memory from an address to another, and whether it is written."""
    last_written = last_read = 0  # where what was written so far ends, and what was read
    for start, end, written in sorted(spans):
        if start < last_written or (written and start < last_read):
            return False
        if written:
            last_written = end
        elif end > last_read:
            last_read = end
    return True


def remember_fills(framework: str, sources: Sequence[Any], outs: Sequence[Any]) -> None:
    """Keep how these were filled, where `fills` did not know it."""
    if not _quick_traits and _lanes._Tensor is not None:
        _open()
    for x, out in zip(sources, outs, strict=True):
        tell = _quick_traits.get(type(x))
        filled = None if tell is None else _traits_of_out(out, x)
        traits = None if filled is None or tell is None else tell(x)
        if traits is not None and not traits.graph and _key(traits) not in (_asked.get((framework, filled)) or ()):
            _remember((framework, filled), {"out": out}, traits)


def _traits_of_out(out: Any, x: Any) -> Traits | None:
    """The traits of a dense `out` of the shape of `x`, where they are quickly told."""
    tell = _quick_traits.get(type(out))
    traits = None if tell is None else tell(out)
    if traits is None or traits.spacing != "dense" or (type(out) is not np.ndarray and out.is_inference()):
        return None
    try:
        return traits if out.shape == x.shape else None
    except RuntimeError:  # a nested tensor has no shape
        return None


def _are_apart(x: Any, traits: Any, out: Any) -> bool:
    """Whether an array of this kind and a dense one certainly have no byte in common."""
    if traits.spacing == "dense" and type(x) is not np.ndarray:  # the address of an array is not told as quickly
        start, low = x.data_ptr(), _address(out)
        return bool(start + x.nbytes <= low or low + out.nbytes <= start)
    return not np.may_share_memory(_borrowed(x), _borrowed(out))


def _may_be_otherwise() -> bool:
    """Whether a copy by torch's kernels is decided otherwise at this moment."""
    return _lanes._intercepted() or _casting.is_heard()


def _key(traits: Any) -> Any:
    """What a decision is kept by."""
    return (traits, _convert.has_threads()) if traits is not None and traits.size == "huge" else traits


def _remember(words: tuple[Any, ...], options: dict[str, Any], traits: Traits) -> None:
    """Keep the recipe of a conversion that has just been done."""
    if len(_asked) >= _KEPT:
        _asked.clear()
    want = _options.want(words[0], **options)
    if want.device not in (None, CPU) or want.pin_memory:
        _asked[words] = None
        return
    recipes = _asked.setdefault(words, {})
    if recipes is not None:
        _keep(recipes, want, traits)


def _keep(recipes: _Recipes, want: Want, traits: Traits) -> None:
    want = want.settled(traits.dtype)
    here = _convert.moment(traits, want)
    if here is _convert.WITH_TORCH or here is _convert.WITH_THREADS:
        key = (traits, here is _convert.WITH_THREADS) if traits.size == "huge" else traits
        recipes[key] = _convert.recipe_for(traits, want, here)


def _open() -> None:
    """torch is there."""
    global _borrowed, _address
    numpy: Any = adapter_of(np.ndarray)
    torch: Any = adapter_of(_lanes._Tensor)
    _borrowed = torch.borrowed
    _address = lambda x: numpy.address(x) if type(x) is np.ndarray else x.data_ptr()
    _WORDS.update(map(type, {torch.COMMON, *torch.HOST}))
    _quick_traits[np.ndarray] = numpy.quick_traits
    _quick_traits.update(dict.fromkeys(torch.EXACT, torch.quick_traits))
