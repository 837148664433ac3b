"""Builds the stand-in and puts it into the virtual environment of the Python that runs this: see README.md.

.venv-cuda/bin/python tests/stand_in/build.py CUPY-SOURCES.tar.gz
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE = Path(sysconfig.get_path("purelib"))
BUILT = Path(sys.prefix, "stand-in")
NVIDIA = next(SITE.glob("nvidia/cu[0-9]*"))  # the CUDA that torch and CuPy were built for
RUNTIME = next(path for path in NVIDIA.glob("lib/libcudart.so.*") if path.suffix != ".real")
INCLUDE = f"-I{NVIDIA / 'include'}"
CUDA = f"{NVIDIA.name.removeprefix('cu')}000"
SHARED = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared"]
OBJECT = [*SHARED[:-1], "-c", INCLUDE]
LINKED = [RUNTIME, f"-Wl,-rpath,{RUNTIME.parent}"]


def run(*command):
    return subprocess.run([str(part) for part in command], check=True)


def symbols(pattern, *command):
    """The names in what a command prints that are wholly of a pattern, up to the `@` of their version."""
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return {word.partition("@")[0] for word in run.stdout.split() if re.fullmatch(pattern, word)}


def cupy_runtime(sources):
    """CuPy's module for the runtime: its wheel's has NVIDIA's inside, which asks the driver what nobody documents."""
    settings = {
        "CUPY_CUDA_VERSION": CUDA,
        "CUPY_HIP_VERSION": 0,
        "CUPY_USE_CUDA_PYTHON": False,
        "CUPY_CUFFT_STATIC": False,
    }
    settings = [part for name, value in settings.items() for part in ("-E", f"{name}={value}")]
    directives = "embedsignature=True,binding=False,freethreading_compatible=True,warn.deprecated.IF=False"
    made = BUILT / "cupy_runtime.o"
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sources) as archive:
        archive.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        module = root / "cupy_backends/cuda/api/runtime"
        cython = [sys.executable, "-m", "cython", "-3", "--cplus", "-X", directives, *settings]
        run(*cython, "--working", root, f"{module}.pyx")
        headers = [f"-I{sysconfig.get_path('include')}", f"-I{root}"]
        run(*OBJECT, "-fpermissive", *headers, f"-DCUPY_CUDA_VERSION={CUDA}", f"{module}.cpp", "-o", made)
    # See the end of streams.cpp.
    run("objcopy", *(f"--redefine-sym={name}=cupy_{name}" for name in ("cudaEventQuery", "cudaStreamQuery")), made)
    return made


def runtime(cupy):
    """libcudart, with every function that torch and CuPy name: those that are not in the sources say so when called."""
    asked = symbols(r"\w+@libcudart.*", "nm", "-D", "--undefined-only", *SITE.glob("torch/lib/*.so"))
    asked |= symbols(r"cuda[A-Z]\w+", "nm", "--undefined-only", cupy)
    parts = []
    for source in sorted(set(HERE.glob("*.cpp")) - {HERE / "torch_operators.cpp"}):
        parts.append(BUILT / f"{source.stem}.o")
        run(*OBJECT, source, "-o", parts[-1])
    lacking = sorted(asked - symbols(r"\w+", "nm", "--defined-only", *parts))
    not_supported = 801
    say = 'extern "C" int %s() { fprintf(stderr, "[stand-in] there is no %s\\n"); return %d; }\n'
    text, exports, made = BUILT / "lacking.cpp", BUILT / "exports", BUILT / RUNTIME.name
    text.write_text("#include <cstdio>\n" + "".join(say % (name, name, not_supported) for name in lacking))
    exports.write_text(f"{RUNTIME.name} {{ global: cuda*; cupy_*; __cuda*; cu[A-Z]*; local: *; }};\n")
    run(*SHARED, *parts, text, "-o", made, f"-Wl,-soname,{made.name},--version-script={exports}", "-ldl", "-lpthread")
    if not RUNTIME.with_suffix(".real").exists():
        shutil.copy(RUNTIME, RUNTIME.with_suffix(".real"))
    shutil.copy(made, RUNTIME)


def driver():
    """libcuda: a name alone, all of it is in the runtime."""
    (BUILT / "driver.cpp").write_text("")
    made = BUILT / "libcuda.so.1"
    run(*SHARED, BUILT / "driver.cpp", f"-Wl,-soname,{made.name},--no-as-needed", *LINKED, "-o", made)


def torch_operators():
    torch = SITE / "torch"
    headers = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", INCLUDE]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda", *LINKED]
    libraries += torch.glob("lib/libgomp*")
    run(*SHARED, *headers, HERE / "torch_operators.cpp", *libraries, "-o", BUILT / "torch_operators.so")


def main(sources):
    BUILT.mkdir(exist_ok=True)
    cupy = cupy_runtime(sources)
    runtime(cupy)
    run(*SHARED, cupy, *LINKED, "-o", next(SITE.glob("cupy_backends/cuda/api/runtime.*.so")))
    driver()
    torch_operators()
    (SITE / "stand_in.pth").write_text(f"import sys; sys.path.append({str(HERE)!r}); import stand_in\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
