# Everything a newcomer needs. Each target installs what it lacks.

SHELL := /bin/sh
export PATH := $(HOME)/.cargo/bin:$(PATH)

TARGET := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
PROGRAM = target/$(or $(TARGET),$(shell uname -m)-unknown-linux-gnu)/release/stacyvm

.DEFAULT_GOAL := help
.PHONY: help run build test testvm lint fmt bench dist

help: ## List the targets
	@echo "StacyVM: a computer for every AI agent"
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

run: build ## Build, start the server on 127.0.0.1:7423 and run Python in a sandbox (ONCE=1: then stop)
	@scripts/demo.sh $(PROGRAM)

build: ## Build the static release program
	@scripts/setup.sh run
	@scripts/build.sh

test: ## Run every test, with real namespaces and the published SDK (needs root)
	@scripts/setup.sh test
	@scripts/test.sh

testvm: build ## Run the contract suite in an emulated machine with control groups v2 alone (needs root)
	@tests/vm/run.sh $(PROGRAM)

lint: ## Check formatting and lints
	@scripts/setup.sh build
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

fmt: ## Format the code
	@scripts/setup.sh build
	cargo fmt --all

bench: build ## Measure this build beside other runtimes on this machine
	@scripts/bench.sh $(PROGRAM)

dist: build ## Make the release archive with its SBOM, manual pages, completions and checksums
	@scripts/dist.sh dist $(PROGRAM)
