# Two commands matter: `make demo` shows it, `make test` proves it. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test check unit bins lab kubernetes bench help tools
export CARGO_TERM_COLOR ?= auto

ROOT := $(filter 0,$(shell id -u))
# A skipped suite is a failure where nobody reads the output.
SKIP = if [ "$${CI:-}" = true ]; then echo "$(1): needs root"; exit 1; else echo "skipped $(1): needs root"; fi

demo: ## both daemons, a stand-in kubelet, a CONNECT and a scrape, on this machine; Ctrl-C ends it
	@cargo run --quiet --profile quick -p e2e --bin demo -- $(DEMO_ARGS)

test: tools check unit bins lab kubernetes ## everything; installs what is missing (as root)

tools: ## Debian packages and Go tools of the suites that need root
	@if [ -n "$(ROOT)" ]; then e2e/kubernetes/build.sh; fi

check: ## format, lints, documentation, what must not be in the tree
	@cargo fmt --all --check -- --config unstable_features=true --config imports_granularity=Module,group_imports=StdExternalCrate
	cargo clippy --quiet --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps
	for crate in ring openssl-sys native-tls; do
	  if [ -n "$$(cargo tree --workspace --all-features -e normal,build,dev -i $$crate 2>/dev/null)" ]; then echo "$$crate is in the tree"; exit 1; fi
	done

unit: ## units, golden bytes, conformance, whole apps on port 0
	@cargo test --workspace --all-features --exclude e2e
	cargo test --workspace --all-features --lib --bins

bins: ## the binaries that the lab, the cluster and the demo run, optimised quickly; and the demo once
	@cargo build --quiet --profile quick --workspace --bins
	target/quick/demo --once

lab: bins ## network namespaces: NAT, cut lines, the same address twice
	@if [ -n "$(ROOT)" ]; then cargo test --workspace --all-features --test lab; else $(call SKIP,lab); fi

kubernetes: bins ## a real kube-apiserver and real kubelets
	@if [ -n "$(ROOT)" ]; then cargo test --workspace --all-features --test kubernetes; else $(call SKIP,kubernetes); fi

bench: ## the table of docs/performance.md, measured here and now
	@cargo run --quiet --profile quick -p e2e --bin bench -- $(BENCH_ARGS)

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 14
