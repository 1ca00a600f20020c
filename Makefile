# make demo | test | lint | reference | clean.  Everything is installed in .venv, which is made on first use and when the pins change.
# In a terminal, pip shows its progress. PYTHON=... selects the interpreter (3.11 or newer); PYTEST_ARGS=... goes to pytest ("-n 0": all tests in one process).

SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $$([ -t 2 ] || echo --quiet) -c constraints.txt
PINS := pyproject.toml constraints.txt
RECIPE ?= quickstart
PYTEST_ARGS ?=
# A process for each core, up to four (tests/beside.py); each takes a file at a time, the longest first.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint reference clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-ready
	$(BIN)/nanoengine run $(RECIPE)

test: $(VENV)/.test-ready
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reference: $(VENV)/.test-ready
	$(BIN)/python docs/generate

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "nanoengine needs Python 3.11 or newer, found: $$(python3 --version 2>&1). Install one, or say which:" \
			"make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "cannot make $(VENV): on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }

$(VENV)/.demo-ready: $(PINS) | $(BIN)/python
	@echo "Installing nanoengine into $(VENV) (once; torch is the large part: about 1.4 GB on disk as a CPU build, 5 GB with CUDA)"
	$(PIP) -e .
	@touch $@

$(VENV)/.test-ready: $(PINS) | $(BIN)/python
	@echo "Installing nanoengine and its test tools into $(VENV) (once)"
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.demo-ready
