# Every target works on a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
comma := ,

.PHONY: demo test test-integrations check bench test-gpu clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test,dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/python -m tensorbridge demo

test: .venv/.installed
	$(BIN)/python -m pytest -q

# Against the real JAX, pandas, polars, pyarrow, h5py and others; `make test` needs none of them.
test-integrations: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,integrations]'
	TENSORBRIDGE_REQUIRE_INTEGRATIONS=1 $(BIN)/python -m pytest -q tests/integrations

# Measures this machine: bench-report/report.md. PEERS=1 adds the rows of other libraries (large downloads).
bench: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench$(if $(PEERS),$(comma)peers)]'
	$(BIN)/python -m tensorbridge bench

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a CUDA device: straight from the tree, with whatever torch, CuPy and pytest python3 has.
test-gpu:
	TENSORBRIDGE_REQUIRE_GPU=1 PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu

clean:
	rm -rf .venv build dist *.egg-info
