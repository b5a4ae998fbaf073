# `make demo` and `make test` on a fresh machine: Python 3.11 and pip, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := $(VENV)/bin
SITE := $(VENV)/lib/python$(MINOR)/site-packages
READY := $(VENV)/.ready

DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready

.PHONY: demo test test-all test-oldest test-vllm test-notebooks lint format docs figures clean

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

# Environments that see the packages of $(VENV) and put a few of their own before them.
.venv-%/.ready: requirements-%.lock $(READY)
	$(PYTHON) -m venv .venv-$*
	printf '%s\n' "$(CURDIR)/src" "$(CURDIR)/$(SITE)" > .venv-$*/lib/python$(MINOR)/site-packages/below.pth
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed -r $<
	touch $@

# Another Python: what is compiled for the first alone is installed again, the rest is found below.
.venv-python3.%/.ready: requirements.lock $(READY)
	PYENV_VERSION=3.$* python3.$* -m venv $(@D)
	printf '%s\n' "$(CURDIR)/src" "$(CURDIR)/$(SITE)" > $(@D)/lib/python3.$*/site-packages/below.pth
	grep -l '^Tag: cp$(subst .,,$(MINOR))-cp$(subst .,,$(MINOR))-' $(SITE)/*.dist-info/WHEEL \
		| sed 's|.*/\(.*\)-\(.*\)\.dist-info/WHEEL|\1==\2|' > $(@D)/compiled.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --ignore-installed -r $(@D)/compiled.txt
	touch $@

.PRECIOUS: .venv-python3.%/.ready

PYTHON_TESTS ?= tests

test-python3.%: .venv-python3.%/.ready  ## the test suite under Python 3.12 or 3.13
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -q -n 2 -m "not slow and not gpu" $(PYTHON_TESTS)

OLDEST ?= tests/integrations tests/model tests/streaming

test-oldest: .venv-oldest/.ready  ## models and integrations with the oldest transformers that is supported
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n 2 -m "not slow and not gpu" $(OLDEST)

test-vllm: .venv-vllm/.ready  ## the plugin in vLLM's own classes, on the CPU (Linux, x86-64)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q tests/integrations/test_vllm_real.py

test-notebooks: $(READY)  ## the notebooks of the documentation, executed
	$(BIN)/python -m pytest -q tests/docs/test_notebooks.py

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
	rm -rf $(VENV) $(DOCS) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache
