# Every target sets up what it needs: on a bare Debian or Ubuntu machine with Python >= 3.11, `make demo`
# and `make test` are all there is to type.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where it is set, each process compiles the sources of torch again: importing takes three times as long.
unexport PYTHONDONTWRITEBYTECODE
PACKAGES := configs curation pretrain evaluation slurm tools

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak check format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## Make the virtual environment .venv with everything pinned in it

$(READY): pyproject.toml constraints.txt tools/setup.sh
	@tools/setup.sh $(VENV)
	@touch $@

demo: $(READY) ## Make a pool of real pairs, curate it, train CLIP on it, evaluate, report (about 5 minutes)
	@$(BIN)/python -m tools.demo

test: $(READY) ## Run all tests, two files at a time: real Ray, DeepSpeed processes, Slurm, the chain end to end
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(READY) ## Kill curation jobs and a training run at random moments and compare every byte (PAIRMILL_TEST_SEED=N repeats)
	@$(BIN)/python -m pytest -m soak -s

check: $(READY) ## Check format, lint, types and import arrows, and run the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources slurm/*.sbatch slurm/job.sh tests/slurm/machine.sh tools/setup.sh .ci/run
	$(BIN)/python -m pytest -q -m "not slow and not ray and not distributed and not slurm and not soak"

format: $(READY) ## Format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the demo's runs and the caches (not .venv)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
