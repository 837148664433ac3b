#!/bin/bash
# One session on a machine with a CUDA device, under ten minutes and without an install step: what is there, the GPU
# tests, the bench, the probes. From anywhere:
#
#     OUT=somewhere bash benchmarks/gpu_session.sh
#
# Leaves a few flat files in $OUT (default ./gpu-session):
#
#     summary.txt       one page: what ran, what failed and why
#     machine.txt       card, driver, link, versions
#     tests.txt         everything that the tests printed, with their durations
#     facts.txt         the probes of docs/gpu-facts.md, with the answer of this card
#     probes.txt        answers to what reading could not settle; what the parts of a crossing cost
#     bench.txt, bench-report.md, bench.tgz
#
# Each step has a limit of its own and none stops the next. A module of tests is a process, so what a fault poisons ends
# with it; a test that hangs for a minute shows its stacks and ends it too, and the tests behind it get another. The
# bench measures the rows C1 to C6 and writes what it has when its time is up: "python3 -m tensorbridge bench --device
# cuda" measures all rows.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-gpu-session}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export COLUMNS=250 PYTHONPATH=. PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TENSORBRIDGE_REQUIRE_GPU=1
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-570}      # seconds for everything
BENCH=${BENCH:-140}      # kept for the bench
PROBES=${PROBES:-60}     # kept for the probes
BEGAN=$SECONDS
: >"$OUT/summary.txt"
: >"$OUT/tests.txt"

# Held open, so that no step pays for the driver's start.
"$PYTHON" -c "import torch, time; torch.zeros(1, device='cuda'); time.sleep($LIMIT + 60)" 2>/dev/null &
trap "kill $! 2>/dev/null" EXIT

left() { echo $((LIMIT - (SECONDS - BEGAN))); }
say() { echo "[$((SECONDS - BEGAN)) s] $*" | tee -a "$OUT/summary.txt"; }
ended() { # what an exit status means
    case $1 in
        0) echo "ok" ;;
        124 | 137) echo "OUT OF TIME" ;;
        *) echo "exit $1" ;;
    esac
}

# -- What is there

timeout --kill-after=5 60 bash -c '
    date -u
    uname -srm
    nvidia-smi
    nvidia-smi topo -m
    nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max,memory.total --format=csv
    lscpu | grep -E "Model name|^CPU\(s\)|NUMA"
    free -g | head -2
    cat /sys/kernel/mm/transparent_hugepage/enabled
    "$0" - <<PY
import importlib, platform
print("python", platform.python_version())
for name in ("numpy", "ml_dtypes", "torch", "cupy", "pytest", "hypothesis", "matplotlib", "jax", "numba", "cuda.core"):
    try:
        print(name, importlib.import_module(name).__version__)
    except ImportError as error:
        print(name, "is missing:", error)
import torch
print("torch CUDA", torch.version.cuda, torch.cuda.get_device_name(0), torch.cuda.mem_get_info())
import cupy
print("CuPy CUDA", cupy.cuda.runtime.runtimeGetVersion(), "driver", cupy.cuda.runtime.driverGetVersion())
print("NVRTC", cupy.cuda.nvrtc.getVersion(), "a kernel:", (cupy.arange(3) + 1).tolist())
import tensorbridge
print(tensorbridge.info())
PY' "$PYTHON" >"$OUT/machine.txt" 2>&1
say "machine: $(ended $?)"
tail -n 30 "$OUT/machine.txt"

# A virtual machine may be given its memory only as it is used, and the bench leaves out the rows that do not fit.
timeout --kill-after=5 40 "$PYTHON" -c 'import numpy as np; np.empty(16 << 30, "u1")[::4096] = 1' || say "no 16 GiB to touch"
grep -E "MemTotal|MemAvailable" /proc/meminfo >>"$OUT/machine.txt"

# -- The tests: facts first, since what fails there explains what fails later

MODULES="tests/gpu/test_gpu_facts.py tests/test_facts_gpu.py tests/gpu/test_gpu_order.py tests/gpu/test_gpu_lifetime.py
tests/gpu/test_gpu_conversions.py tests/gpu/test_gpu_transfers.py tests/gpu/test_gpu_bad_input.py
tests/gpu/test_gpu_lazy.py tests/gpu/test_gpu_several.py tests/gpu/test_gpu_capture.py tests/gpu/test_gpu_leaks.py
tests/test_prefetch_devices.py tests/test_pack_crossings.py
tests/test_collate.py tests/test_editing_devices.py tests/gpu/test_gpu_libraries.py tests/test_bench.py"
PYTEST="-m pytest -v --no-header -m gpu -rfE --tb=short --durations=5 --color=no -p no:cacheprovider"
for module in $MODULES; do
    skip=() # where a test ends the process, the tests behind it get another
    for _ in 1 2 3; do
        spare=$(($(left) - BENCH - PROBES))
        [ "$spare" -gt 20 ] || { say "NO TIME LEFT for $module"; break; }
        # shellcheck disable=SC2086
        timeout --kill-after=5 $((spare < 120 ? spare : 120)) "$PYTHON" $PYTEST "${skip[@]}" "$module" >>"$OUT/tests.txt" 2>&1
        status=$?
        say "$module: $(ended $status)"
        # Passed, nothing left to run, failed. A test that hangs ends its process with 1 too, but without a last line.
        case $status in
            0 | 5) break ;;
            1) "$PYTHON" benchmarks/gpu_summary.py ended "$OUT/tests.txt" && break ;;
        esac
        while IFS= read -r name; do skip+=("--deselect=$name"); done < <("$PYTHON" benchmarks/gpu_summary.py seen "$OUT/tests.txt")
    done
done

# -- The bench. By a Ctrl-C that Python hears in the background too, so that it writes what it has when time is up

spare=$(($(left) - PROBES))
timeout --signal=INT --kill-after=25 $((spare > 60 ? spare - 25 : 60)) "$PYTHON" -c '
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "tensorbridge"
runpy.run_module("tensorbridge", run_name="__main__", alter_sys=True)
' bench --device cuda --only C --out "$OUT/bench" >"$OUT/bench.txt" 2>&1
say "bench: $(ended $?); $(tail -n 1 "$OUT/bench.txt")"
if [ -d "$OUT/bench" ]; then
    cp "$OUT/bench/report.md" "$OUT/bench-report.md"
    tar -C "$OUT" -czf "$OUT/bench.tgz" bench && rm -r "$OUT/bench"
fi

# -- What reading could not settle

spare=$(left)
timeout --kill-after=5 $((spare > 30 ? spare - 10 : 20)) "$PYTHON" benchmarks/gpu_probes.py >"$OUT/probes.txt" 2>&1
say "probes: $(ended $?)"

# -- What it comes to

"$PYTHON" benchmarks/gpu_summary.py page "$OUT"
{ echo; echo "probes:"; cat "$OUT/probes.txt"; } >>"$OUT/summary.txt"
say "done"
head -c 11000 "$OUT/summary.txt"
! grep -q -E "^  (FAILED|ERROR|LOST)|NO TIME LEFT|OUT OF TIME|: exit " "$OUT/summary.txt"
