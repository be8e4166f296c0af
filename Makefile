# mmalign: `make` lists the targets. VENV=DIR works in another environment than .venv.

VENV   ?= .venv
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p -c "" 2>/dev/null && command -v $$p && break; done)
EXTRAS ?= dev,docs,tensorboard,video
BIN    := $(VENV)/bin
READY  := $(VENV)/.mmalign-ready

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all check format docs bench wheel clean
.DELETE_ON_ERROR:

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY) ## make .venv with everything, mmalign itself editable

demo: $(READY) ## base -> online training -> compare on Shapes; a table and a report in runs/demo
	$(BIN)/mmalign demo

test: $(READY) ## the tests (slow ones left out)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

test-all: $(READY) ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m ""

check: $(READY) ## style and types: ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## build the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(READY) ## measure speed on this machine
	$(BIN)/python -m benchmarks

wheel: $(READY) ## build dist/*.whl, with the configs and assets inside
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean: ## delete environments, caches and builds; runs/ stays
	rm -rf .venv .venv-* build dist site .pytest_cache .mypy_cache .ruff_cache
	find mmalign pipelines rewards tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Made once, and again when the dependencies change.
$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python found; install Python 3.11 or newer" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), and mmalign needs 3.11 or newer;" \
	    "install it, or name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	@touch $@
