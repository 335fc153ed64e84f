# make train: set up and train the demo.   make test: set up and run every check.
# make sweep: set up and search fusion and scaling of a very small network, in minutes.
# make docs: set up and build the documentation, docs/_build/index.html.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help setup train sweep docs test test-unit test-slow test-chaos lint clean

help:
	@sed -n 's/^# //p' Makefile; echo "others: setup lint test-unit test-slow test-chaos clean"

setup: $(STAMP)

# The folder appears under its name only when it is complete, so an interrupted set-up starts anew.
$(STAMP): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON: expected python 3.11 or newer, got $$($(PYTHON) --version); make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (about 5 GB the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	@touch $(STAMP)

train: $(STAMP)
	@$(BIN)/python jobs/train.py --config jobs/configs/shapes.yaml $(ARGS)

sweep: $(STAMP)
	@$(BIN)/python jobs/tune.py --config jobs/sweeps/smoke.yaml $(ARGS)

docs: $(STAMP)
	@$(BIN)/sphinx-build -W -n --keep-going -q docs docs/_build
	@echo "look at it: docs/_build/index.html"

test: $(STAMP) lint test-unit
	@$(PYTEST) -m "integration and not slow and not chaos" tests

test-unit: $(STAMP)
	@OMP_NUM_THREADS=1 $(PYTEST) -n 2 -m "not slow and not chaos and not integration" tests

test-slow: $(STAMP)
	@$(PYTEST) -m slow tests

test-chaos: $(STAMP)
	@$(PYTEST) -m chaos tests

lint: $(STAMP)
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet . && $(BIN)/mypy --no-error-summary

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache docs/_build docs/generated
