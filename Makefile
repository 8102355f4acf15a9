# One-line targets; `make run` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

help:            ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/'

install: $(VENV)/.installed  ## a virtual environment in .venv with the package
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q -e . && touch $@

testing: $(VENV)/.testing  ## the same with the test extra
$(VENV)/.testing: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[test]' && touch $@

run: install     ## the baseline run: three corpora, five cells (about eight minutes on two cores)
	$(BIN)/python experiment.py --out_dir=run_0

plot: install    ## figures and the comparison of all runs with run_0
	$(BIN)/python plot.py

test: testing    ## the quick tests
	$(BIN)/python -m pytest -q -n auto

slow: testing    ## the slow tests
	$(BIN)/python -m pytest -q -m slow

bench: install   ## speed and memory beside the peers (PEERS_PYTHON=... adds them; docs/speed.md), about half an hour
	$(BIN)/python benchmarks/bench.py

check: testing   ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.PHONY: help install testing run plot test slow bench check
