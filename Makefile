# `make run` serves the bundled model. `make check` is the fast test, `make test` the whole one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVED := $(VENV)/.served
TESTED := $(VENV)/.tested
# Pure unit tests: no server, no engine process.
FAST := tests/test_layout.py tests/test_docs.py tests/test_config.py tests/protocol tests/text tests/telemetry \
    tests/engine/scheduler tests/engine/test_step_time.py

# Tests that compute, in two processes at once. All others start servers or measure threads, and run one by one.
COMPUTE := $(addprefix tests/,kernels models ladder optimise recipes simulator text protocol) \
    $(addprefix tests/engine/,runners scheduler speculative structured variants)
THREADS := tests/kernels/test_cpu_threads.py

.PHONY: run ladder check test lint coverage docs clean

DESK = $(BIN)/python -m recipes.desk.train --count 0

# The bundled ladder from nothing: needs a GPU. int8 is measured where it serves: on a CPU.
ladder: $(TESTED)
	test -e build/desk || $(DESK) --out build/desk --minutes 9
	test -e build/desk-small || $(DESK) --out build/desk-small --minutes 3 --layers 4 --hidden 192 --kv-heads 1
	test -e build/desk-tiny || $(DESK) --out build/desk-tiny --minutes 3 --layers 4 --hidden 128 --kv-heads 1 \
		--inner 384 --levels 0.45,0.2,0.14,0.1,0.06,0.05
	$(BIN)/python -m recipes.desk.samples build/desk-samples --train 60000
	$(BIN)/stretto optimise recipes/desk/ladder.yaml --out build/desk-ladder --resume --until tiny
	$(BIN)/stretto optimise recipes/desk/ladder.yaml --out build/desk-ladder --resume --device cpu

run: $(SERVED)
	@exec $(BIN)/stretto serve

check: $(TESTED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/python -m pytest -q $(FAST)

test: $(TESTED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/pyright
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations=25 $(COMPUTE) --ignore=$(THREADS)
	$(BIN)/python -m pytest $(THREADS)
	$(BIN)/python -m pytest --durations=25 $(addprefix --ignore=,$(COMPUTE))

lint: $(TESTED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/codespell
	$(BIN)/pyright

coverage: $(TESTED)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort=cover

docs: $(TESTED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Stretto needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(SERVED): pyproject.toml | $(BIN)/python
	@echo "Installing Stretto and its dependencies into $(VENV), once."
	@echo "torch is most of the download: about 200 MB if it is built for CPUs, up to 3 GB with the CUDA libraries."
	$(BIN)/python -m pip install --editable .
	@touch $@

$(TESTED): pyproject.toml | $(BIN)/python
	@echo "Installing Stretto, its dependencies and the development tools into $(VENV), once."
	@echo "torch is most of the download: about 200 MB if it is built for CPUs, up to 3 GB with the CUDA libraries."
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(SERVED)

clean:
	rm -rf $(VENV) build dist site *.egg-info src/*.egg-info
