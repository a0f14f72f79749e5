# Two commands do everything on a machine with Python 3.11+ and a C compiler:
#   make demo    builds, then runs the bundled model under a RAM cap
#   make test    builds, then runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test long soak bench parity lint wheel wheel-test clean

demo: $(VENV)/.installed
	$(BIN)/flashllm demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q $(ARGS)

# What takes too long for every change: about two hours, half of it the soak. One after the other, all
# of them (or PARTS="tests soak"), failing at the end if one failed; writes bench/results/long.md.
long: $(VENV)/.installed-test
	-$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python bench/long.py $(PARTS)

# One engine at half of the model for DURATION seconds; memory, threads and tokens must not change.
DURATION ?= 3600
soak: $(VENV)/.installed
	$(BIN)/flashllm stress --soak $(DURATION)

# Micro-benchmarks as ratios to named baselines: a table, and build/micro.json for comparing.
# FLASHLLM_BENCH_DIR says which disk; make bench ARGS="-k kernels" takes some of them.
bench: $(VENV)/.installed-test
	mkdir -p build
	$(BIN)/python -m pytest -q bench/micro --benchmark-json=build/micro.json $(ARGS)

# Needs torch and transformers, which are large: only for this target.
parity: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet "torch==2.13.0" transformers
	$(BIN)/python bench/parity.py $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet "ruff>=0.6"
	$(BIN)/ruff check .

wheel: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# The wheel in empty environments, one for each interpreter named (abi3: one wheel for all).
PYTHONS ?= $(PYTHON)
wheel-test: wheel
	set -e; for python in $(PYTHONS); do \
	  rm -rf build/wheel-env; $$python -m venv build/wheel-env; \
	  build/wheel-env/bin/pip install --quiet dist/*.whl; \
	  build/wheel-env/bin/python -P tests/wheel_smoke.py; \
	done

SOURCES = setup.py pyproject.toml $(wildcard ext/*)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashllm needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info flashllm/_core*.so
