# Everything starts here: `make help`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup test test-all test-faults lint format quickstart

PYTHON ?= python3
VENV := .venv
# Threads that spin while they wait would only take the time of the other processes on a small machine.
export OMP_WAIT_POLICY := passive
BIN := $(VENV)/bin
# Arguments for pytest or for the quickstart: make test ARGS='-k resume'
ARGS ?=
# The quickstart's time counts installing too.
STARTED := $(shell date +%s)

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# .venv/ready holds the checksum of all that decides what is installed, and is there only when all of it is:
# the same pins are reused, changed ones installed again, and what was interrupted is begun anew.
setup:  ## the virtual environment .venv, with everything that the tests and the quickstart need
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make setup needs Python 3.11 or later: make setup PYTHON=python3.11")'
	@version="$$($(PYTHON) -VV)"; \
	wanted="$$version $$(cat pyproject.toml setup.py constraints.txt | cksum) $$PWD"; \
	if [ -f $(VENV)/ready ] && [ "$$(cat $(VENV)/ready)" = "$$wanted" ]; then \
	    echo "setup: $(VENV) is ready"; exit; \
	fi; \
	start=$$SECONDS; \
	say() { echo "setup: [$$1/3] $$2 ($$((SECONDS - start)) s)"; }; \
	say 1 "making $(VENV) with $${version%% (*}"; \
	reuse=--clear; case "$$(cat $(VENV)/ready 2>/dev/null || true)" in "$$version "*" $$PWD") reuse=;; esac; \
	rm -f $(VENV)/ready; \
	$(PYTHON) -m venv $$reuse $(VENV); \
	install() { $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$@" \
	    2> >(grep -v '^WARNING: Location ' >&2); }; \
	say 2 "installing torch"; \
	install torch; \
	say 3 "installing llm_recipes and the other packages"; \
	install -e '.[test]'; \
	echo "$$wanted" > $(VENV)/ready; \
	echo "setup: done in $$((SECONDS - start)) s"

PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test: setup  ## the tests (ten minutes on two cores)
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: setup  ## these and the slow ones, which start torchrun, or train a real model (twenty minutes)
	$(PYTEST) $(ARGS)

test-faults: setup  ## processes killed, stopped and preempted, checkpoints damaged (half an hour); writes benchmarks/results/faults.md
	$(BIN)/python -m pytest -m faults $(ARGS) tests/faults

lint: setup  ## style, types, and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## rewrite the code in the house's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: setup  ## teach a small pretrained model some Japanese, here and now (ten minutes at most)
	@$(BIN)/python recipes/quickstart/quickstart.py started=$(STARTED) $(ARGS)
