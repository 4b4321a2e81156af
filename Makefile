# Each target first creates a virtual environment in .venv and installs the packages. Needs Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Compile packages at installation, not at their first import.
COMPILE := --compile-bytecode
# cpu or gpu: the two builds of vLLM cannot be installed together.
DEVICE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

# uv does not read pip's settings, so pip's index and find-links are passed to it. Unless a local wheel of torch is found
# there, uv chooses the build of torch for this machine.
define INSTALL
links="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null)}}"; \
[ -n "$$links" ] && export UV_FIND_LINKS="$$links"; \
[ -n "$$PIP_INDEX_URL" ] && export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$PIP_INDEX_URL}"; \
ls $$links/torch-*.whl >/dev/null 2>&1 || export UV_TORCH_BACKEND="$${UV_TORCH_BACKEND:-auto}"; \
$(BIN)/uv pip install --quiet $(COMPILE) --only-binary vllm --python $(BIN)/python
endef

.PHONY: setup setup-dev quickstart test test-fast bench bench-gpu gpu-smoke lint docs docs-serve clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   set up, then distil a real small model (eight to eighteen minutes on two cores)"
	@echo "make test         set up, then run all checks and tests"
	@echo "make test-fast    run the tests that need no real model or engine"
	@echo "make bench        run the benchmarks: prints tables, writes JSON to tests/bench/out"
	@echo "make bench-gpu    run the benchmarks for GPUs"
	@echo "make gpu-smoke    say in ten minutes what works on this machine's GPU; writes gpu-smoke.json"
	@echo "make lint         check format, lint, types and import rules"
	@echo "make docs         build the documentation into site/"
	@echo "make docs-serve   show it on this machine, rebuilt at every change"
	@echo "make clean        remove .venv, site and runs"

$(VENV)/.uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "python 3.11 or newer is needed (PYTHON=...)" && exit 1)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

# uv exits with 1 if no package version fits, and with another status for other errors (no network, no disk space). If only
# vLLM has no fitting version, everything else is installed; .extra tells setup-dev which extra that is.
$(VENV)/.setup: pyproject.toml $(VENV)/.uv
	@echo "installing ($(DEVICE)); this takes a few minutes, depending on the network"
	@echo $(DEVICE) >$(VENV)/.extra
	@($(INSTALL) -e '.[$(DEVICE),ray]') 2>$(VENV)/.said || { status=$$?; \
	  if [ $$status != 1 ] || ! grep -q vllm $(VENV)/.said; then cat $(VENV)/.said >&2; exit $$status; fi; \
	  echo model >$(VENV)/.extra; ($(INSTALL) -e '.[model,ray]') || exit; }
	@ls -d $(VENV)/lib/python*/site-packages/vllm >/dev/null 2>&1 || echo "vLLM is not installed, because there is no" \
	  "wheel of it for this machine; the transformers engine is used instead (slower)"
	@touch $@

$(VENV)/.setup-dev: pyproject.toml $(VENV)/.setup
	@$(INSTALL) -e ".[$$(cat $(VENV)/.extra),dev]"
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
	@$(MKDOCS) build --quiet --config-file docs/site/mkdocs.yml
	@echo "site/index.html"

docs-serve: $(VENV)/.setup-dev
	@$(MKDOCS) serve --config-file docs/site/mkdocs.yml --watch distill

clean:
	rm -rf $(VENV) site runs
