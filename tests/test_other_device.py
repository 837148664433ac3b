"""Tensors on a device that only torch knows, Apple's GPU or Intel's: on a stand-in that torch takes for one.

`other_device.cpp` is the device and `other_device_cases.py` has the tests. They run in a process of their own, for a
backend is registered for good; each is shown here under its name.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SOURCE, CASES = HERE / "other_device.cpp", HERE / "other_device_cases.py"
NAMES = [node.name for node in ast.parse(CASES.read_text()).body if getattr(node, "name", "").startswith("test_")]


def build(folder: Path) -> Path:
    """The device as a shared library; built once for each version of its source, of torch and of Python."""
    if sys.platform != "linux":
        pytest.skip("the stand-in device is built on Linux alone")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    python = Path(sysconfig.get_path("include"))
    if compiler is None or not (python / "Python.h").exists():
        pytest.skip("no C++ compiler, or no headers of Python: the stand-in device cannot be built")
    made_of = (SOURCE.read_bytes(), torch.__version__.encode(), platform.python_version().encode())
    library = folder / f"other_device_{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    if not library.exists():
        home = Path(torch.__file__).parent
        includes = [home / "include", home / "include/torch/csrc/api/include", python]
        command = [compiler, "-std=c++20", "-O0", "-w", "-fPIC", "-shared", "-DTORCH_EXTENSION_NAME=other_device"]
        command += [f"-isystem{path}" for path in includes]
        command += [str(SOURCE), f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python"]
        partial = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        partial.replace(library)  # whole, or not there
    return library


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What became of each case: its name and the text of its failure, if any."""
    report = tmp_path_factory.mktemp("other_device") / "report.xml"
    cache = getattr(request.config, "cache", None)  # pytest's own, where it is not switched off
    library = build(report.parent if cache is None else cache.mkdir("other_device"))
    environment = {
        **os.environ,
        "OTHER_DEVICE": str(library),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=HERE.parent)
    # Its exit status says nothing: torch may abort there when it ends, if it was given a backward pass on a backend.
    assert report.exists(), done.stdout + done.stderr  # a segmentation fault: somebody has read a handle
    return {
        case.get("name"): "\n".join(child.text or "" for child in case)
        for case in ElementTree.parse(report).iter("testcase")
    }


@pytest.mark.parametrize("name", NAMES)
def test_on_a_device_that_only_torch_knows(name, outcomes):
    texts = {case: text for case, text in outcomes.items() if case.partition("[")[0] == name}
    assert texts
    assert not any(texts.values()), "\n".join(texts.values())
