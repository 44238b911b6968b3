# Spiderpool: build, test, measure, show. `make help` lists the targets.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
# The environment and the executables come before what uses them, also with -j.
.NOTPARALLEL:
PY := build/venv/bin/python
BIN := build/venv/bin
export PYTHONPATH := $(CURDIR)
export ZIG_GLOBAL_CACHE_DIR := $(CURDIR)/build/zig-cache

.PHONY: help demo test test-all test-unit test-integration test-e2e kube test-kube vm test-vm soak coverage bench bench-kube lint generate format lock clean run-env dev-env kube-env vm-env shim shim-all

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

run-env: # what the agent and the lab need
	@lab/provision.sh run

dev-env: # what lint, tests and benchmarks need as well
	@lab/provision.sh dev

kube-env: # what Kubernetes nodes on this machine need as well
	@lab/provision.sh kube

vm-env: # what virtual machines need as well
	@lab/provision.sh vm

shim: # the CNI executable for this machine
	@plugins/shim/build.sh native

shim-all: dev-env shim # the CNI executable for every architecture we release
	@plugins/shim/build.sh amd64
	@plugins/shim/build.sh arm64

demo: run-env shim ## two nodes, a router, pods and services on this machine; proves what works, row by row
	@$(BIN)/spiderpool-lab demo

test: dev-env shim-all ## all tests but those that need a cluster; leaves nothing on the machine
	@$(PY) tests/run.py $(BIN)/pytest tests/unit tests/integration tests/e2e

test-all: dev-env shim-all kube ## those with a cluster too, and whether tests/COVERAGE.md tells the truth
	@rm -f build/upstream-results.json
	@$(PY) tests/run.py $(BIN)/pytest tests/unit tests/integration tests/e2e tests/kube
	@$(PY) -m tests.coverage --check

test-unit: dev-env ## pure functions only: no root, no network
	@$(BIN)/pytest tests/unit

test-integration: dev-env shim-all ## real network namespaces, sockets, packets, eBPF (root)
	@$(PY) tests/run.py $(BIN)/pytest tests/integration

test-e2e: dev-env shim ## the lab, through its public surface (root)
	@$(PY) tests/run.py $(BIN)/pytest tests/e2e

kube: kube-env shim ## build Kubernetes, etcd and upstream from the Go modules that lab/kube/**/go.mod pin
	@$(PY) -m lab.kube build --node --upstream

test-kube: kube ## against a real API server and kubelets; not part of `make test` yet (root, Go 1.25 or later)
	@$(PY) tests/run.py $(BIN)/pytest tests/kube

vm: vm-env ## a virtual machine's kernel and initramfs, from the distribution's packages
	@$(PY) -m lab.vm build

test-vm: vm ## kernel features that this machine may lack, in a virtual machine; not part of `make test` yet (root, 8 minutes)
	@$(PY) tests/run.py $(BIN)/pytest tests/vm

soak: kube vm ## histories of addresses, mistakes that they must find, 5,000 pods one after the other, all NICs in a virtual machine (root, 55 minutes)
	@$(PY) tests/run.py $(BIN)/pytest tests/kube -m soak -s
	@$(PY) tests/run.py $(BIN)/pytest tests/integration -m soak -s
	@SPIDERPOOL_VM_BUDGET=1800 $(PY) tests/run.py $(BIN)/pytest tests/vm -m soak

coverage: dev-env ## which of upstream's end-to-end cases the last results prove: tests/COVERAGE.md
	@$(PY) -m tests.coverage

bench: dev-env shim ## medians and p99 beside their rivals; writes build/bench.json
	@$(PY) tests/run.py $(PY) -m tests.bench

bench-kube: kube ## store, allocation and reclaim on a real API server beside the plainest client (12 minutes)
	@$(PY) tests/run.py $(PY) -m tests.bench store alloc reclaim

lint: dev-env ## style, types, import contract, generated files
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.h')
	@$(PY) -m api.crd --check
	@$(PY) -m agent.settings --check
	@$(PY) -m controller.settings --check
	@plugins/shim/build.sh lint
	@$(PY) -m agent.dataplane.load --compile-only

generate: dev-env ## CRDs and reference pages from the types
	@$(PY) -m api.crd
	@$(PY) -m agent.settings --markdown > docs/settings.md
	@$(PY) -m controller.settings --markdown > docs/settings-controller.md

format: dev-env ## rewrite the sources in the one style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $$(git ls-files '*.c' '*.h')

lock: dev-env ## renew the lock files from pyproject.toml
	@$(PY) -m venv build/lock-venv && build/lock-venv/bin/pip install -q uv
	@build/lock-venv/bin/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
		--no-emit-index-url --no-annotate pyproject.toml -o requirements-run.lock
	@build/lock-venv/bin/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
		--no-emit-index-url --no-annotate --extra dev -c requirements-run.lock pyproject.toml -o requirements-dev.lock

clean: ## removes the lab (the one without --name), and everything that was built
	@[ ! -x $(BIN)/spiderpool-lab ] || $(BIN)/spiderpool-lab down
	@rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
