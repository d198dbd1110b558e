# Every target sets up what it needs in .venv first; a fresh clone needs only Python 3.11 or newer and g++.
# PYTHON=python3.12 make test   chooses the interpreter that .venv is made from.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
PYTEST_ARGS ?=
# Most of a test is Dynamo tracing on one core: files run side by side, each on one OpenMP thread unless a test asks for
# more. Two teams of threads that wait for one another on two cores would take twice as long.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
BENCH_ARGS ?=
GPU_ARGS ?=

.PHONY: help setup test test-all test-gpu lint format typecheck bench bench-gpu demo clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

# The first interpreter that is new enough; its `venv` module must be able to install pip.
$(BIN)/python:
	@chosen=""; \
	for candidate in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python3.14); do \
	  if command -v $$candidate >/dev/null && $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    chosen=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "llmopt needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1)." >&2; \
	  echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or say PYTHON=/path/to/python make ..." >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) from $$($$chosen --version)"; \
	$$chosen -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(STAMP): pyproject.toml | $(BIN)/python
	@command -v $${CXX:-g++} >/dev/null || command -v clang++ >/dev/null || \
	  echo "warning: no C++ compiler (apt install g++): llmopt will run on ATen only, and kernel tests are skipped" >&2
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[dev,bench]"
	@touch $@

setup: $(STAMP) ## make .venv and install everything into it

test: lint typecheck ## ruff, mypy and the tests (what CI runs)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: lint typecheck ## the same with the long sweeps
	$(PYTEST) $(PYTEST_ARGS)

test-gpu: $(STAMP) ## kernels and whole models on an NVIDIA GPU (needs a PyTorch with CUDA)
	$(BIN)/python -m pytest -m gpu -rs $(PYTEST_ARGS) tests/gpu

lint: $(STAMP) ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP) ## mypy --strict on the sources
	$(BIN)/python .ci/typecheck.py

bench: $(STAMP) ## decode and prefill of a 1B shape against eager and Inductor
	$(BIN)/python benchmarks/decode_cpu.py $(BENCH_ARGS)

bench-gpu: $(STAMP) ## kernels and decode on an NVIDIA GPU, part by part; resumable, the table comes last
	$(BIN)/python benchmarks/gpu_bench.py $(GPU_ARGS)

demo: $(STAMP) ## complete real prompts by eager, Inductor and llmopt side by side
	$(BIN)/python examples/demo.py

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
