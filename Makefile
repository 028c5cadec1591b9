# Thin: each target says what it needs and calls one tool. `make run` and `make test` are all most people need;
# both want Rust, Python 3 with pip, Node with npm and a C compiler, nothing more.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

CARGO_TARGET_DIR ?= target
export CARGO_TARGET_DIR
DEBUG_BINARY = $(CARGO_TARGET_DIR)/debug/m40llm

# A model's name (smollm2, qwen2.5-coder-0.5b) or the path of a GGUF file.
MODEL ?= smollm2
# Further flags for `make run` and `make bench`: make run ARGS="--addr 127.0.0.1:8080"
ARGS ?=
# The model's path: a file as it is, a name fetched first (the script's last line is the path).
fetched = $$(if [ -f "$(1)" ]; then echo "$(1)"; else scripts/fetch-model.sh "$(1)" | tail -n 1; fi)

# What the tests and clippy build with. The compiler that it takes is installed first; a device is not needed.
FEATURES = --features cuda
# `make run` and `make bench` build for a CUDA device where there is a driver for one, or CUDA=1 says so (CUDA=0: not).
CUDA ?= $(shell scripts/has-cuda-driver.sh && echo 1 || echo 0)
RUN_FEATURES = $(if $(filter 1,$(CUDA)),$(FEATURES))

.PHONY: help run test test-rust test-clients test-docs debug-binary test-full test-ui test-container test-gpu sanitize-gpu lint audit dist openapi header docs \
	bench bench-gateway bench-peer bench-report bench-serving bench-structured cuda-toolchain cuda-if-wanted sass-report

help: ## This list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 14

run: cuda-if-wanted ## Fetch the demo model, build, serve on 127.0.0.1:58439 (MODEL=name or path, ARGS=flags)
	@model=$(call fetched,$(MODEL)); \
	exec cargo run --quiet --release -p m40llm $(RUN_FEATURES) -- run "$$model" $(ARGS)

test: test-rust sass-report test-clients test-docs ## Everything that must hold: Rust, the kernels' budgets, the clients people use against a live server, the documentation's examples and links

test-rust: cuda-toolchain
	scripts/fetch-model.sh smollm2
	scripts/fetch-model.sh qwen2.5-coder-0.5b
	scripts/fetch-vocabs.sh
	cargo test --workspace $(FEATURES)

# The binary that `cargo test` has built for its own tests: no second debug build.
test-clients: debug-binary
	tests/clients/run.sh $(DEBUG_BINARY) "$(call fetched,smollm2)"

# ARGS=--full: those that build the release too. On a device: tests/docs/run.sh --gpu BINARY MODEL.gguf
test-docs: debug-binary
	tests/docs/run.sh $(filter --full,$(ARGS)) $(DEBUG_BINARY) "$(call fetched,smollm2)"

test-full: export TEST_KILLS = 100
test-full: export TEST_STREAMS = 300
test-full: export TEST_ABANDONED = 1000
test-full: test-rust debug-binary ## As test, with larger counts and both models
	tests/clients/run.sh $(DEBUG_BINARY) "$(call fetched,smollm2)" --full
	tests/clients/run.sh $(DEBUG_BINARY) "$(call fetched,qwen2.5-coder-0.5b)" --full
	tests/docs/run.sh --full $(DEBUG_BINARY) "$(call fetched,smollm2)"

test-ui: debug-binary ## The page at / and Swagger UI at /docs in headless Chromium, which this installs; pictures in target/ui
	tests/ui/run.sh $(DEBUG_BINARY) "$(call fetched,smollm2)" $(CARGO_TARGET_DIR)/ui

test-container: cuda-toolchain ## The image, built without a daemon and run: openai-python chats with it (root; installs buildah, debootstrap)
	tests/container/run.sh "$(call fetched,smollm2)" $(CARGO_TARGET_DIR)/container

test-gpu: cuda-toolchain ## Kernels, models and serving on a CUDA device; fails without one, or cuBLAS (ARGS="--skip cublas")
	scripts/fetch-model.sh smollm2
	cargo test -p m40llm-engine --features gpu-tests --lib -- --test-threads=1 gpu_tests $(ARGS)
	cargo test -p m40llm-engine --features gpu-tests --test gpu -- --test-threads=1 $(ARGS)
	cargo test -p m40llm --features gpu-tests --test gpu -- --test-threads=1 $(ARGS)

sanitize-gpu: cuda-toolchain ## compute-sanitizer's memcheck and racecheck over tiny products and models on a CUDA device
	set -e; for tool in memcheck racecheck; do \
		under="target.'cfg(all())'.runner = 'compute-sanitizer --error-exitcode 1 --tool $$tool'"; \
		for tests in --lib "--test gpu"; do \
			cargo test --config "$$under" -p m40llm-engine --features gpu-tests $$tests -- --test-threads=1 tiny_; \
		done; \
	done

debug-binary: cuda-toolchain
	cargo test --quiet --workspace $(FEATURES) --no-run

lint: cuda-toolchain ## Format, clippy with warnings as errors, GitHub's workflows
	cargo fmt --all --check
	cargo clippy --workspace --all-targets $(FEATURES),gpu-tests -- -D warnings
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p m40llm --all-targets --no-default-features -- -D warnings
	tests/workflows/run.sh

audit: ## Dependencies: bans, licences, sources
	command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny check bans licenses sources

dist: cuda-toolchain ## What a release consists of, beside the image: archive, SBOM, checksums; in target/dist
	M40LLM_REVISION="$$(git rev-parse --short=12 HEAD)" cargo build --release --locked -p m40llm $(FEATURES)
	scripts/dist.sh $(CARGO_TARGET_DIR)/release/m40llm $(CARGO_TARGET_DIR)/dist

openapi: ## Regenerate openapi/openapi.json from the handlers
	mkdir -p openapi
	cargo run --quiet -p m40llm -- openapi > openapi/openapi.json.new
	mv openapi/openapi.json.new openapi/openapi.json

header: ## Regenerate engine/include/m40llm.h from engine/src/ffi
	cargo run --quiet -p m40llm-engine --example c_header

# mdBook reads its book from a folder that holds nothing else: a copy of the documents.
MDBOOK = mdbook@0.5.4
BOOK = $(abspath $(CARGO_TARGET_DIR))/book
docs: ## The documentation as a book in target/book, its links checked (installs mdBook there, which takes minutes at first)
	cargo install --quiet --locked $(MDBOOK) --no-default-features --features search --root $(BOOK)-tools \
		--target-dir $(BOOK)-tools/build
	rm -rf $(BOOK)-tools/build
	scripts/book.py stage $(BOOK)-source
	rm -rf $(BOOK)
	$(BOOK)-tools/bin/mdbook build $(BOOK)-source --dest-dir $(BOOK)
	scripts/book.py check $(BOOK)

bench: cuda-if-wanted ## Prompt and decode speed on this machine (MODEL=, ARGS=)
	@model=$(call fetched,$(MODEL)); \
	exec cargo run --quiet --release -p m40llm $(RUN_FEATURES) -- bench "$$model" $(ARGS)

bench-gateway: ## What the gateway adds to a token, with a token source in the engine's place (ARGS=--json, --check)
	cargo bench --quiet -p m40llm --bench gateway -- $(ARGS)

bench-peer: ## The same figures beside llama.cpp's
	cargo build --release -p m40llm
	python3 scripts/bench-peer.py $(ARGS)

bench-report: cuda-toolchain ## The speed of a CUDA device: the tables and the chart of docs/PERFORMANCE.md (ARGS="--check", "--from FILE.json")
	@scripts/cuda-toolchain.sh disassembler
	python3 scripts/report/test_report.py
	$(if $(findstring --from,$(ARGS)),,cargo build --release -p m40llm $(FEATURES))
	python3 scripts/bench-report.py --chart docs/performance.svg --page docs/PERFORMANCE.md $(ARGS)

bench-serving: ## What callers notice of each other: throughput, gaps, prefixes, memory, fairness (ARGS=--check, --chart)
	cargo build --release -p m40llm
	python3 scripts/bench-serving.py $(ARGS)

bench-structured: ## What constrained decoding costs on this machine's CPU (MODEL=, ARGS=--check)
	cargo bench --quiet -p m40llm-engine --bench structured -- "$$(realpath "$(call fetched,$(MODEL))")" $(ARGS)

cuda-toolchain: ## Install the compiler of the CUDA kernels into .cuda/ (nothing else of the system is touched)
	@scripts/cuda-toolchain.sh compiler

sass-report: cuda-toolchain ## Hold the kernels' sm_52 machine code against kernels/budgets.toml (ARGS=--all, --model)
	@scripts/cuda-toolchain.sh disassembler
	python3 scripts/sass/test_report.py
	python3 scripts/sass_report.py $(filter --all --model,$(ARGS))

cuda-if-wanted:
	@$(if $(filter 1,$(CUDA)),scripts/cuda-toolchain.sh compiler)
