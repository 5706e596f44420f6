# make quickstart   create the environment and run experiments/quickstart.yaml
# make test         create the environment and run the tests, slow ones excluded
# make test-slow    the slow tests: real vLLM, Ray and SmolLM2
# make bench        every figure against what people use: hours; choose with ARGS (tests/benchmarks/README.md)
# make faults       kill, fill, damage, interrupt: small real runs, each held against one that nobody disturbed (an hour or two)
# make bad-input    every wrong file, key, option and folder: each must end in one line with nothing lost (minutes)
# make soak         200 rounds in one process: memory, open files, shared memory and seconds a round
# make lint         ruff and mypy
# make lock         resolve both locks anew (needs uv)
# make environment  create the environment and nothing else
# make clean        remove the environment and the tools' caches; runs/ stays
#
# Variables: LOCK=cpu|cuda (default: cuda where nvidia-smi finds a GPU), PYTHON=python3, VENV=.venv,
# ARGS="…" goes to online-dpo, pytest or the benchmarks.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow bench faults bad-input soak lint lock clean environment

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
UV ?= uv
ifndef LOCK
LOCK := $(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),cuda,cpu)
endif
ifeq ($(filter $(LOCK),cpu cuda),)
$(error LOCK is '$(LOCK)'; it can be cpu or cuda)
endif

BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages-$(LOCK)
PROJECT := $(VENV)/.project-$(LOCK)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Progress bars on a terminal only.
QUIET := $(if $(MAKE_TERMOUT),,--quiet)

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(PROJECT)
	@$(BIN)/online-dpo run experiments/quickstart.yaml $(ARGS)

test: $(PROJECT)
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(PROJECT)
	@$(BIN)/python -m pytest -m slow --durations=20 $(ARGS)

bench: $(PROJECT)
	@$(BIN)/python tests/benchmarks/bench.py $(ARGS)

faults: $(PROJECT)
	@$(BIN)/python tests/faults/faults.py $(ARGS)

bad-input: $(PROJECT)
	@$(BIN)/python tests/bad_input/bad_input.py $(ARGS)

soak: $(PROJECT)
	@$(BIN)/python tests/faults/soak.py $(ARGS)

lint: $(PROJECT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

environment: $(PROJECT)

# A changed lock makes the environment anew: pip installs what a lock names but does not remove what it no longer does.
$(PACKAGES): requirements/$(LOCK).txt
	@case "$$(uname -sm)" in "Linux x86_64") ;; *) echo "The locks are for Linux x86-64, this is $$(uname -sm); \
	  see 'Without the locks' in README.md" >&2; exit 1;; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "Python 3.11 or newer is needed; \
	'$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1 || true). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make environments: install its venv module \
	(on Debian and Ubuntu the package python3-venv), or name another Python: make PYTHON=… $(MAKECMDGOALS)" >&2; exit 1; }
	@if [ -e "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ]; then echo "'$(VENV)' exists and was not made by venv: \
	it is left alone. Name another folder: make VENV=… $(MAKECMDGOALS)" >&2; exit 1; fi
	@echo "environment: $$(grep -c == $<) packages of $< into $(VENV)"
	@$(PYTHON) -m venv --clear "$(VENV)"
ifeq ($(LOCK),cpu)
	@torch="$$(sed -n 's/^torch==//p' $<)"; $(PIP) install $(QUIET) --no-deps "torch==$$torch+cpu" || { echo "No CPU \
	build of torch $$torch found; see 'Which build of torch' in README.md" >&2; exit 1; }
endif
	@$(PIP) install $(QUIET) --no-deps --requirement $<
	@touch $@

# Without dependencies (the lock has them) and in this environment (isolation would download a setuptools of its own).
$(PROJECT): $(PACKAGES) pyproject.toml requirements/check.py requirements/left-out-$(LOCK).txt
	@$(PIP) install $(QUIET) --no-deps --no-build-isolation --editable .
	@$(BIN)/python requirements/check.py $(LOCK)
	@touch $@

# uv reads UV_EXTRA_INDEX_URL and the like from the environment. Only the CPU lock may see the folder or page of
# CPU wheels (UV_FIND_LINKS_CPU): the CUDA lock would take them too.
lock:
	@for lock in cpu cuda; do \
	  links=(); if [ $$lock = cpu ]; then links=(--find-links "$${UV_FIND_LINKS_CPU:?the folder or page of CPU wheels of torch}"); fi; \
	  $(UV) pip compile pyproject.toml --extra $$lock --extra quickstart --extra dev \
	    --overrides requirements/left-out-$$lock.txt "$${links[@]}" --upgrade --no-build \
	    --python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-annotate --no-header --quiet \
	    > requirements/$$lock.new; \
	  { grep '^#' requirements/$$lock.txt; sed 's/+cpu$$//' requirements/$$lock.new; } > requirements/$$lock.both; \
	  mv requirements/$$lock.both requirements/$$lock.txt; rm requirements/$$lock.new; \
	done

clean:
	@if [ -e "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist ./*.egg-info
