# Every target that needs Python builds or updates the environment in $(VENV) by itself.
# Overridable: make PYTHON=python3.12 VENV=venv <target>

PYTHON ?= python3
VENV ?= .venv
LOGDIR ?= demo_output
PYTEST_WORKERS ?= 2

BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt
# --no-compile: pip would compile all for a minute, most of it never imported. What is, Python compiles and keeps by itself.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(CONSTRAINTS)
MANIFEST := pyproject.toml constraints.txt

# One stamp per level of installation; each is renewed when the manifest changes, otherwise reused.
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
ATARI := $(VENV)/.installed-atari
DOCS := $(VENV)/.installed-docs
BENCH := $(VENV)/.installed-bench

# The nets are small: one thread per worker is faster than workers that fight for the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MPLBACKEND=Agg
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help format check-format lint type check-architecture test test-slow docs check \
        look demo demo-atari tensorboard bench-install build clean test-versions mutation release-check

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

format: $(DEV)  ## Sort imports and format the code
	$(BIN)/ruff check --select I --fix --exit-zero .
	$(BIN)/ruff format .

check-format: $(DEV)  ## Fail when a file is not formatted
	$(BIN)/ruff format --check .

lint: $(DEV)  ## Lint with ruff
	$(BIN)/ruff check .

type: $(DEV)  ## Type-check the package with mypy (strict)
	$(BIN)/mypy sb3_flipout

check-architecture: $(DEV)  ## Check the import contract between the rings
	$(PYTEST) -q tests/test_architecture.py

check: check-format lint type check-architecture  ## Format, lint, types and import contract

test: $(DEV)  ## Run the fast tests
	$(PYTEST) -n $(PYTEST_WORKERS) --dist worksteal

# A database that two workers share is among them. As root on Debian it is installed; elsewhere that test says what is missing.
test-slow: $(DEV)  ## Run the slow tests
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
	    { [ "$$(id -u)" = 0 ] && apt-get install -y -qq --no-install-recommends postgresql; } || true
	$(PYTEST) -m slow -n $(PYTEST_WORKERS) --dist worksteal

test-versions:  ## Run the tests under the lowest and newest versions (ROWS="lowest newest")
	$(PYTHON) .ci/versions.py $(if $(ROWS),--rows $(ROWS))

mutation: $(DEV)  ## Change lines one by one: which changes does no test notice? (MUTANTS="sb3_flipout.noise.*")
	$(INSTALL) mutmut
	$(ONE_THREAD) $(BIN)/python -m mutmut run --max-children 2 $(MUTANTS)
	$(BIN)/python -m mutmut results

docs: $(DOCS)  ## Build the documentation into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

look: docs  ## Look at the handbook's pages in Chromium, at two widths, without a network
	$(INSTALL) playwright
	$(BIN)/python docs/look_at_pages.py

demo: $(CORE)  ## Run the demo (installs the package only)
	$(BIN)/python examples/demo.py

demo-atari: $(ATARI)  ## Run the Atari demo (installs the atari extra)
	$(BIN)/python examples/demo_atari.py

tensorboard: $(CORE)  ## Show the logs of LOGDIR (default: demo_output)
	$(BIN)/tensorboard --logdir $(LOGDIR)

bench-install: $(BENCH)  ## Install what the benchmarks need, next to the dev tools

build: $(DEV)  ## Build the sdist and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build

release-check:  ## Build, check the metadata, install the wheel in a clean environment and run the demo from it
	.ci/release_check

clean:  ## Remove caches and build outputs (the environment and the runs stay)
	rm -rf build dist docs/_build docs/_api .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -path './$(VENV)' -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(CORE): $(MANIFEST) | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# The other levels hold the core one, so that a finished one also satisfies `make demo`.
$(DEV): $(MANIFEST) | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@touch $(CORE) $@

$(ATARI): $(MANIFEST) | $(BIN)/python
	$(INSTALL) -e ".[atari]"
	@touch $(CORE) $@

$(DOCS): $(MANIFEST) | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	@touch $(CORE) $@

$(BENCH): $(MANIFEST) | $(BIN)/python
	$(INSTALL) -e ".[dev,bench]"
	@touch $(CORE) $@
