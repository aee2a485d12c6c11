# Two commands do everything on a fresh machine with Python >= 3.11, pip and make: `make demo` and `make test`.
# A C compiler makes the simulator four times faster (mypyc); without one everything still works.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := .stamps
CORE   := $(shell sed -n 's/^  "\(penstock\/.*\.py\)",$$/src\/\1/p' pyproject.toml)
DEMO   := demo-out

.PHONY: help setup demo test lint types tests stress bench lock clean

help:  ## what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

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
	$(BIN)/penstock compare --policies round-robin,least-kv,llumnix,ares --synthetic reasoning --rate 0.6 \
		--requests 1500 --model qwen2.5-7b --hardware h100 --kv-blocks 8192 --prefill 2 --decode 6 \
		--ttft 5s --tpot 12.5ms \
		--json $(DEMO)/compare.json --report $(DEMO)/report.html
	@echo "Open $(DEMO)/report.html in a browser. Next: $(BIN)/penstock --help"

test: setup $(STAMPS)/dev lint types tests  ## lint, types, tests

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev
	$(BIN)/mypy

tests: setup $(STAMPS)/dev
	$(BIN)/pytest -n 2 --dist worksteal tests

stress: setup $(STAMPS)/dev  ## the long property runs, compiled and interpreted
	PENSTOCK_EXAMPLES=5000 $(BIN)/pytest -n 2 --dist worksteal tests/sim
	PENSTOCK_INTERPRETED=1 PENSTOCK_EXAMPLES=1000 $(BIN)/pytest -n 2 --dist worksteal tests/sim

bench: setup  ## speed figures, with ratios
	$(BIN)/python benchmarks/simulate_speed.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/ares_tick.py

lock: $(STAMPS)/dev  ## renew the pinned lock files
	$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--extra build --output-file requirements.lock pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--constraint requirements.lock --extra dev --output-file requirements-dev.lock

clean:  ## remove everything that make made
	rm -rf $(VENV) $(STAMPS) $(DEMO) build src/*.egg-info
	find src -name '*.so' -delete
