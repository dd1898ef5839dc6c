# `make demo` and `make test` set up all they need; `make gpu` checks what needs an NVIDIA GPU, which the other tests do
# not use, as most are about a CPU and `device: auto` would take the GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv takes seconds where pip takes minutes, and environments on one disk share their packages.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable
WORKERS ?= 2
SLOW_WORKERS ?= 3  # the slow tests often wait for processes
# tests/conftest.py says which files come first.
PYTEST := CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --numprocesses
# Tests start hundreds of processes, which should not compile everything again, even where bytecode is not written.
export PYTHONDONTWRITEBYTECODE :=
METADATA := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test lint types test-fast test-slow tests test-all docs docs-links notebooks reference dist image image-gpu gpu format clean

demo: $(VENV)/installed-demo
	$(BIN)/kd-pipeline demo $(ARGS)

test: lint types test-fast

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/installed-test
	$(BIN)/mypy

test-fast: $(VENV)/installed-test
	$(PYTEST) $(WORKERS) -m 'not slow' $(ARGS)

test-slow: $(VENV)/installed-test
	$(PYTEST) $(SLOW_WORKERS) -m slow $(ARGS)

# In one session, where all tests of a file share what it has set up.
tests: $(VENV)/installed-test
	$(PYTEST) $(SLOW_WORKERS) $(ARGS)

test-all: lint types tests

# The site: pages, reference and pictures, with the notebooks executed. Warnings are errors, and so are broken links.
SPHINX := CUDA_VISIBLE_DEVICES= $(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --doctree-dir build/doctrees

docs: $(VENV)/installed-test
	$(SPHINX) docs build/docs $(ARGS)

# Writes what the site and GitHub show of configs and commands; a test compares it with the code.
reference: $(VENV)/installed-test
	$(BIN)/python tools/write_reference.py

# Stores what the notebooks print and draw, for GitHub.
notebooks: $(VENV)/installed-test
	CUDA_VISIBLE_DEVICES= $(BIN)/python tools/notebooks.py

# Asks every external address that the pages name, which needs the internet.
docs-links: $(VENV)/installed-test
	$(SPHINX) --builder linkcheck --define nb_execution_mode=off docs build/links $(ARGS)

# Without a GPU it ends here, with one line on stderr; -q makes make exit with status 1.
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
$(shell $(PYTHON) tools/gpu_check.py --look >&2)
ifeq ($(.SHELLSTATUS),1)
MAKEFLAGS += -q
endif
endif

# In a separate environment, as ONNX Runtime has different packages for CPUs and GPUs.
gpu:
	@$(MAKE) --no-print-directory VENV=.venv-gpu .venv-gpu/installed-gpu
	.venv-gpu/bin/python tools/gpu_check.py $(ARGS)

# The packages to publish, and a run of the wheel in an environment of its own.
dist: | $(BIN)/python
	$(BIN)/python tools/check_wheel.py

image:
	docker build --file docker/Dockerfile.cpu --tag kd_pipeline:cpu .

image-gpu:
	docker build --file docker/Dockerfile.gpu --tag kd_pipeline:gpu .

format: $(VENV)/installed-test
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .venv-gpu build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "kd_pipeline needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

$(VENV)/installed-demo: $(METADATA) | $(BIN)/python
	@echo "installing into $(VENV); the first time takes about a minute and 7 GB, most of it torch's CUDA libraries"
	$(INSTALL) '.[cpu,demo,train]'
	@touch $@

$(VENV)/installed-test: $(METADATA) | $(BIN)/python
	@echo "installing into $(VENV); the first time takes about a minute and 7 GB, most of it torch's CUDA libraries"
	$(INSTALL) '.[cpu,rtx,train,timm,demo,bench,docs,dev]'
	@touch $@

$(VENV)/installed-gpu: $(METADATA) | $(BIN)/python
	@echo "installing into $(VENV); the first time takes about a minute and 8 GB, most of it CUDA libraries"
	$(INSTALL) '.[cu13,rtx,train,timm,demo,bench,docs,dev]'
	@touch $@
