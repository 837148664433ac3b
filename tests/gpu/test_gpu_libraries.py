"""Other libraries on a device, as they are: JAX, Numba and cuda.core, where they are installed. Each in a process of
its own, since each takes memory of the card for itself.
"""

import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.gpu

JAX = """
import gc, os, sys
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else it takes most of the card
import jax, jax.numpy as jnp, numpy as np, torch, tensorbridge as tb
try:
    device = jax.devices({where!r})[0]
except RuntimeError as error:
    print("no device:", error)
    sys.exit()
on = {{"cuda": "cuda:0", "cpu": "cpu"}}[{where!r}]
tensors = [tb.to_torch]
if on != "cpu":
    import cupy
    tensors.append(tb.to_cupy)
pointer = lambda made: made.data_ptr() if isinstance(made, torch.Tensor) else made.data.ptr
numbers = np.arange(12, dtype="float32").reshape(3, 4)
x = jax.device_put(numbers, device)
jax.block_until_ready(x)

def check(what, *facts):
    print(what if all(facts) else f"WRONG {{what}}: {{facts}}", flush=True)

told = tb.describe(x)
check("described", told.device == on, told.shape == (3, 4), not told.writable)
for convert in tensors:
    name, copied, shared = convert.__name__, convert(x), convert(x, share_readonly=True)
    check(f"{{name}} values", tb.to_numpy(copied).tolist() == tb.to_numpy(shared).tolist() == numbers.tolist())
    check(f"{{name}} copies what is immutable", pointer(copied) != x.unsafe_buffer_pointer())
    check(f"{{name}} shares what it may", pointer(shared) == x.unsafe_buffer_pointer())
    check(f"{{name}} stays there", tb.describe(shared).device == on)
check("to_numpy", tb.to_numpy(x).tolist() == numbers.tolist())

product = jax.jit(lambda m: (m @ m) @ (m @ m))
ones = jax.device_put(np.ones((2048, 2048), "float32"), device)
side = torch.cuda.Stream() if on != "cpu" else None
for stream in (None, side):
    with torch.cuda.stream(stream):
        for convert in tensors:
            for share in (True, False):
                made = convert(product(ones), share_readonly=share)  # still being computed, and nobody else holds it
                check("order", float(made.min()) == float(made.max()) == 2048.0**3)
made = [tb.to_numpy(product(ones)), tb.to_numpy_async({{"y": product(ones)}}).result()["y"]]
made += [batch["y"].cpu() for batch in tb.prefetch([{{"y": product(ones)}}] * 3, device=on)]
check("waited for", all(float(y.min()) == float(y.max()) == 2048.0**3 for y in made))

kept = [convert(jax.device_put(np.full(1 << 20, 7, "float32"), device), share_readonly=True) for convert in tensors]
gc.collect()
others = [jax.block_until_ready(jax.device_put(np.zeros(1 << 20, "float32"), device)) for _ in range(20)]
check("kept", all(float(k.min()) == float(k.max()) == 7 for k in kept))

half = tb.to_torch(jax.device_put(numbers, device).astype(jnp.bfloat16))
check("bfloat16", half.dtype == torch.bfloat16, half.float().tolist() == numbers.tolist())
back = jnp.from_dlpack(tb.to_torch(x))
check("back", back.tolist() == numbers.tolist())
"""

NUMBA = """
import warnings
warnings.simplefilter("ignore")  # Numba's, of how little it has to do here
from numba import cuda
import cupy, numpy as np, torch, tensorbridge as tb

def check(what, *facts):
    print(what if all(facts) else f"WRONG {what}: {facts}", flush=True)

numbers = np.arange(12, dtype="float32").reshape(3, 4)
d = cuda.to_device(numbers)
address = d.__cuda_array_interface__["data"][0]
t, c = tb.to_torch(d), tb.to_cupy(d)
check("shared", t.data_ptr() == c.data.ptr == address)
t += 1
torch.cuda.synchronize()
check("written", d.copy_to_host().tolist() == (numbers + 1).tolist() == cupy.asnumpy(c).tolist())
check("to_numpy", tb.to_numpy(d).tolist() == (numbers + 1).tolist())
check("column", tb.to_torch(d[:, 1]).tolist() == (numbers[:, 1] + 1).tolist())

@cuda.jit
def slowly(x, n):
    i = cuda.grid(1)
    if i < x.size:
        for _ in range(n):
            x[i] += 1

stream = cuda.stream()
for convert in (tb.to_torch, tb.to_cupy):
    x = cuda.to_device(np.zeros(1 << 16, "float32"), stream=stream)
    slowly[256, 256, stream](x, 100_000)
    made = convert(x)  # its array interface names the stream
    check("order", float(made.min()) == float(made.max()) == 100_000)
"""

CUDA_CORE = """
try:
    from cuda.core import Device
except ImportError:
    from cuda.core.experimental import Device
import cupy, torch, tensorbridge as tb
device = Device(0)
device.set_current()
stream = device.create_stream()
before = torch.cuda.current_stream().cuda_stream, cupy.cuda.get_current_stream().ptr
with tb.use_stream(stream):
    now = torch.cuda.current_stream().cuda_stream, cupy.cuda.get_current_stream().ptr
    t = torch.ones(1000, device="cuda")
    c = tb.to_cupy(t)
    c += 1
print(now == (int(stream.handle),) * 2)
print(before == (torch.cuda.current_stream().cuda_stream, cupy.cuda.get_current_stream().ptr))
stream.sync()
print(set(t.tolist()) == {2.0})
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def has(module):
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed")


@has("jax")
def test_arrays_of_jax_are_read_in_order_and_kept(gpu):
    lines = run(JAX.format(where="cuda"))
    if lines and lines[-1].startswith("no device"):
        pytest.skip("JAX sees no device: " + lines[-1])
    assert lines
    assert [line for line in lines if line.startswith("WRONG")] == []
    assert lines[-1] == "back"


@has("numba")
def test_arrays_of_numba_are_shared_and_their_stream_is_waited_for(gpu):
    if find_spec("numba.cuda") is None:
        pytest.skip("Numba is without CUDA")
    assert run(NUMBA) == ["shared", "written", "to_numpy", "column", "order", "order"]


@has("cuda")
def test_a_stream_of_cuda_core_becomes_current_in_both(gpu):
    if find_spec("cuda.core") is None:
        pytest.skip("cuda.core is not installed")
    assert run(CUDA_CORE) == ["True"] * 3
