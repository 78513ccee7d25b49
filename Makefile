# The whole project from a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Every target installs what it needs into $(VENV) first, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Tests run one thread each, in as many processes as there are cores, up to four.
JOBS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu test-oldest test-newest lint format types docs docs-serve clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dynalora needs Python 3.10 or newer; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: a second run installs nothing unless the requirements changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

# Keeps the stamps, which make would otherwise delete as intermediate files.
.PRECIOUS: $(VENV)/.installed-%

demo: $(VENV)/.installed-demo ## Fine-tune a small language model and report what it learned and forgot
	$(BIN)/dynalora demo --output runs/demo-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests (without the slow and GPU ones)
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/.installed-dev ## Run the slow tests, on a real model
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(VENV)/.installed-dev ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-oldest: ## Run the tests with the oldest supported versions, in an environment of their own
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	.venv-oldest/bin/python -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile $(ARGS)

# torch stays the tested one: what the index serves as newest may be a build for accelerators, of several gigabytes.
test-newest: ## Run the tests with the newest versions there are, in an environment of their own
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check --upgrade --upgrade-strategy eager \
		"$(shell grep -m1 '^torch==' constraints.txt)" -e ".[dev]"
	.venv-newest/bin/python -m pip list --disable-pip-version-check | grep -iE '^(accelerate|datasets|peft|torch|transformers|trl) '
	.venv-newest/bin/python -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## Fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy

docs: $(VENV)/.installed-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed-docs ## Show the documentation while writing it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean: ## Remove the environment, caches and built files
	rm -rf $(VENV) .venv-oldest .venv-newest site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
