# `make demo` and `make test` work on a bare machine with Python 3.11+ and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
MODEL ?= qwen2.5-coder-0.5b-instruct

# OpenMP threads that spin while they wait starve whatever else runs on the machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-slow lint docs bench clean

help:
	@echo "make demo            train a 0.5B model with SDPO on format-rules-v0 and write a report"
	@echo "make demo COMPARE=1  the same, and GRPO beside it, both curves in one report"
	@echo "make setup           the virtual environment, with every extra"
	@echo "make test            the fast tests, in parallel"
	@echo "make test-slow       tests with a real model, a real browser, real packages"
	@echo "make lint            ruff, mypy --strict, import-linter"
	@echo "make docs            build the documentation, strictly"
	@echo "make bench           every benchmark, the quick way"

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	@touch $@

setup: $(VENV)/.ready

demo: $(VENV)/.ready
	$(BIN)/rlrf train docs/examples/demo_sdpo.toml --model $(MODEL) \
	  --run-dir runs/demo-sdpo-$(SEED) --set trainer.seed=$(SEED) --overwrite
ifdef COMPARE
	$(BIN)/rlrf train docs/examples/demo_grpo.toml --model $(MODEL) \
	  --run-dir runs/demo-grpo-$(SEED) --set trainer.seed=$(SEED) --overwrite --no-report
	$(BIN)/rlrf report runs/demo-sdpo-$(SEED) runs/demo-grpo-$(SEED) --out runs/demo-$(SEED).html
endif

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto -m "not slow" --cov=rlrf --cov-report=term --cov-fail-under=90

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

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
	rm -rf $(VENV) site dist build .pytest_cache .mypy_cache .ruff_cache
