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
PORT ?= 5000
# Processes that share the test files; whole runs of the pipeline come after them, alone.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# Stages wait more than they compute.
CLUSTER_WORKERS ?= 5
# How often a test on the cluster that fails is tried again; each try is printed.
CLUSTER_RERUNS ?= 0
# The environment is made again when what it is made from changes.
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt Makefile | sha256sum | cut -c1-12)$(TORCH_BACKEND)

.PHONY: help setup run families ui test test-extended test-cluster test-cluster-full test-kfp cluster-up cluster-down verify check bench format generated refresh-schemas constraints clean

help: ## what there is
	@echo "make TARGET [NAME=value]"
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 20 | sed 's/^/  /'
	@echo "Start with: make run, make test. Everything is set up on first use; .venv/bin/qwenvl --help has the rest."

setup: $(STAMP) ## the virtual environment (the others do it by themselves)

$(STAMP):
	@missing=0; \
	need() { echo "missing: $$1 (Debian: apt-get install $$2)"; missing=1; }; \
	if [ -z "$(PYTHON)" ]; then need "python 3.11, 3.12 or 3.13" python3; \
	elif ! $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then \
	  need "python 3.11, 3.12 or 3.13; $(PYTHON) is another, make PYTHON=... names one" python3; \
	else \
	  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || need "the venv module of $(PYTHON)" python3-venv; \
	fi; \
	command -v git >/dev/null || need git git; \
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

families: $(STAMP) ## the tiny recipe of every family through its stages, one after the other: make families [OUT=out]
	@for recipe in trainer/recipes/tiny_*.yaml; do \
	  name=$$(basename $$recipe .yaml); [ $$name = tiny_smoke ] && continue; \
	  $(BIN)/qwenvl run $$name --out $(if $(filter out/tiny,$(OUT)),out,$(OUT))/$$name; \
	done; \
	$(BIN)/qwenvl run tiny --out $(if $(filter out/tiny,$(OUT)),out,$(OUT))/tiny

ui: $(STAMP) ## MLflow's pages on a run of this machine: make ui [OUT=out/tiny] [PORT=5000]
	@[ -f "$(OUT)/mlflow/mlflow.db" ] || { echo "no run in $(OUT) yet: make run, or name its folder with OUT="; exit 1; }
	@echo "http://127.0.0.1:$(PORT)    (Ctrl-C ends it)"
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 \
	  --backend-store-uri "sqlite:///$(abspath $(OUT))/mlflow/mlflow.db" \
	  --artifacts-destination "$(abspath $(OUT))/mlflow/artifacts"

test: $(STAMP) ## the tests, verify among them: make test [PYTEST_ARGS="tests/data -k plan"]
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --ignore tests/integration
	$(BIN)/python -m pytest tests/integration
	@$(BIN)/python -m tests.cluster doctor
endif

test-extended: EXTENDED ?= tests/models tests/prepare tests/integration tests/test_bench.py
test-extended: $(STAMP) ## every family on ranks, its recipe; own data; Ray, kills, Ctrl-C; the benchmarks, small
	$(BIN)/python -m pytest -m 'extended and not long' $(EXTENDED)

test-cluster: $(STAMP) ## stages on a real Kubernetes of our own, or on KUBECONFIG's: make test-cluster [PYTEST_ARGS="-k queue"]
	@[ -n "$${KUBECONFIG:-}" ] || $(BIN)/python -m tests.cluster doctor --strict
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest -m cluster tests/cluster $(PYTEST_ARGS)
else
	$(BIN)/python -m pytest -m cluster tests/cluster/test_lifecycle.py
	$(BIN)/python -m pytest -m cluster -n $(CLUSTER_WORKERS) --maxschedchunk 1 --reruns $(CLUSTER_RERUNS) -raR \
	  tests/cluster --ignore tests/cluster/test_lifecycle.py
endif

test-cluster-full: ## the same with every control, RayJobs, TrainJobs, and a minute without an API server
	TEST_CONTROLS=all TEST_AWAY_S=60 $(MAKE) test-cluster

test-kfp: export QWENVL_TEST_CLUSTER ?= kfp
test-kfp: $(STAMP) ## the tiny recipe on a real Kubeflow Pipelines of our own, or on KFP_ENDPOINT's (tests/kfp/README.md)
	@[ -n "$${KFP_ENDPOINT:-}" ] || $(BIN)/python -m tests.kfp doctor --strict
	$(BIN)/python -m pytest -m kfp tests/kfp $(PYTEST_ARGS)

cluster-up: $(STAMP) ## our own Kubernetes, kept until cluster-down: python -m tests.cluster kubectl ... talks to it
	$(BIN)/python -m tests.cluster up

cluster-down: $(STAMP) ## remove it, and what a killed one left
	$(BIN)/python -m tests.cluster down

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
