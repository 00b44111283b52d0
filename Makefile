# Everything runs in .venv, made on first use; nothing else is needed than Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 1-25
MINUTES ?= 5

.PHONY: help install demo test test-network test-chaos test-containers chaos soak lint format bench-check tables clean

help:  ## show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/ready  ## make .venv and install into it

demo: .venv/ready  ## a whole federation on this machine: a server and four sites, over gRPC and TLS
	$(BIN)/fedloge demo

test: .venv/ready  ## the quick test suite
	$(BIN)/python -m pytest tests/unit tests/wire tests/federation

test-network: .venv/ready  ## real processes over TLS: servers, sites, proxies, machines with bad links (root) and without
	$(BIN)/python -m pytest -rs tests/network tests/hosts

test-chaos: .venv/ready  ## kill, stop, cut off and fill everything, at every moment; some minutes
	$(BIN)/python -m pytest -rs tests/chaos

test-containers: .venv/ready  ## the images and the compose files, on a Docker engine
	$(BIN)/python -m pytest -rs tests/containers

chaos: .venv/ready  ## 25 federations under faults drawn from seeds; an hour. SEEDS=7 replays one
	$(BIN)/python -m tests.chaos.storm --seeds $(SEEDS)

soak: .venv/ready  ## hundreds of rounds with churn, all processes watched. MINUTES=600 for a night
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

lint: .venv/ready  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready  ## bring the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-check: .venv/ready  ## small benchmarks: has a ratio fallen since its record? some minutes
	$(BIN)/python -m benchmarks check

tables: .venv/ready  ## make RESULTS.md, PERFORMANCE.md and the tables of docs/scale.md from the records
	$(BIN)/python -m benchmarks.records tables
	$(BIN)/python -m benchmarks.performance
	$(BIN)/python -m benchmarks.scale_page

clean:  ## remove what make and the tools left here (runs/ stays)
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
