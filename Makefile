# Warpline: `make demo` and `make test` do everything on a fresh machine; `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help

CACHE ?= $(HOME)/.cache/warpline
SMOLLM2 := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
PTXAS := $(CACHE)/tools/ptxas
MODEL ?= $(SMOLLM2)
PROMPT ?= The capital of France is

.PHONY: help demo test lint unit golden sanitize pack toolchain clean

help: ## List these targets.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: toolchain $(SMOLLM2) ## Build everything and generate text with a small model.
	cargo run --release -p host -- "$(SMOLLM2)" -p "$(PROMPT)" -n 32

test: lint unit ## Everything that must pass: formatting, lints, all tests.

lint: toolchain
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings

unit: toolchain $(SMOLLM2) $(PTXAS)
	WARPLINE_SMOLLM2="$(SMOLLM2)" WARPLINE_PTXAS="$(PTXAS)" cargo test --release --workspace -- --show-output

golden: toolchain ## Evaluate every golden text on MODEL (a GPU, or patience).
	WARPLINE_GOLDEN_MODEL="$(MODEL)" cargo test --release -p host --test tests -- golden:: --show-output

sanitize: toolchain ## Run the kernel tests under compute-sanitizer (needs a GPU and the CUDA toolkit).
	scripts/sanitize "$$(scripts/test-binary)"

pack: toolchain ## Pack the program and its tests for a GPU machine without Rust: dist/warpline.tar.gz.
	scripts/pack

toolchain: ## Install the device toolchain where it is missing.
	@scripts/install-device-toolchain

$(SMOLLM2):
	scripts/fetch-model smollm2 "$(CACHE)"

$(PTXAS):
	scripts/fetch-ptxas "$(PTXAS)"

clean: ## Delete what was built.
	cargo clean
	rm -rf dist
