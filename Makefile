# Two commands from nothing: `make run` serves the bundled model, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVED := $(VENV)/.served
TESTED := $(VENV)/.tested

.PHONY: run test lint clean

run: $(SERVED)
	@exec $(BIN)/stretto serve

test: $(TESTED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

lint: $(TESTED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/pyright

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Stretto needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(SERVED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TESTED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(SERVED)

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
