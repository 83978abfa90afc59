# make run and make test set up what they need: a virtual environment in .venv, every package pinned by constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
# TORCH_BACKEND=cpu takes PyTorch's small CPU build, on machines that reach PyTorch's own index.
TORCH_BACKEND ?=
OUT ?= out/tiny
RECIPE ?= tiny
# The environment is made again when what it is made from changes.
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt Makefile | sha256sum | cut -c1-12)$(TORCH_BACKEND)

.PHONY: help setup run test verify check bench format generated refresh-schemas constraints clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP) ## the virtual environment (the others do it by themselves)

$(STAMP):
	@missing=0; \
	need() { echo "missing: $$1 (Debian: apt-get install $$2)"; missing=1; }; \
	[ -n "$(PYTHON)" ] || need "python 3.11 or newer" python3; \
	[ -z "$(PYTHON)" ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || need "python 3.11 or newer, $(PYTHON) is older" python3; \
	[ -z "$(PYTHON)" ] || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || need "the venv module of $(PYTHON)" python3-venv; \
	command -v git >/dev/null || need git git; \
	command -v g++ >/dev/null || need "g++, DeepSpeed builds a small op with it" g++; \
	[ $$missing = 0 ]
	@echo "setup: packages into $(VENV), some 6 GB; 1 to 3 minutes the first time"
	@start=$$SECONDS; rm -f $(VENV)/.ready-*; \
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) \
	  -c constraints.txt -e '.[train,prepare,pipelines,cluster,dev]'; \
	touch $@; echo "setup: done in $$((SECONDS - start)) s"

run: $(STAMP) ## the whole recipe on this machine: make run [RECIPE=tiny] [OUT=out/tiny]
	$(BIN)/qwenvl run $(RECIPE) --out $(OUT)

test: $(STAMP) ## every test, verify among them
	$(BIN)/python -m pytest $(PYTEST_ARGS)

verify: $(STAMP) ## two runs, and a killed and resumed one, give the same bits: make verify [RECIPE=tiny_smoke]
	$(BIN)/python -m tests.verify --recipe $(if $(filter tiny,$(RECIPE)),tiny_smoke,$(RECIPE))

check: $(STAMP) ## lint, format, types, import direction, generated files: what CI checks first
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m tests.generated --check
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

generated: $(STAMP) ## write the generated files again: golden dumps, schemas, the compiled pipeline
	$(BIN)/python -m tests.generated --write

bench: $(STAMP) ## benchmarks: make bench [NAME=...]
	$(BIN)/python -m tests.bench $(NAME)

refresh-schemas: $(STAMP) ## the CRD and OpenAPI files that manifests are checked against, from their Go modules
	$(BIN)/python k8s/schemas/refresh.py

constraints: $(STAMP) ## pin every package anew
	$(BIN)/uv pip compile pyproject.toml --all-extras -c constraints.in --universal --python-version 3.11 --no-emit-index-url \
	  --no-annotate --no-header --upgrade -o constraints.txt

clean: ## remove what runs and tests made; .venv stays
	rm -rf out build .pytest_cache .ruff_cache *.egg-info
