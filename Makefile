# Every target makes what it needs: `make quickstart` and `make test` run on a fresh machine with Python 3.11 or 3.12.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then echo $$p; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart check test test-slow docs bench bench-multigpu clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "hbp-tune needs Python 3.11 or 3.12, none was found; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed ## Fine-tune a tiny Llama on two CPU ranks with data made here; about 2 minutes after the installation
	$(BIN)/python -m hbp_tune.demo
	PATH="$(abspath $(BIN)):$$PATH" tune run --nproc_per_node 2 hbp_full_finetune_distributed --config demo/tiny_llama_cpu

check: $(VENV)/.installed ## Lint, types, import contracts, and the tests that start no process: under 90 seconds on two cores
	PATH="$(abspath $(BIN)):$$PATH" scripts/check --quick

test: $(VENV)/.installed ## Lint, types, import contracts and all tests that are neither slow nor for a GPU
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

test-slow: $(VENV)/.installed ## All of `make test`, and the slow tests
	PATH="$(abspath $(BIN)):$$PATH" scripts/check --slow

bench: $(VENV)/.installed ## Run every benchmark small on this machine's CPU, some twenty minutes, into bench_report/index.html
	$(BIN)/python benchmarks/bench_all.py

bench-multigpu: $(VENV)/.installed ## Time context parallelism and training steps on all GPUs of this machine, under 15 minutes
	$(BIN)/torchrun --standalone --nproc_per_node auto benchmarks/bench_multigpu.py

docs: $(VENV)/.installed ## Build the documentation into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean: ## Remove the environment, the demo and its runs
	rm -rf $(VENV) site hbp_demo hbp_runs bench_report .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
