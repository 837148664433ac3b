"""The machine that was measured: what a reader needs in order to compare figures with another one."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Facts by name, in the order in which a report gives them; what the system does not tell is "unknown"."""
    import tensorbridge as tb

    versions = {framework.name: framework.version or "not installed" for framework in tb.info().frameworks}
    facts: dict[str, Any] = {
        "CPU": cpu_name(),
        "cores": cores(),
        "memory": _memory(),
        "transparent huge pages": _first("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
        "NUMA nodes": _numa_nodes(),
        "system": _system(),
        "load before": load_now(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "tensorbridge": tb.__version__,
        "NumPy": versions["numpy"],
        "ml_dtypes": versions["ml_dtypes"],
        "torch": "not installed",
        "CuPy": versions["cupy"],
    }
    try:
        import torch
    except ImportError:
        return facts
    facts["torch"] = torch.__version__
    facts["torch threads"] = f"{torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')})"
    facts["GPU"] = gpu_missing() or torch.cuda.get_device_name(0)
    if not gpu_missing():
        facts |= _gpu(torch)
    return facts


def _system() -> str:
    kernel = platform.release().partition("-")[0]
    return f"{platform.system()} {kernel}, {' '.join(platform.libc_ver()).strip() or 'unknown C library'}"


def cpu_name() -> str:
    name = _first("/proc/cpuinfo", r"model name\s*:\s*(.+)")
    if name == "unknown" and sys.platform == "darwin":
        name = _said(["sysctl", "-n", "machdep.cpu.brand_string"])
    if name == "unknown":
        name = platform.processor() or platform.machine()
    family, model = (_first("/proc/cpuinfo", rf"{field}\s*:\s*(\d+)") for field in ("cpu family", "model"))
    return name if family == "unknown" else f"{name}, family {family} model {model}"


def cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()} usable"


def available_bytes() -> int:
    """Host memory that can be had without swapping; a large number where the system does not say."""
    free = _first("/proc/meminfo", r"MemAvailable:\s*(\d+) kB")
    limits = [int(free) * 1024] if free != "unknown" else []
    cap, used = (_first(f"/sys/fs/cgroup/memory.{name}", r"(\d+)") for name in ("max", "current"))
    if cap != "unknown" and used != "unknown":
        limits.append(int(cap) - int(used))
    return min(limits, default=1 << 62)


def gpu_missing() -> str:
    """Why nothing can be measured on a CUDA device; empty if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.version.cuda is None:
        return "no CUDA device: this torch is built for the CPU alone"
    return "" if torch.cuda.is_available() else "no CUDA device: torch sees none"


def _gpu(torch: Any) -> dict[str, Any]:
    props = torch.cuda.get_device_properties(0)
    place = [getattr(props, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]  # torch 2.11 may not say
    bus = "{:04x}:{:02x}:{:02x}.0".format(*place) if any(place) else "0"
    device = Path("/sys/bus/pci/devices") / bus
    asked = "driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max"
    said = _said(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "-i", bus])
    driver, gen, most_gen, width, most_width = (said.split(", ") + ["unknown"] * 5)[:5]
    link = f"gen {gen} x{width} now, gen {most_gen} x{most_width} at most"
    if gen == "unknown":
        speed, lanes = (_first(device / f"max_link_{name}", "(.+)") for name in ("speed", "width"))
        link = "unknown" if "unknown" in (speed, lanes) else f"{speed} x{lanes} at most"
    return {
        "GPU memory": f"{props.total_memory / 1024**3:.0f} GiB",
        "driver": driver,
        "CUDA of torch": str(torch.version.cuda),
        "PCIe link": link,
        "NUMA node of the GPU": _first(device / "numa_node", r"(-?\d+)"),
    }


def _memory() -> str:
    kib = _first("/proc/meminfo", r"MemTotal:\s*(\d+) kB")
    return kib if kib == "unknown" else f"{int(kib) / 1024**2:.0f} GiB"


def _numa_nodes() -> str:
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return str(len(nodes)) if nodes else "unknown"


def load_now() -> str:
    return " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def _first(path: str | Path, pattern: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"))
    except OSError:
        return "unknown"
    return found[1].strip() if found else "unknown"


def _said(command: list[str], run: Callable[..., Any] = subprocess.run) -> str:
    try:
        done = run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.strip() if done.returncode == 0 else "") or "unknown"
