# From a clean clone: `make study` and `make test`. Needs Python 3.11 or newer, make, and nothing else.

PYTHON ?= python3
PROFILE ?= standard
DATA ?= $(or $(SELIB_DATA),data)
# Two notebooks at a time pay while they are short; long ones are quicker one by one, with all cores each.
JOBS ?= $(if $(filter smoke,$(PROFILE)),2,1)
ARGS ?=
UV := 0.13.8
BIN := .venv/bin
ESTIMATE_smoke := 5 minutes
ESTIMATE_standard := 25 minutes
ESTIMATE_full := some hours, on a GPU

export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help study test lab publish readme lock clean

help:
	@echo "make study [PROFILE=smoke|standard|full] [DATA=dir] [JOBS=n] [ARGS=--resume]   run every notebook, write runs/PROFILE/index.html"
	@echo "make test      lint, types, all tests"
	@echo "make lab       JupyterLab on the first notebook"
	@echo "make publish   make runs/PROFILE the committed results (and notebooks, in the standard profile)"
	@echo "make readme    fill the tables of README.md from results/"
	@echo "make lock      resolve requirements.lock again (ARGS=--upgrade for newer versions)"
	@echo "make clean     remove .venv, runs/ and caches; data stays"

study: .venv/.installed
	@echo "The $(PROFILE) profile: about $(ESTIMATE_$(PROFILE)) on two cores"
	$(BIN)/selib run --profile $(PROFILE) --data $(DATA) --jobs $(JOBS) $(ARGS)
	$(BIN)/selib report runs/$(PROFILE)
	@echo "Read runs/$(PROFILE)/index.html"

# Notebooks run twice: under nbval here, under papermill in tests/test_notebooks.py; both on the twin, so that every
# machine sees the same numbers. They come first, being long.
test: export SELIB_PROFILE := smoke
test: export SELIB_DATA := $(CURDIR)/runs/nbval/data
test: export SELIB_RESULTS := $(CURDIR)/runs/nbval/results
test: export SELIB_CHECKPOINTS := $(CURDIR)/runs/nbval/checkpoints
test: export OMP_NUM_THREADS := 1
test: .venv/.installed
	@echo "Lint, types and all tests: about 17 minutes on two cores, a browser included"
	rm -rf runs/nbval
	@echo "Browser for the tests in JupyterLab: $$($(BIN)/python tests/browser.py)"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy selib
	$(BIN)/pytest notebooks tests --nbval-lax --nbval-current-env --nbval-cell-timeout 300 \
		-n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lab: .venv/.installed
	SELIB_DATA=$(abspath $(DATA)) $(BIN)/jupyter lab --ip 127.0.0.1 --ServerApp.root_dir=. \
		--LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb $(ARGS)

publish: .venv/.installed
	$(BIN)/python -c 'from selib import study; study.publish("runs/$(PROFILE)")'
	$(BIN)/selib report results/$(PROFILE)
	$(MAKE) readme

readme: .venv/.installed
	$(BIN)/python -c 'from selib import report; report.update_readme("README.md")'

lock: .venv/.installed
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --generate-hashes --quiet $(ARGS) \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis results/*/index.html
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("selib needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] \
		+ ": name another with make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "Installing the pinned packages into .venv: about 6 GB, one to five minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV)
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@touch $@
