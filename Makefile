# Everything runs in $(VENV), which is made from the lock on first use and kept after. `make help` lists the targets.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
VERSION := $(shell p=$(BIN)/python; [ -x $$p ] || p=$(PYTHON); $$p -c 'import sys; print("%d%d" % sys.version_info[:2])')
LOCK := requirements/py$(VERSION)-cpu.txt
INSTALLED := $(VENV)/.installed-$(shell cat $(LOCK) pyproject.toml 2>/dev/null | sha256sum | cut -c1-16)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check --no-deps --no-compile
CODE := rlmm rewards rollouts tests examples

.DEFAULT_GOAL := help
.PHONY: help install quickstart evidence ablations check lint types format test test-gpu test-long lock

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

quickstart: install  ## train, compare and export on this machine; about seven minutes on one core
	$(BIN)/rlmm run configs/quickstart.yaml

check: lint types test  ## what a change must pass

lint: install  ## style
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: install  ## static types
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: install  ## rewrite the code in the house style
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

evidence: install  ## the evidence that RL helped, in docs/evidence: hours
	for plan in configs/evidence/*.yaml; do $(BIN)/rlmm evidence $$plan || exit 1; done

ablations: install  ## what each setting of GRPO does, in docs/ablations: about an hour
	for plan in configs/ablations/*.yaml; do $(BIN)/rlmm ablate $$plan || exit 1; done

# A file's tests stay in one process: some share an engine that takes long to start. In the order of their names, which
# puts the files of short tests last, where they fill what is left of each process's time.
test: install  ## every test but the long ones, on all cores
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-gpu: install  ## the tests that need a GPU, which nothing else may use meanwhile
	$(BIN)/python -m pytest -m gpu tests/gpu

test-long: install  ## the tests that take minutes: the README's commands whole among them
	$(BIN)/python -m pytest -m long

lock: install  ## write the installed versions into the lock, under the header it has
	{ grep '^#' $(LOCK); $(BIN)/pip freeze --all --exclude pip --exclude rlmm; } > $(LOCK).new
	mv $(LOCK).new $(LOCK)

install: $(INSTALLED)  ## the locked versions and rlmm itself (editable) in the virtual environment

# torch comes first and alone: its CPU build is in no index but PyTorch's own, unless pip is configured to see another.
# --no-compile: most of these files are never imported, and those that are get compiled then.
$(INSTALLED):
	@[ -f $(LOCK) ] || { echo "No lock for this Python ($(LOCK)). Install Python 3.11, or name one: make PYTHON=..."; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	torch=$$(grep '^torch==' $(LOCK)); $(PIP_INSTALL) $$torch || $(PIP_INSTALL) --index-url $(TORCH_INDEX) $$torch
	$(PIP_INSTALL) -r $(LOCK)
	$(PIP_INSTALL) --no-build-isolation -e .
	rm -f $(VENV)/.installed-*
	touch $@
