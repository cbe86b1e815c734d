# From a clean clone: `make study` and `make test`. Needs Python 3.11 or newer, make, and nothing else.

PYTHON ?= python3
PROFILE ?= standard
DATA ?= $(or $(SELIB_DATA),data)
# Two notebooks at a time pay while they are short; long ones are quicker one by one, with all cores each.
JOBS ?= $(if $(filter smoke,$(PROFILE)),2,1)
ARGS ?=
# Another environment in place of .venv: make study BIN="$CONDA_PREFIX/bin"
BIN ?= .venv/bin
UV := 0.13.8
ESTIMATE_smoke := 5 minutes
ESTIMATE_standard := 25 minutes
ESTIMATE_full := some hours, on a GPU

RUN := "$(BIN)/python"
READY := $(if $(filter .venv/bin,$(BIN)),.venv/.installed)
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
LAB := $(patsubst %,runs/lab/%,$(wildcard notebooks/*.ipynb))
ABSOLUTE := import os, sys; print(os.path.abspath(sys.argv[1]))

export JUPYTER_PREFER_ENV_PATH := 1
# This checkout's code runs, whatever the environment has installed.
export PYTHONPATH := $(CURDIR)

.PHONY: help study lab test test-fast publish docs lock clean

help:
	@echo "make study      run every notebook, write runs/PROFILE/index.html"
	@echo "                [PROFILE=smoke|standard|full] [DATA=folder] [JOBS=n] [ARGS=--resume]"
	@echo "make lab        JupyterLab on copies of the notebooks, in runs/lab [PROFILE=...] [DATA=folder]"
	@echo "make test       lint, types, all tests, every notebook"
	@echo "make test-fast  the unit tests alone"
	@echo "make publish    make runs/PROFILE the committed results (and notebooks, in the standard profile)"
	@echo "make docs       fill the tables of README.md and docs/findings.md"
	@echo "make lock       resolve requirements.lock again (ARGS=--upgrade for newer versions)"
	@echo "make clean      remove .venv, runs/ and caches; data stays"
	@echo "BIN=folder      with any of these: the Python in that folder, and nothing is installed"

study: $(READY)
	@echo "The $(PROFILE) profile: about $(ESTIMATE_$(PROFILE)) on two cores"
	$(RUN) -m studies run --profile $(PROFILE) --data "$(DATA)" --jobs $(JOBS) $(ARGS)
	$(RUN) -m studies report runs/$(PROFILE)
	@echo "Read runs/$(PROFILE)/index.html"

lab: $(READY) $(LAB)
	SELIB_DATA="$$($(RUN) -c '$(ABSOLUTE)' "$(DATA)")" SELIB_PROFILE=$(PROFILE) \
		SELIB_CHECKPOINTS="$(CURDIR)/runs/$(PROFILE)/checkpoints" \
		$(RUN) -m jupyter lab --ip 127.0.0.1 --ServerApp.root_dir="$(CURDIR)/runs/lab" \
		--LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb $(ARGS)

runs/lab/%: %
	@mkdir -p $(@D)
	cp $< $@

# The notebooks come first, being long. They run on the twins, so that every machine sees the same numbers.
test: export SELIB_DATA := $(CURDIR)/runs/test/data
test: export SELIB_CHECKPOINTS := $(CURDIR)/runs/test/checkpoints
test test-fast: export OMP_NUM_THREADS := 1
test: $(READY)
	@echo "Lint, types and all tests: about 15 minutes on two cores, a browser included"
	@echo "Browser for the tests in JupyterLab: $$($(RUN) tests/browser.py)"
	rm -rf runs/test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy selib studies
	$(PYTEST) tests/notebooks tests/studies tests/selib $(ARGS)

test-fast: $(READY)
	$(PYTEST) tests/studies tests/selib -m "not slow" $(ARGS)

publish: $(READY)
	$(RUN) -c 'from studies import notebooks; notebooks.publish("runs/$(PROFILE)")'
	$(RUN) -m studies report results/$(PROFILE)
	$(MAKE) docs

docs: $(READY)
	$(RUN) -m studies.report README.md docs/findings.md

lock: $(READY)
	$(RUN) -m uv pip compile pyproject.toml --extra study --group dev --universal --generate-hashes --quiet $(ARGS) \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis results/*/index.html
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit("selib needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] \
		+ ": name another with make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "Installing the pinned packages into .venv: about 6 GB, one to five minutes"
	"$(PYTHON)" -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	.venv/bin/python -m uv pip sync --python .venv/bin/python --require-hashes requirements.lock
	.venv/bin/python -m uv pip install --python .venv/bin/python --quiet --no-deps --no-build-isolation --editable .
	@touch $@
