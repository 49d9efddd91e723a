# Rorqual. `make help` lists what there is; README.md says how to choose a torch build before the first run.

SHELL := /bin/bash
VENV ?= .venv
ARGS ?=
# Test processes at once. Each computes with one thread, so this is the number of cores to use.
JOBS ?= 2
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13; do \
	$$name -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(sort $(wildcard proto/rorqual/v1/*.proto))
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile
UV_VERSION := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help venv serve test quick minutes explore gpu check stubs stubs-current bench lock clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(BIN)/python ## an empty .venv, to install a torch build of your choice into

serve: $(STAMP) ## set up, then serve the demo model: a prefill and a decode worker (ARGS="--http 0" and so on)
	@$(BIN)/rorqual demo $(ARGS)

test: $(STAMP) ## set up, then run the CPU suite
	$(PYTEST) -m "not minutes and not gpu" $(ARGS)

quick: $(STAMP) ## the tests for every commit, two to three minutes on two cores
	$(PYTEST) -m "not slow and not minutes and not gpu" $(ARGS)

# What starts whole systems has the machine to itself; the rest shares it. Both parts run, whatever the first finds.
minutes: $(STAMP) ## the tests that take minutes (ARGS="tests/cluster" for some of them)
ifeq ($(ARGS),)
	@status=0; \
	$(BIN)/pytest -m minutes tests/cluster tests/integration || status=$$?; \
	$(PYTEST) -m minutes --ignore tests/cluster --ignore tests/integration || status=$$?; \
	exit $$status
else
	$(BIN)/pytest -m minutes $(ARGS)
endif

explore: $(STAMP) ## the property tests with examples that nobody has seen yet, and how to repeat one that fails
	$(PYTEST) -m "hypothesis and not minutes and not gpu" --hypothesis-profile=explore $(ARGS)

gpu: $(STAMP) ## the tests that need a GPU
	$(BIN)/pytest -m gpu $(ARGS)

check: $(STAMP) stubs-current ## lint, format, types, import rules, generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

stubs: $(STAMP) ## regenerate rorqual/v1 from proto/
	$(call PROTOC,.)

stubs-current: $(STAMP)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(call PROTOC,"$$folder") && \
	for file in "$$folder"/rorqual/v1/*; do \
		cmp "$$file" "rorqual/v1/$${file##*/}" || { echo "stale: run make stubs" >&2; exit 1; }; \
	done && echo "stubs are current"

bench: $(STAMP) ## the races (ARGS="--help" lists them)
	$(BIN)/python -m bench $(ARGS)

lock: $(STAMP) ## resolve requirements/*.txt anew from pyproject.toml, keeping pins that still fit (ARGS=--upgrade: none)
	$(BIN)/pip install --quiet uv==$(UV_VERSION)
	$(call LOCK,,requirements/lock.txt)
	$(call LOCK,--extra dev --constraint requirements/lock.txt,requirements/dev.txt)

# Universal: one file for Linux and macOS, with markers where they differ. Torch stays out (requirements/torch.txt).
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --override requirements/without-torch.in \
	--no-emit-package torch --annotation-style line --custom-compile-command "make lock" $(ARGS) \
	pyproject.toml requirements/torch-needs.in $(1) --output-file $(2)

clean: ## remove caches and made models; .venv stays
	rm -rf .run .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer with its venv module" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch first, by itself: a build that is already there is kept, whichever it is. Its other needs come at their pins.
$(STAMP): requirements/torch.txt requirements/dev.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --constraint requirements/dev.txt -r requirements/torch.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
