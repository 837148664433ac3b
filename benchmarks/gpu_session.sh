#!/bin/bash
# One session on a machine with a CUDA device: what is there, the GPU tests, the bench. Under nine minutes; all that it
# writes is under $OUT (default ./gpu-session). From the root of the tree, without an install step:
#
#     OUT=somewhere bash benchmarks/gpu_session.sh
#
# A file of tests that hangs is ended by its own limit (and shows its stacks: each test has a faulthandler of 60 s), and
# the rest goes on. The bench has KEPT seconds of its own: the rows C1 to C6, with what they are measured against. The rows
# of the CPU take longer than a session: "python3 -m tensorbridge bench --device cuda" measures all.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-gpu-session}
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TENSORBRIDGE_REQUIRE_GPU=1
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-530} # seconds for everything
KEPT=${KEPT:-170}
BEGAN=$SECONDS
left() { echo $((LIMIT - (SECONDS - BEGAN))); }

{
    date -u
    uname -srm
    nvidia-smi
    nvidia-smi topo -m
    nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max,memory.total --format=csv
    lscpu | grep -E "Model name|^CPU\(s\)|NUMA"
    cat /sys/kernel/mm/transparent_hugepage/enabled
    "$PYTHON" - <<'PY'
import importlib, platform
print("python", platform.python_version())
for name in ("numpy", "ml_dtypes", "torch", "cupy", "pytest", "hypothesis", "matplotlib"):
    try:
        print(name, importlib.import_module(name).__version__)
    except ImportError as error:
        print(name, "is missing:", error)
import torch
print("torch CUDA", torch.version.cuda, torch.cuda.get_device_name(0), torch.cuda.mem_get_info())
import cupy
print("CuPy CUDA", cupy.cuda.runtime.runtimeGetVersion(), "NVRTC", cupy.cuda.nvrtc.getVersion())
import tensorbridge
print(tensorbridge.info())
PY
} >"$OUT/machine.txt" 2>&1
tail -n 40 "$OUT/machine.txt"

# Facts first: what fails there explains what fails later.
TESTS="tests/gpu/test_gpu_facts.py tests/test_facts_gpu.py tests/gpu/test_gpu_order.py tests/gpu/test_gpu_lifetime.py
tests/gpu/test_gpu_conversions.py tests/gpu/test_gpu_transfers.py tests/gpu/test_gpu_bad_input.py
tests/gpu/test_gpu_capture.py tests/gpu/test_gpu_leaks.py"
FAILED=0
: >"$OUT/tests.txt"
for file in $TESTS; do
    spare=$(($(left) - KEPT))
    [ "$spare" -gt 20 ] || { echo "NO TIME LEFT for $file" | tee -a "$OUT/tests.txt"; FAILED=1; continue; }
    echo "== $file" | tee -a "$OUT/tests.txt"
    timeout --kill-after=10 $((spare < 100 ? spare : 100)) "$PYTHON" -m pytest -q -m gpu -rfE --tb=short --durations=3 -p no:cacheprovider "$file" \
        2>&1 | tee "$OUT/$(basename "$file" .py).txt" | tail -n 25 | tee -a "$OUT/tests.txt" || FAILED=1
done

# Everything else that is marked gpu, if there is time.
spare=$(($(left) - KEPT))
if [ "$spare" -gt 40 ]; then
    echo "== the rest" | tee -a "$OUT/tests.txt"
    ignored=$(for file in $TESTS; do printf -- '--ignore=%s ' "$file"; done)
    # shellcheck disable=SC2086
    timeout --kill-after=10 "$spare" "$PYTHON" -m pytest -q -m gpu -rfE --tb=short -p no:cacheprovider $ignored tests \
        2>&1 | tee "$OUT/rest.txt" | tail -n 15 | tee -a "$OUT/tests.txt" || FAILED=1
fi

# Ctrl-C, so that a bench which is out of time still writes what it has.
timeout --signal=INT --kill-after=15 "$(($(left) > 60 ? $(left) : 60))" \
    "$PYTHON" -m tensorbridge bench --device cuda --only C --out "$OUT/bench" 2>&1 | tee "$OUT/bench.txt" | tail -n 40 || FAILED=1
echo "done in $((SECONDS - BEGAN)) s; $OUT holds machine.txt, tests.txt, one file a test module, bench/"
exit $FAILED
