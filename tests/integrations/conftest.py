"""Tests against the real libraries, which `make test-integrations` installs; without them they fail, not skip."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

missing = [name for name in ("jax", "pandas", "polars", "pyarrow") if importlib.util.find_spec(name) is None]
if missing:
    raise pytest.UsageError(
        f"{', '.join(missing)} cannot be imported; `make test-integrations` installs what is needed"
    )


@pytest.fixture(autouse=True)
def no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Converting warns of nothing: what is wrong is an error, what is right is silent."""
    yield
    ours = [str(w.message) for w in recwarn if "tensorbridge" in w.filename]
    assert not ours
