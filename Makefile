# `make train` and `make test` need nothing but Python 3.11 or newer: each sets the machine up first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   := .cache/data
READY  := $(VENV)/.ready

.PHONY: train test test-slow lint format docs compare bench setup data smollm2 browser package release clean

train: setup data
	$(BIN)/orthoshard train

compare: setup data
	$(BIN)/orthoshard compare

bench: setup
	$(BIN)/orthoshard bench

test: lint docs data
	$(BIN)/pytest -n 2 -m "not slow" --durations 10

test-slow: setup data smollm2 browser
	$(BIN)/pytest -n 2 -m slow

lint: setup
	$(BIN)/ruff check src tests examples experiments
	$(BIN)/ruff format --check src tests examples experiments
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format src tests examples experiments
	$(BIN)/ruff check --fix src tests examples experiments

docs: setup
	$(BIN)/sphinx-build -q -W -b html docs docs/_build

setup: $(READY)

# torch first and from its pin: any looser request may fetch gigabytes of CUDA packages. torchtitan without what it asks
# for: wandb, and another `datasets` than trl's; its optimizer containers need neither. timm without torchvision, whose
# wheel needs torch's CUDA build: its models and optimizers need none.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-deps -c constraints.txt torchtitan spmd_types timm
	touch $@

data: setup
	$(BIN)/orthoshard data shakespeare

# A pretrained model of 135M parameters, 93 MB: see docs/evidence.md.
smollm2: setup
	$(BIN)/python -m orthoshard.lab.train.pretrained smollm2-135m

# Chromium, in which the page of `orthoshard report` is tested: the machine's, or else Debian's, or playwright's own.
browser: setup
	$(BIN)/pip install -q -c constraints.txt -e ".[browser]"
	$(BIN)/python -c 'import shutil, sys; sys.exit(not any(map(shutil.which, sys.argv[1:])))' \
	    chromium chromium-headless-shell chromium-browser google-chrome \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -q -y chromium-headless-shell; } \
	  || $(BIN)/playwright install --only-shell chromium

# An sdist and a wheel, equal to the bit for equal sources (hatchling, from its pin), as PyPI takes them.
package: setup
	$(BIN)/pip install -q -c constraints.txt build hatchling twine
	rm -rf dist
	$(BIN)/python -m build -q --no-isolation
	$(BIN)/twine check --strict dist/*

# make release VERSION=0.2.0
release:
	$(PYTHON) .ci/release.py $(VERSION)

clean:
	rm -rf $(VENV) .cache docs/_build dist
