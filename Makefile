# Each target first runs setup.sh, which creates a virtual environment in .venv and installs the packages. Options of it:
# PYTHON=python3.12 (3.11 or newer), DEVICE=cpu|gpu.
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON DEVICE VENV

.PHONY: setup setup-dev quickstart test test-fast test-versions bench bench-gpu gpu-smoke lint docs docs-serve clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   set up, then distil a real small model (eight to eighteen minutes on two cores)"
	@echo "make test         set up, then run all checks and tests"
	@echo "make test-fast    run the tests that need no real model or engine"
	@echo "make test-versions  test the core with the lowest and the newest dependencies, and with other Pythons"
	@echo "make bench        run the benchmarks: prints tables, writes JSON to tests/bench/out"
	@echo "make bench-gpu    run the benchmarks for GPUs"
	@echo "make gpu-smoke    say in ten minutes what works on this machine's GPU; writes gpu-smoke.json"
	@echo "make lint         check format, lint, types and import rules"
	@echo "make docs         build the documentation into site/"
	@echo "make docs-serve   show it on this machine, rebuilt at every change"
	@echo "make clean        remove .venv, site and runs"

$(VENV)/.setup: pyproject.toml setup.sh
	@bash setup.sh
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	@bash setup.sh dev
	@touch $@

setup: $(VENV)/.setup
setup-dev: $(VENV)/.setup-dev

quickstart: $(VENV)/.setup
	@$(BIN)/distill run recipes/quickstart.yaml

lint: $(VENV)/.setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Two workers, each running whole files; tests/conftest.py sets the order and divides the cores between the workers.
PARALLEL := -n 2 --no-loadscope-reorder

test: lint
	$(BIN)/pytest $(PARALLEL)

test-fast: $(VENV)/.setup-dev
	$(BIN)/pytest $(PARALLEL) -m "not slow"

# OPTIONS: --set lowest, --python python3.12.
test-versions: $(VENV)/.setup
	@$(BIN)/python tests/try_versions.py $(OPTIONS)

bench: $(VENV)/.setup-dev
	@for script in tests/bench/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-gpu: $(VENV)/.setup-dev
	@for script in tests/bench/gpu_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# OPTIONS: --cpu, --only NAME ..., --report FILE, --minutes 10.
gpu-smoke: $(VENV)/.setup
	@$(BIN)/python tests/gpu/smoke.py $(OPTIONS)

# The variable silences an advertisement of the theme's successor.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs: $(VENV)/.setup-dev
	@$(MKDOCS) build --config-file docs/site/mkdocs.yml
	@echo "site/index.html"

docs-serve: $(VENV)/.setup-dev
	@$(MKDOCS) serve --config-file docs/site/mkdocs.yml --watch distill

clean:
	rm -rf $(VENV) site runs
