# Two commands do everything on a machine with Python 3.11+ and a C compiler:
#   make demo    builds, then runs the bundled model under a RAM cap
#   make test    builds, then runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test parity lint wheel clean

demo: $(VENV)/.installed
	$(BIN)/flashllm demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q $(ARGS)

# Needs torch and transformers, which are large: only for this target.
parity: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet "torch==2.13.0" transformers
	$(BIN)/python bench/parity.py $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet "ruff>=0.6"
	$(BIN)/ruff check .

wheel: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist .

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
