"""What is installed here, which devices are seen, and which routes share memory."""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

from tensorbridge._commands import _matrix
from tensorbridge._cuda import _streams
from tensorbridge._eager import eager
from tensorbridge._loaded import loaded

_DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "ml_dtypes": ("ml_dtypes",),
    "torch": ("torch",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"),
}


class Framework(NamedTuple):
    """A framework as `info` found it."""

    name: str
    version: str  # "" if it is not installed
    loaded: bool  # imported in this process


class Info(NamedTuple):
    """What `info` found. ``str(info)`` is a table for a person."""

    tensorbridge: str
    python: str
    frameworks: tuple[Framework, ...]
    devices: tuple[str, ...]  # as a loaded framework sees them, CUDA's first of all; () also if none is loaded
    routes: tuple[_matrix.Cell, ...]
    pools: tuple[str, ...] = ()  # the CUDA memory pools of the loaded frameworks

    @eager
    def __str__(self) -> str:
        lines = [
            f"tensorbridge {self.tensorbridge}, Python {self.python}, {platform.system()} {platform.machine()}",
            "",
        ]
        for f in self.frameworks:
            state = ("loaded" if f.loaded else "not loaded") if f.version else ""
            lines.append(f"  {f.name:<10} {f.version or 'not installed':<16} {state}".rstrip())
        asked = any(f.loaded for f in self.frameworks if f.name in ("torch", "cupy"))
        none = "none seen" if asked else "not asked: neither torch nor CuPy is loaded"
        lines += ["", f"  devices    {', '.join(self.devices) or none}"]
        lines += [f"  pool       {pool}" for pool in self.pools]
        lines += ["", "  Routes, without options (plan() tells for one array):", ""]
        sources = list(dict.fromkeys(route.source for route in self.routes))
        texts = {(r.source, r.target): r.text.replace("**", "") for r in self.routes}
        columns = {t: max([len(texts[s, t]) for s in sources] + [len(t) + 3]) for t in _matrix.TARGETS}
        first = max(map(len, sources))
        head = "  ".join(f"to_{t}".ljust(w) for t, w in columns.items())
        lines.append(f"  {'from':<{first}}  {head}".rstrip())
        for source in sources:
            row = "  ".join(texts[source, t].ljust(w) for t, w in columns.items())
            lines.append(f"  {source:<{first}}  {row}".rstrip())
        return "\n".join(lines)

    @eager
    def __repr__(self) -> str:
        return str(self)


@eager
def info() -> Info:
    """Return what is installed, which devices are seen, and which routes share memory.

    Returns
    -------
    Info
        ``frameworks``, ``devices``, ``routes``, ``pools``; ``str(info())`` is a table.

    Cost
    ----
    Reads installed metadata and imports nothing; devices are those that an already imported framework reports.

    Examples
    --------
    >>> [framework.name for framework in info().frameworks]
    ['numpy', 'ml_dtypes', 'torch', 'cupy']
    """
    from tensorbridge import __version__

    frameworks = tuple(Framework(name, _version(name), loaded(name) is not None) for name in _DISTRIBUTIONS)
    routes = tuple(_matrix.cell(source, target) for source in _matrix.SOURCES for target in _matrix.TARGETS)
    return Info(__version__, platform.python_version(), frameworks, _devices(), routes, _pools())


def _version(name: str) -> str:
    from importlib import metadata  # slow to import, and only needed here

    for distribution in _DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _devices() -> tuple[str, ...]:
    """CUDA's, or else those of the accelerator that torch has in its place: Apple's, Intel's, a backend's."""
    found = _cuda_devices()
    accelerator: Any = getattr(loaded("torch"), "accelerator", None)
    if found or _streams.forked() or accelerator is None or not accelerator.is_available():
        return found
    kind = accelerator.current_accelerator().type
    return tuple(f"{kind}:{i}" for i in range(accelerator.device_count()))


def _cuda_devices() -> tuple[str, ...]:
    torch: Any = loaded("torch")
    if _streams.forked():
        return ()
    if torch is not None and torch.cuda.is_available():
        return tuple(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
    cupy: Any = loaded("cupy")
    if cupy is None:
        return ()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        return ()
    names = (cupy.cuda.runtime.getDeviceProperties(i)["name"].decode() for i in range(count))
    return tuple(f"cuda:{i} {name}" for i, name in enumerate(names))


def _pools() -> tuple[str, ...]:
    torch: Any = loaded("torch")
    cupy: Any = loaded("cupy")
    found = []
    if torch is not None and not _streams.forked() and torch.cuda.is_available() and torch.cuda.is_initialized():
        used, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        found.append(f"torch: {used} B in use, {held} B held")
    if cupy is not None and _cuda_devices():
        pool = cupy.get_default_memory_pool()
        found.append(f"CuPy: {pool.used_bytes()} B in use, {pool.total_bytes()} B held")
    return tuple(found)
