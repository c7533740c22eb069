# Two commands: `make quickstart` and `make test`. Both prepare .venv once; a second run skips that.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
# The processes that tests start would read every module anew, and pytest rewrite every test, where this were set.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test lint types unit end-to-end fuzz docs site clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## create .venv with pinned dependencies

$(READY): pyproject.toml constraints.txt
	@echo "Preparing .venv (once; about two minutes and 2 GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)  ## four banks fine-tune one model; what was it worth?
	$(BIN)/silotune quickstart

test: $(READY) lint types unit end-to-end  ## lint, types, layers, unit, end-to-end and README tests, coverage

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

unit: $(READY)  ## the fast tier on two cores, layer test included, and its coverage
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -m 'not end_to_end' --numprocesses=2 --dist=loadfile --cov=silotune --cov-report=
	$(BIN)/coverage report --fail-under=90

# Without coverage, whose tracing takes as long as the tests themselves: the fast tier alone passes its bound.
end-to-end: $(READY)  ## real processes, real kills, the wheel, the README
	$(BIN)/python -m pytest -m end_to_end --numprocesses=3 --dist=loadfile --no-loadscope-reorder

fuzz: $(READY)  ## five minutes of wrong messages to a site and a coordinator
	PYTHONPATH=tests $(BIN)/python -m attacks.fuzz 300

docs: $(READY)  ## write docs/cli.md and docs/configuration.md from the code
	$(BIN)/python scripts/write_docs.py

site: $(READY)  ## build the documentation as a site: open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server --directory build/site"

clean:  ## remove what make and the tests created
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist
