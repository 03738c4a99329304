# Every target sets itself up in .venv from requirements.lock.
PYTHON ?= $(or $(shell command -v python3.11 2>/dev/null),python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARCHIVE ?=

.PHONY: help demo test test-slow check format clean

help:
	@echo "make demo [ARCHIVE=dir]  archive -> shards -> CromSS on two workers -> MLflow -> registered encoders, under demo/"
	@echo "make test                the tests"
	@echo "make test-slow           the long ones too"
	@echo "make check               ruff and mypy --strict"
	@echo "make format              ruff, applied"
	@echo "make clean               removes demo/ (not .venv)"

$(READY): requirements.lock pyproject.toml
	@echo "Installing the locked environment into $(VENV) (3.3 GB, more with CUDA; some minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	$(BIN)/python launch/demo.py $(if $(ARCHIVE),--archive "$(ARCHIVE)")

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo
