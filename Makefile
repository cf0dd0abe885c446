# Everything lives in .venv. On a machine without a GPU the download is smaller with PyTorch's CPU wheels:
#   make demo PIP_ARGS="--extra-index-url <the CPU wheel index named on pytorch.org>"
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
HERE = $(abspath $(BIN))
READY := $(VENV)/.installed

.PHONY: help setup demo serve test test-fast test-long fuzz rehearsal lint format bench gpu-check clean
.DEFAULT_GOAL := setup

# The targets below that say after two hashes what they are for.
help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## .venv, in the versions of constraints.txt; plain make does it

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e ".[dev,plot,face,serve,page]"
	touch $(READY)

# A video from a small trained checkpoint: on the GPUs of the machine, else on two CPU ranks.
demo: setup  ## a video by a small checkpoint; needs no GPU and no weights
	@started=$$(date +%s); \
	$(BIN)/mochi-xdit --demo --seed 1 --output demo.mp4 --overwrite > /dev/null && \
	printf '%s\n' "" \
	    "$(CURDIR)/demo.mp4 was made in $$(($$(date +%s) - started)) s. Next, the first with a prompt of your own:" \
	    "  $(HERE)/mochi-xdit --demo --output blue.mp4 --prompt 'A small blue square moves to the left.'" \
	    "  $(HERE)/cogvideox-xdit --demo --output cogvideox.mp4" \
	    "  $(HERE)/xdit-doctor" \
	    "or bring all commands of README.md into this shell:  source $(HERE)/activate"

# The small checkpoints of all programs behind HTTP, on this machine alone; its address is printed. ARGS= see --help.
serve: setup  ## the demo models behind HTTP and in the browser
	$(BIN)/xdit-serve --demo --port $(or $(PORT),8000) $(ARGS)

# By WORKERS processes side by side, each with whole files, the longest first; 0: in one, as pytest alone.
test: setup  ## all tests, a quarter of an hour on 2 cores
	$(BIN)/python -m pytest --numprocesses $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder

test-fast: setup  ## the quick tests
	$(BIN)/python -m pytest -m "not slow and not long"

# More of what the tests show already, for hours that nobody waits for.
test-long: setup  ## more of the same, hours
	$(BIN)/python -m pytest -m long

# Hostile commands, files, names and environments, seeded: other ones by SEED, more by CASES.
fuzz: setup  ## hostile commands, files, names and environments
	$(BIN)/python -m tests.fuzz --cases $(or $(CASES),5000) --seed $(or $(SEED),0)

# The CUDA path without a GPU: every model, layout, placement, kernel and card on fake tensors; ARGS= see its --help.
rehearsal: setup  ## the CUDA path without a GPU
	$(BIN)/python -m tests.rehearsal $(ARGS)

lint: setup  ## ruff, mypy, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile

format: setup  ## rewrites the code as ruff formats it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## seconds of a demo on this machine; benchmarks/run.py takes models
	$(BIN)/python benchmarks/run.py

# What is claimed of GPUs, measured on this machine's; PYTHON= takes an environment as it is, ARGS= see its --help.
# Ended early or run again, it goes on with what is missing.
ifeq ($(origin PYTHON),file)
gpu-check: setup  ## what is claimed of GPUs, measured on this machine's
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)
else
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)
endif

clean:  ## removes .venv and what was built
	rm -rf $(VENV) build dist *.egg-info
