# Two commands matter: `make demo` shows it, `make test` proves it. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test tools check unit bins images lab kubernetes bench help
export CARGO_TERM_COLOR ?= auto

ROOT := $(filter 0,$(shell id -u))
# One set of features for every step, or cargo builds the tree once for each.
CARGO_TEST := cargo test --workspace --all-features
# The programs of lab, cluster and benchmark are those of the images, so they are static, where the C library allows it.
# --target keeps the flag from procedural macros.
TRIPLE := $(shell rustc -vV | sed -n 's/^host: //p')
ifneq ($(wildcard $(shell cc -print-file-name=libc.a)),)
STATIC := CARGO_TARGET_$(shell tr a-z- A-Z_ <<<$(TRIPLE))_RUSTFLAGS='-C target-feature=+crt-static'
endif
# Images of what `bins` has compiled.
IMAGES := PROFILE=quick
QUICK := --quiet --profile quick --target $(TRIPLE)

demo: ## both daemons, a stand-in kubelet, a request and a scrape on this machine; Ctrl-C ends it
	@cargo run --profile quick -p e2e --bin demo -- $(DEMO_ARGS)

test: tools check bins ## everything; as root it installs what is missing
	@if [ -n "$(ROOT)" ]; then $(IMAGES) ARCH="amd64 arm64" deploy/images/build.sh; $(CARGO_TEST); exit; fi
	for suite in lab kubernetes; do
	  if [ "$${CI:-}" = true ]; then echo "$$suite: needs root"; exit 1; fi
	  echo "skipped: $$suite needs root"
	done
	cargo test --workspace --all-features --exclude e2e

tools: ## Debian packages and Go tools of the suites that need root
	@if [ -n "$(ROOT)" ]; then e2e/kubernetes/build.sh; fi

check: ## format, lints, documentation, what must not be in the tree
	@cargo fmt --all --check -- --config unstable_features=true --config imports_granularity=Module,group_imports=StdExternalCrate
	cargo clippy --quiet --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --all-features --no-deps
	for crate in ring openssl-sys native-tls; do
	  if [ -n "$$(cargo tree --workspace --all-features -e normal,build,dev -i $$crate 2>/dev/null)" ]; then echo "$$crate is in the tree"; exit 1; fi
	done

unit: ## units, golden bytes, conformance, whole apps on port 0
	@cargo test --workspace --all-features --exclude e2e

bins: ## the binaries that the lab, the cluster and the benchmark run; the demo once, and twenty nodes scraped for some seconds
	@$(STATIC) cargo build $(QUICK) --workspace --all-features --bins
	mkdir -p target/quick
	for program in proxy-server edge-agent kubelet demo bench; do ln -f target/$(TRIPLE)/quick/$$program target/quick/; done
	target/quick/demo --once
	target/quick/bench --scrapes-only --nodes 20 --interval 1 --idle 1

images: ## images of both daemons for ARCH (this machine's), in target/images; PROFILE=release or quick (root)
	@deploy/images/build.sh

lab: bins ## network namespaces: NAT, cut lines, the same address twice (root)
	@$(CARGO_TEST) --test lab

kubernetes: tools bins ## a real kube-apiserver and real kubelets, and Corvid by its manifests (root)
	@$(IMAGES) deploy/images/build.sh
	$(CARGO_TEST) --test kubernetes

bench: bins ## the table of docs/performance.md, measured here and now
	@target/quick/bench $(BENCH_ARGS)

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 14
