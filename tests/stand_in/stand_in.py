"""Puts the stand-in under torch and CuPy as they are imported; build.py makes every process of .venv-cuda import this.

torch and CuPy find the runtime by themselves, where NVIDIA's wheel had put its own. What is left is the driver, torch's
operators and CuPy's compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

BUILT = Path(sys.prefix, "stand-in")


def load_driver():
    ctypes.CDLL(str(BUILT / "libcuda.so.1"))  # whoever asks for it by its name gets this one


def take_over_torch(torch):
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # torch warns of each operator that gets another kernel
    try:
        torch.ops.load_library(str(BUILT / "torch_operators.so"))
        torch.ops.stand_in.take_over()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def take_over_cupy(compiler):
    __import__("cupy_kernels").take_over(compiler)


class Finder(MetaPathFinder):
    AFTER = {"torch": take_over_torch, "cupy": None, "cupy.cuda.compiler": take_over_cupy}

    def find_spec(self, name, path=None, target=None):
        if name not in self.AFTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and name in ("torch", "cupy"):
            load_driver()
        after = self.AFTER[name]
        if spec is not None and after is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                after(module)

            spec.loader.exec_module = exec_module
        return spec


os.environ["CUPY_ACCELERATORS"] = ""  # CuPy's own reductions: CUB's cannot be compiled for the host
os.environ.setdefault("CUPY_CACHE_DIR", str(BUILT / "cupy-kernels"))
sys.meta_path.insert(0, Finder())
