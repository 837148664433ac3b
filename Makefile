# Every target works on a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
comma := ,

.PHONY: demo test test-integrations check bench test-gpu test-stand-in clean

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

# Without a CUDA device: the same tests with the CUDA builds of torch and CuPy (5 GB in .venv-cuda) on a stand-in for CUDA. Those
# for several devices need STAND_IN_DEVICES=2. See tests/stand_in/README.md.
STAND_IN_TORCH ?= 2.11.0
STAND_IN_CUPY ?= 14.2.0
.venv-cuda/.installed: $(wildcard tests/stand_in/*.* tests/stand_in/include/* tests/stand_in/include/cupy/*)
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --disable-pip-version-check 'torch===$(STAND_IN_TORCH)' cupy-cuda13x==$(STAND_IN_CUPY) \
		ml_dtypes 'pytest>=8,<10' hypothesis scikit-learn matplotlib pytest-benchmark 'setuptools>=77,<82' cython \
		'nvidia-cuda-crt<14' 'nvidia-cuda-profiler-api<14'
	CUPY_INSTALL_USE_STUB=1 .venv-cuda/bin/pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--no-binary cupy --dest .venv-cuda/stand-in cupy==$(STAND_IN_CUPY)
	.venv-cuda/bin/python tests/stand_in/build.py .venv-cuda/stand-in/cupy-$(STAND_IN_CUPY).tar.gz
	touch $@

test-stand-in: .venv-cuda/.installed
	TENSORBRIDGE_REQUIRE_GPU=1 PYTHONPATH=. .venv-cuda/bin/python -m pytest -q -m gpu --ignore tests/test_bench.py
	TENSORBRIDGE_REQUIRE_GPU=1 PYTHONPATH=. STAND_IN_GUARD=0 .venv-cuda/bin/python -m pytest -q -m gpu tests/test_bench.py

clean:
	rm -rf .venv .venv-cuda build dist *.egg-info
