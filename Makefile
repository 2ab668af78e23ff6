# make quickstart | test | lint | figures | docs | site | clean; `make help` says what each does.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
PINS := pyproject.toml constraints.txt
# Tests are many small models: one thread each and a few processes are faster than many threads.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: help quickstart test lint figures docs site clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   the main job end to end on this machine: no account, no model hub, no GPU"
	@echo "make test         the test suite"
	@echo "make lint         ruff and mypy"
	@echo "make figures      every table, figure and page again from results/"
	@echo "make docs         the tables and the notebook's outputs in docs/ again from the code"
	@echo "make site         the documentation as pages, in site/"
	@echo "make clean        remove $(VENV), caches and build outputs; results/ stays"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter that makes $(VENV)."

quickstart: $(VENV)/.quickstart
	$(BIN)/bench sweep sweeps/quickstart.yaml

test: $(VENV)/.dev
	$(PYTEST) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: $(VENV)/.quickstart
	$(BIN)/python -m analysis

docs: $(VENV)/.dev
	$(BIN)/python -m bench.describe docs/methods.md docs/saved.md
	$(BIN)/python docs/hooks/notebook.py

site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html opens in any browser"

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is '$$($(PYTHON) --version 2>/dev/null || echo not there)'; Python 3.11, 3.12 or 3.13 is needed." \
	       "Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.quickstart: $(VENV)/.made $(PINS)
	@echo "installing pinned packages into $(VENV); the first time takes minutes"
	@$(PIP) install --constraint constraints.txt --editable '.[quickstart]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made $(PINS)
	@echo "installing pinned packages into $(VENV); the first time takes minutes"
	@$(PIP) install --constraint constraints.txt --editable '.[quickstart,dev,docs]'
	@touch $@ $(VENV)/.quickstart
