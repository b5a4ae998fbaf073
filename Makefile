# `make demo` and `make test` on a fresh machine: Python 3.11 and pip, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready

.PHONY: demo test test-all lint format docs figures clean

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

demo: $(READY)  ## SmolLM2 quantized to about 2.25 bits, saved, reloaded and compared
	$(BIN)/framequant demo

test: $(READY)  ## the test suite, without the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu"

test-all: $(READY)  ## everything that runs without a GPU
	$(BIN)/python -m pytest -q -m "not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(DOCS_READY): requirements-docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.lock
	touch $(DOCS_READY)

docs: $(DOCS_READY)  ## the documentation site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

figures: $(DOCS_READY)  ## the figures of the documentation, from the CSV files of this repository
	$(DOCS)/bin/python docs/make_figures.py

clean:
	rm -rf $(VENV) $(DOCS) build dist .pytest_cache .mypy_cache .ruff_cache
