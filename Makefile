# make demo   the embedded checkpoint through the whole of toprovar: pictures, bundles, report in demo_output/
# make test   lint, types, import rules and tests
#
# Everything is set up in .venv. PyTorch is the CPU build: where the package index offers CUDA builds under the same
# version, give pip's options for one of CPU builds in PIP_TORCH_ARGS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_TORCH_ARGS ?=
BIN := $(VENV)/bin

.PHONY: help setup demo test lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 2

setup: $(VENV)/.installed

# PyTorch goes first and alone, so that no other requirement can draw in a build with CUDA.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_TORCH_ARGS) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[export,run,text,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[tensorrt-rtx,triton]' \
	  || echo "tensorrt-rtx or triton is not to be had for this machine: their tests will be skipped"
	touch $@

demo: setup
	$(BIN)/toprovar demo -o demo_output

lint: setup
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/mypy
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

format: setup
	$(BIN)/ruff check --fix src tests tools benchmarks
	$(BIN)/ruff format src tests tools benchmarks

clean:
	rm -rf $(VENV) build demo_output .pytest_cache .mypy_cache .ruff_cache
