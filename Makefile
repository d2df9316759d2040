# make install | demo | test | check | build. PYTHON picks the interpreter, VENV the place of the environment, WORKERS how many
# processes run the tests: as many as there are cores, each with one thread.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
WORKERS ?= auto
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: install demo test lint types slow check build

install: $(VENV)/.installed

# torch first and alone: otherwise a dependency may pull another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/hf-compress demo

test: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

slow: install
	$(PYTEST) -m slow

check: lint types test slow

# The wheel and the source distribution, in dist/, in an environment of their own, as an installer builds them.
build: install
	$(BIN)/python -m build
