"""Question: what does the import cost over the imports of NumPy and ml_dtypes, which it needs?"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

IMPORTS = {"tensorbridge": "import tensorbridge", "NumPy and ml_dtypes": "import numpy, ml_dtypes"}


@pytest.mark.parametrize("name", IMPORTS)
def bench_import_in_a_fresh_interpreter(benchmark: Any, name: str) -> None:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    line = f"{IMPORTS[name]}; import sys; print([n for n in ('torch', 'cupy') if n in sys.modules])"
    run = [sys.executable, "-c", line]
    done = benchmark.pedantic(
        subprocess.run, (run,), {"env": env, "check": True, "capture_output": True}, rounds=9, warmup_rounds=1
    )
    assert done.stdout.strip() == b"[]"
