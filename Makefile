# Everything a fresh machine needs: `make train` and `make test` make .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test test-gpu test-wheel lint types clean

train: $(READY)
	$(BIN)/moetrain train tiny --nproc auto

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not gpu and not gpu2"

test-gpu: $(READY)
	$(BIN)/python -m pytest -m "gpu or gpu2"

# A wheel, installed into an empty environment elsewhere, trains.
test-wheel: $(READY)
	bash tests/wheel.sh $(PYTHON)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
