SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
OUT ?= runs/gpu
BIN := $(VENV)/bin
ENV := env -u PYTHONPATH
PYTEST = $(ENV) $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help demo gate test lint format bench scaling gpu docs mutants clean

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tilework needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(ENV) $(BIN)/python -m pip install --quiet --upgrade pip

# One stamp for each extra; installing again is needed only when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(ENV) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-bench ## train a small language model, with Tilework and with plain torch
	$(ENV) $(BIN)/python examples/demo $(ARGS)

gate: $(VENV)/.installed-bench ## train gates that select blocks of keys for a small language model
	$(ENV) $(BIN)/python examples/gate $(ARGS)

# Each test runs once: what is traced or interprets a kernel as it is, all else under the checker.
# One half may select no test, which pytest calls 5.
test: $(VENV)/.installed-test ## the whole suite that needs no GPU; ARGS=tests/test_checks.py
	half=0; $(PYTEST) -m untyped $(ARGS) || half=$$?; ((half == 0 || half == 5)); \
	$(PYTEST) -m 'not untyped' --jaxtyping-packages=tilework,beartype.beartype $(ARGS) \
		|| (($$? == 5 && half == 0))

lint: $(VENV)/.installed-lint ## ruff format, ruff check, mypy
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.installed-lint ## ruff format, and what ruff check can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.installed-bench,peers ## measure; ARGS='linear_cross_entropy --out results.jsonl'
	$(ENV) $(BIN)/tilework bench $(ARGS)

scaling: $(VENV)/.installed-bench ## how time grows with work; ARGS='--out scaling.jsonl --resume'
	$(ENV) $(BIN)/tilework bench --scaling --seconds 2 --no-memory $(ARGS)

gpu: ## check every kernel on this machine's GPU, then measure; needs no network and no install
	PYTHON='$(PYTHON)' OUT='$(OUT)' benchmarks/gpu.sh

docs: $(VENV)/.installed-docs ## build the documentation site in build/docs
	$(ENV) $(BIN)/python -m sphinx -q -W --keep-going docs build/docs

mutants: $(VENV)/.installed-mutants ## mutation testing; FILE=src/tilework/..., TESTS=tests/...
	$(ENV) BIN=$(abspath $(BIN)) tests/mutants.sh '$(FILE)' '$(TESTS)'

clean: ## remove what was built, and the virtual environment
	rm -rf build runs $(VENV)
