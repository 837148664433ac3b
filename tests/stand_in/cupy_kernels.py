"""CuPy's kernels, compiled for the host by g++: what a stream of the stand-in runs in place of a GPU.

A kernel is a C++ function of one thread's index; here a loop calls it for each. Where threads of a block wait for each
other (`__syncthreads`), they are coroutines that take turns from barrier to barrier.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")
CLOCK = re.compile(r'asm\s+volatile\s*\(\s*"mov\.u64 %0, %%globaltimer;"\s*:\s*"=l"\((\w+)\)\s*\)')
LAUNCHED = 'extern "C" Work* stand_in_%s(const unsigned* dims, void** params) { return bound(&%s, dims, params); }\n'


def compiled(source, options=(), *_, **__):
    """In place of `cupy.cuda.compiler._compile_using_nvrtc_no_warning`: a shared library, where that gives a cubin."""
    names = KERNEL.findall(source)
    barriers = "#define BARRIERS\n" if "__syncthreads" in source else ""
    launched = "".join(LAUNCHED % (name, name) for name in names)
    include = [HERE / "include", Path(import_module("cupy").__file__).parent / "_core/include", *nvidia_headers()]
    given = [option for option in options if option.startswith(("-I", "-D"))]
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        body = CLOCK.sub(r"\1 = now()", source)
        text.write_text(f'{barriers}#include "before.h"\n{body}\n#include "after.h"\n{launched}')
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-fpermissive",
            "-w",
            *(f"-I{path}" for path in include),
        ]
        run = subprocess.run([*command, *given, "-o", library, text], capture_output=True, text=True, check=False)
        if run.returncode:
            sys.stderr.write(f"[stand-in] the kernels {names} cannot be compiled for the host\n")
            raise import_module("cupy.cuda.compiler").CompileException(run.stderr, source, "kernel.cpp", options)
        return library.read_bytes(), None


def nvidia_headers():
    return sorted(Path(next(iter(import_module("nvidia").__path__))).glob("cu[0-9]*/include"))


def take_over(compiler):
    compiler._compile_using_nvrtc_no_warning = compiled
    compiler._preprocess = lambda *_, **__: "the stand-in's"  # a part of the key of its cache
