# `make demo` and `make test` do all their own set-up: a .venv with rsmtdf (editable) and its tools.
# Python 3.11 or newer; another one than python3: `make demo PYTHON3=python3.12`.

PYTHON3 ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test lint format bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## the .venv alone

demo: $(READY)  ## synthetic images -> cached teachers -> trained student -> map and report in out/demo
	$(BIN)/rsmtdf demo --out out/demo

test: $(READY)  ## all tests
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(READY)  ## style, types and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)  ## rewrites the sources to the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(READY)  ## the paired benchmarks, one after the other
	@set -e; for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done

clean:  ## removes the .venv, caches, build and demo results (not runs/ or stores)
	rm -rf .venv out/demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find rsmtdf tests pipelines benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Once, and again whenever pyproject.toml changes. uv from PATH if it works, else by pip inside the new .venv:
# nothing outside this folder is touched, so externally managed Pythons stay as they are.
$(READY): pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "rsmtdf needs Python 3.11 or newer, and $(PYTHON3) is" \
		"$$($(PYTHON3) --version 2>/dev/null || echo 'not there')." \
		"Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON3=/path/to/python3.12" >&2; exit 1; }
	@set -e; if uv --version >/dev/null 2>&1; then \
		uv=uv; test -x $(BIN)/python || uv venv --quiet --python "$$(command -v $(PYTHON3))" .venv; \
	else \
		uv=$(BIN)/uv; test -x $(BIN)/python || $(PYTHON3) -m venv .venv || { \
			rm -rf .venv; echo "$(PYTHON3) cannot make a virtual environment: install its venv package" \
			"(Debian, Ubuntu: apt install python3-venv) or uv (https://docs.astral.sh/uv)" >&2; exit 1; }; \
		test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv; \
	fi; \
	echo "$$uv pip install -e '.[dev]'"; $$uv pip install --python $(BIN)/python -e '.[dev]'
	@touch $@
