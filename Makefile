# The house's commands, for GNU make 3.81 (macOS) and later. `make` alone lists them.
#
# Everything is installed into .venv. Two stamps in there remember what is installed, so that a second
# `make demo` or `make test` starts at once, until pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
MADE  := $(VENV)/.made
BASE  := $(VENV)/.installed
DEV   := $(VENV)/.installed-dev

# On Linux pip's ordinary torch brings CUDA (gigabytes). With an address in TORCH_INDEX pip prefers the CPU build
# found there: "2.13.0+cpu" satisfies the pin torch==2.13.0 and sorts above it. Wheels at PIP_FIND_LINKS win likewise.
PIP_INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
              $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)')

PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

# The data that does not belong in the repository may lie beside the checkout.
WITH_DATA = if [ -z "$$MEDFED_DATA" ] && [ -d ../shared/data ]; then \
              MEDFED_DATA=$$(cd ../shared/data && pwd) && export MEDFED_DATA; fi;

.PHONY: help demo test test-fast test-long check docs clean always
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=...       the python (3.11 to 3.14) that makes $(VENV); default: the first one found that works"
	@echo "TORCH_INDEX=...  on Linux without a GPU: the index address that pytorch.org (Get Started, Linux, Pip, CPU) shows"
	@echo "ARGS=...         more arguments for pytest, as in: make test ARGS='-k heart'"

demo: $(BASE)  ## train the bundled breast-cancer study on four simulated hospitals
	@$(BIN)/medfed run breast-cancer

test: $(DEV)  ## all tests but the long tail, in two processes
	@$(WITH_DATA) $(PYTEST) $(ARGS)

test-fast: $(DEV)  ## the tests that are not marked slow
	@$(WITH_DATA) $(PYTEST) -m "not slow and not long" $(ARGS)

test-long: $(DEV)  ## the long tail: large samples, grids of crashes, the notebook
	@$(WITH_DATA) $(PYTEST) -m long $(ARGS)

check: $(DEV)  ## format, lint, types, layers, docs: what CI checks beside the tests
	@scripts/check

docs: $(DEV)  ## write the generated reference pages anew
	@$(BIN)/python scripts/make_docs.py

clean:  ## remove the environment, caches and builds; runs/ stays, it holds results
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): $(MADE) pyproject.toml constraints.txt
	@echo "installing medfed and its pinned dependencies into $(VENV); takes about a minute, longer on a slow line ..."
	@$(PIP_INSTALL) -e .
	@touch $@

# The tests' environment holds the demo's, so it sets both stamps.
$(DEV): $(MADE) pyproject.toml constraints.txt
	@if [ -e $(BASE) ]; then echo "adding the development tools to $(VENV) ..."; else \
	echo "installing medfed, its pinned dependencies and the development tools into $(VENV); takes about a minute ..."; fi
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(BASE) $@

# The pins have wheels for these versions of Python. A pyenv shim may exist and fail, so each candidate is run.
# Debian keeps ensurepip, without which there is no .venv, in a package of its own.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))

# A python that was upgraded away leaves a dangling link: then .venv is made anew (the stamps in it go too).
$(MADE): $(shell [ -x $(BIN)/python ] || echo always)
	@if [ -n "$(PYTHON)" ]; then set -- "$(PYTHON)"; \
	else set -- python3 python3.14 python3.13 python3.12 python3.11; fi; \
	found=; bare=; \
	for python in "$$@"; do \
	  "$$python" -c '$(SUITABLE)' >/dev/null 2>&1 || continue; \
	  if "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then found=$$python; break; fi; \
	  bare=$${bare:-$$python}; \
	done; \
	if [ -n "$$found" ]; then \
	  echo "making $(VENV) with $$("$$found" --version) ..."; \
	  "$$found" -m venv --clear $(VENV) && touch $@; \
	elif [ -n "$$bare" ]; then \
	  version=$$("$$bare" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "$$bare cannot make a virtual environment: its ensurepip is missing." >&2; \
	  echo "On Debian or Ubuntu: apt install python3-venv (or python$$version-venv), then run make again." >&2; \
	  exit 1; \
	else \
	  echo "no suitable python among: $$*; medfed needs Python 3.11 to 3.14." >&2; \
	  echo "On Debian or Ubuntu: apt install python3 python3-venv. On macOS: brew install python@3.13." >&2; \
	  echo "Or name one: make PYTHON=path/to/python3 ..." >&2; \
	  exit 1; \
	fi
