# Every target but help sets up .venv on its first call; a second call finds it there.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test lint truth bench docs

PYTHON ?= python3
DEMO_OUT ?= runs/demo
TESTS ?= tests
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TRUTH_SECONDS ?= 90
TORCH_PIP ?=

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

unexport OMP_NUM_THREADS

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON) DEMO_OUT=$(DEMO_OUT) TESTS=$(TESTS) JOBS=$(JOBS) TRUTH_SECONDS=$(TRUTH_SECONDS)"
	@echo "           TORCH_PIP='options for the pip call that installs torch'"

demo: fresh-demo $(READY) ## distil the built-in teacher; pictures and figures go to DEMO_OUT
	$(VENV)/bin/onestroke demo --out "$(DEMO_OUT)"

# In the order of their names: by number of tests, long files of few tests would come last, and one worker would wait.
test: $(READY) ## run the tests
	$(RUN) -m pytest $(TESTS) -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(READY) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

truth: $(READY) ## distil exact teachers by every method; writes docs/truth.md
	$(RUN) -m benchmarks.truth --seconds $(TRUTH_SECONDS)

bench: $(READY) ## the time of a round over the time of the network passes it needs
	$(RUN) -m benchmarks.overhead

docs: $(READY) ## write docs/methods.md from the methods themselves
	$(RUN) docs/generate.py

# An earlier demo is never overwritten, and this is said before anything is installed.
.PHONY: fresh-demo
fresh-demo:
	@if [ -n "$$(ls -A "$(DEMO_OUT)" 2>/dev/null)" ]; then \
	  echo "$(DEMO_OUT) is not empty: remove it, or choose another folder: make demo DEMO_OUT=$(DEMO_OUT)-2" >&2; \
	  exit 2; \
	fi

# torch comes first and alone, so that TORCH_PIP can choose its build and nothing else decides it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt $(TORCH_PIP) torch
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[metrics,onnx,dev]"
	@touch $@
