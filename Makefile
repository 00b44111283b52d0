# Everything runs in .venv, made on first use; nothing else is needed than Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test test-network test-chaos lint format tables clean

help:  ## show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/ready  ## make .venv and install into it

demo: .venv/ready  ## a whole federation on this machine: a server and four sites, over gRPC and TLS
	$(BIN)/fedloge demo

test: .venv/ready  ## the quick test suite
	$(BIN)/python -m pytest tests/unit tests/wire tests/federation

test-network: .venv/ready  ## real processes over TLS: servers, sites, the demo, the pages of docs/
	$(BIN)/python -m pytest tests/network

test-chaos: .venv/ready  ## kill -9 of everything, at every moment
	$(BIN)/python -m pytest tests/chaos

lint: .venv/ready  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready  ## bring the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tables: .venv/ready  ## make benchmarks/RESULTS.md from the records
	$(BIN)/python -m benchmarks.records tables

clean:  ## remove what make and the tools left here (runs/ stays)
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
