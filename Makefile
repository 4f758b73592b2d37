# `make demo` and `make test` work on a bare machine with Python 3.11+ and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
MODEL ?= qwen2.5-coder-0.5b-instruct

# What is installed is what requirements.lock says, on any later day. constraints.txt pins torch
# apart from it: its build, and so what it needs, differs from machine to machine.
LOCKED := -c constraints.txt -c requirements.lock
OLDEST := -c constraints.txt -c requirements.oldest
, := ,
OLD_EXTRAS := train$(,)docker$(,)data$(,)dev

# OpenMP threads that spin while they wait starve whatever else runs on the machine.
export OMP_WAIT_POLICY ?= PASSIVE
# What every process of the tests would otherwise compile anew is kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test coverage test-slow test-newest test-oldest versions lock lint docs bench clean

help:
	@echo "make demo            train a 0.5B model with SDPO on format-rules-v0 and write a report"
	@echo "make demo COMPARE=1  the same, and GRPO beside it, both curves in one report"
	@echo "make setup           the virtual environment, with every extra, as requirements.lock has it"
	@echo "make test            the fast tests, in parallel"
	@echo "make coverage        the same, and how much of rlrf's API they reach (takes half as long again)"
	@echo "make test-slow       tests with docker, a real model, a real browser, real packages"
	@echo "make test-newest     the fast tests with the newest of every library that resolves"
	@echo "make test-oldest     the fast tests with the oldest of every library that is supported"
	@echo "make lint            ruff, mypy --strict, import-linter"
	@echo "make docs            build the documentation, strictly"
	@echo "make bench           every benchmark, the quick way"
	@echo "make lock            take today's newest libraries into requirements.lock"

# One line for every library: set-up is not silent while it downloads.
PIP_SAYS := --disable-pip-version-check --progress-bar off

# venv FOLDER, PIP'S CONSTRAINTS, EXTRAS: hatchling comes first, so that the build uses that one.
define venv
	@$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install $(PIP_SAYS) $(2) pip hatchling editables
	$(1)/bin/python -m pip install $(PIP_SAYS) $(2) --no-build-isolation -e '.[$(3)]'
endef

$(VENV)/.ready: pyproject.toml constraints.txt requirements.lock
	@echo "setting up $(VENV) with what requirements.lock pins: some hundred MB, a minute or two"
	$(call venv,$(VENV),$(LOCKED),all)
	@touch $@

setup: $(VENV)/.ready

# Fewer evaluations than in the published runs: they took a third of the demo's time.
DEMO := --set trainer.eval_steps=6 --set trainer.eval_tasks=64 --overwrite
demo: $(VENV)/.ready
	@echo "the demo: fetches $(MODEL) if it is not here (0.5 GB), trains it with SDPO on"
	@echo "format-rules-v0, and writes a report to runs/demo-sdpo-$(SEED); 10 to 15 minutes on 2 cores"
	$(BIN)/rlrf train docs/examples/demo_sdpo.toml --model $(MODEL) \
	  --run-dir runs/demo-sdpo-$(SEED) --set trainer.seed=$(SEED) $(DEMO)
ifdef COMPARE
	$(BIN)/rlrf train docs/examples/demo_grpo.toml --model $(MODEL) \
	  --run-dir runs/demo-grpo-$(SEED) --set trainer.seed=$(SEED) $(DEMO) --no-report
	$(BIN)/rlrf report runs/demo-sdpo-$(SEED) runs/demo-grpo-$(SEED) --out runs/demo-$(SEED).html
endif

FAST := pytest -n auto --dist worksteal -m "not slow"

test: $(VENV)/.ready
	$(BIN)/python -m $(FAST)

coverage: $(VENV)/.ready
	$(BIN)/python -m $(FAST) --cov=rlrf --cov-report=term --cov-fail-under=90

# What measures how time grows has the machine to itself.
TIMED := tests/test_linear_work.py tests/test_untrusted_values.py tests/test_reasoning.py
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow $(addprefix --ignore=,$(TIMED))
	$(BIN)/python -m pytest -m slow $(TIMED)

# Newest: made anew each time, since what is newest changes.
test-newest:
	rm -rf .venv-newest
	$(call venv,.venv-newest,-c constraints.txt,all)
	$(MAKE) versions VENV=.venv-newest
	.venv-newest/bin/python -m $(FAST)

# Oldest: the libraries; what we test and build with stays as it is locked. Old libraries use what
# others have deprecated since: not ours to mend.
.venv-oldest/.ready: pyproject.toml constraints.txt requirements.oldest
	$(call venv,.venv-oldest,$(OLDEST),$(OLD_EXTRAS))
	@touch $@

test-oldest: .venv-oldest/.ready
	$(MAKE) versions VENV=.venv-oldest
	.venv-oldest/bin/python -m $(FAST) \
	  -W default::DeprecationWarning -W default::PendingDeprecationWarning -W default::FutureWarning

versions:
	@$(BIN)/python -m pip list --format=freeze | paste -sd ' ' | fold -s -w 100

# Universal: one file for every Python from 3.11 on. torch's own build is left out with all of CUDA.
COMPILE := .venv-lock/bin/uv pip compile -q -c constraints.txt --no-header --no-annotate pyproject.toml
NO_TORCH := grep -vE '^(torch|triton|nvidia-|cuda-)'
TOOLS := ^(pytest[a-z-]*|hypothesis|ruff|mypy|import-linter|pre-commit|pip|hatchling|editables)==
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	( echo "# Made by 'make lock' from pyproject.toml, for all Pythons."; \
	  $(COMPILE) --universal --python-version 3.11 --extra all | $(NO_TORCH) ) > .venv-lock/locked
	grep -E '$(TOOLS)' .venv-lock/locked > .venv-lock/tools
	( echo "# Made by 'make lock': the oldest libraries that pyproject.toml allows, on Python 3.11."; \
	  $(COMPILE) --resolution lowest-direct --python-version 3.11 -c .venv-lock/tools \
	    $(addprefix --extra ,$(subst $(,), ,$(OLD_EXTRAS))) | $(NO_TORCH) ) > .venv-lock/oldest
	mv .venv-lock/locked requirements.lock
	mv .venv-lock/oldest requirements.oldest
	rm -rf .venv-lock

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.ready
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.ready
	@for f in benchmarks/*.py; do echo "== $$f"; $(BIN)/python $$f --quick || exit 1; done

clean:
	rm -rf .venv .venv-newest .venv-oldest site dist build .pytest_cache .mypy_cache .ruff_cache
