"""`python -m tensorbridge`, and the table in the README that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import table_rows
import torch

import tensorbridge as tb
from tensorbridge.__main__ import main
from tensorbridge._commands import _matrix

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tensorbridge", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_info_prints_what_is_installed_and_which_routes_share(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"tensorbridge {tb.__version__}" in text
    assert "torch" in text
    row = next(line for line in text.splitlines() if "torch, requires grad" in line)
    assert "shared, read-only" in row


def test_unknown_subcommand_exits_2_with_usage():
    done = run("nope")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m tensorbridge")


@pytest.mark.parametrize(("missing", "said"), [("torch", "torch"), ("sklearn", "scikit-learn")])
def test_the_demo_names_what_it_lacks_as_pip_knows_it(missing, said):
    """Without an extra of this package, which is in no index before its first release."""
    code = (
        f"import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == {missing!r} else find(n)"
    )
    code += "; from tensorbridge._commands import _demo; raise SystemExit(_demo.main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"The demo needs {said}: pip install {said}\n")


def test_info_asks_installed_metadata_and_imports_nothing():
    code = "import sys, tensorbridge as tb; tb.info(); sys.exit('torch' in sys.modules or 'cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_info_names_the_devices_that_torch_has_in_place_of_cudas(monkeypatch):
    names = {"is_available": True, "device_count": 2, "current_accelerator": torch.device("xpu")}
    there = SimpleNamespace(**{name: (lambda value=value: value) for name, value in names.items()})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "cupy", None)  # loaded by an earlier test, it may see one
    monkeypatch.setattr(torch, "accelerator", there)
    found = tb.info()
    assert found.devices == ("xpu:0", "xpu:1")
    assert "  devices    xpu:0, xpu:1\n" in str(found)
    assert found.pools == ()
    there.is_available = lambda: False
    assert tb.info().devices == ()
    assert "  devices    none seen\n" in str(tb.info())


def test_table_in_the_readme_is_the_planners():
    readme = (ROOT / "README.md").read_text()
    begin, end = "<!-- plan-matrix: begin -->\n", "<!-- plan-matrix: end -->"
    assert readme.split(begin)[1].split(end)[0] == _matrix.markdown() + "\n"


@pytest.mark.parametrize("target", ["numpy", "torch"])
@pytest.mark.parametrize("source", [name for name, traits in _matrix.SOURCES.items() if traits.device == "cpu"])
def test_table_says_what_real_arrays_do(source, target, tmp_path):
    """Those of CUDA, and the column of CuPy, are asked on a device."""
    table_rows.assert_cell_is_true(source, target, tmp_path)


def test_every_row_of_the_table_is_asked_of_a_real_array():
    assert set(table_rows.ROWS) == set(_matrix.SOURCES)


SCRIPT = """
import sys
import numpy as np, tensorbridge as tb
tb.to_torch(np.zeros(3)[::-1])
print(sys.argv, __name__)
if "fail" in sys.argv:
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["fail"], 3)])
def test_trace_runs_a_script_and_reports_also_when_it_fails(tmp_path, arguments, code):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    done = run("trace", "--save", str(tmp_path / "trace.json"), str(script), *arguments)
    assert done.returncode == code
    assert done.stdout.strip() == f"{[str(script), *arguments]} __main__"
    assert "24 B      1" in done.stderr
    assert "job.py:4" in done.stderr
    assert (tmp_path / "trace.json").exists()


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["fail"], 3)])
def test_trace_runs_a_module_with_imports_of_its_package(tmp_path, arguments, code):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "data.py").write_text("import numpy as np\nROWS = np.zeros(3)[::-1]\n")
    (package / "train.py").write_text(
        "import sys\nimport tensorbridge as tb\nfrom .data import ROWS\ntb.to_torch(ROWS)\n"
        "print(sys.argv[0], sys.argv[1:], __name__)\nif 'fail' in sys.argv:\n    raise SystemExit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tensorbridge", "trace", "-m", "pkg.train", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (code, f"{package / 'train.py'} {arguments} __main__")
    assert "train.py:4" in done.stderr


@pytest.mark.parametrize("name", ["no_such_module", "no_such_package.train"])
def test_trace_of_a_missing_module_exits_2(name):
    done = run("trace", "-m", name)
    assert (done.returncode, done.stderr) == (2, f"python -m tensorbridge trace: no such module: {name}\n")


def test_trace_waits_for_the_threads_of_the_script_as_python_does(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(
        "import threading, time\n"
        "import numpy as np, tensorbridge as tb\n"
        "def late():\n"
        "    time.sleep(0.3)\n"
        "    tb.to_numpy(np.zeros(10), copy=True)\n"
        "threading.Thread(target=late).start()\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(2)\n"  # which nobody shuts down
        "pool.submit(tb.to_numpy, np.zeros(3), copy=True).result()\n"
    )
    assert "2 conversions, 0 of them shared; 104 B moved" in run("trace", str(script)).stderr


def test_trace_of_a_missing_script_exits_2():
    done = run("trace", "no_such_script.py")
    assert done.returncode == 2
    assert "no such script" in done.stderr


NO_SCRIPTS = {"trace.json": b'{"traceEvents": []}', "model.pt": b"PK\x03\x04\x00\xff", "notes.md": b"# Notes\n"}


@pytest.mark.parametrize("name", NO_SCRIPTS)
def test_trace_of_a_file_that_is_no_script_says_what_it_takes(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(NO_SCRIPTS[name])
    done = run("trace", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"python -m tensorbridge trace: {path} is no Python script, which is what it takes: a file that ends in .py, "
        "or in nothing. It runs it and reports the conversions in it; a trace that was saved is opened by Perfetto or "
        "chrome://tracing.\n"
    )


@pytest.mark.parametrize("name", ["job.py", "job"])
def test_trace_of_a_script_with_a_mistake_shows_the_line(tmp_path, name):
    script = tmp_path / name
    script.write_text("#!/usr/bin/env python\nx = (\n")
    done = run("trace", str(script))
    assert done.returncode == 1
    assert f'{name}", line 2' in done.stderr


def test_trace_of_a_script_without_a_suffix_runs_it(tmp_path):
    script = tmp_path / "job"
    script.write_text("print(__name__)\n")
    assert run("trace", str(script)).stdout == "__main__\n"


def test_trace_that_cannot_be_saved_is_said_before_the_script_runs(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    path = str(tmp_path / "no_such_folder" / "trace.json")
    done = run("trace", "--save", path, str(script))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"python -m tensorbridge trace: --save {path}: No such file or directory\n"


def test_trace_without_a_script_asks_for_the_script():
    done = run("trace")
    assert done.returncode == 2
    assert done.stderr.endswith("the following arguments are required: script\n")


def test_version_is_printed():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"tensorbridge {tb.__version__}\n")


@pytest.mark.parametrize("command", ["info", "plan-matrix", "demo", "demo why-detach"])
def test_reader_who_stops_early_causes_no_traceback(command):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "tensorbridge", *command.split()],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_demo_trains_on_shared_digits_and_counts_the_bytes():
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "ValueError: assignment destination is read-only" in done.stdout
    used_the_gpu = "The outputs go to CuPy" in done.stdout  # 31 760 B more
    moved = "6 conversions: 951 824 B" if used_the_gpu else "5 conversions: 920 064 B"
    assert f"Bytes moved by {moved}." in done.stdout
    accuracy = float(done.stdout.split("it has not seen: ")[1].split("%")[0])
    assert accuracy > 90
    assert "134 217 728 B" in done.stdout


def test_without_a_command_the_help_lists_them(capsys):
    assert main([]) == 2
    said = capsys.readouterr().err
    assert all(f"    {name}" in said for name in ("info", "plan-matrix", "bench", "demo", "trace"))
