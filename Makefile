# Everything happens in $(VENV); nothing outside this folder is changed. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
# Installed before the rest, so that the rest keeps it. The normal index gives Linux the CUDA build, which also
# runs without a GPU. Smaller, without CUDA: make test PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PIP_TORCH ?=
# One thread: on small machines that are shared, OpenMP threads that wait for each other cost tests far more than they
# save. Generating is not affected.
TEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest
# Processes that run test files side by side; a file stays in one, with the bundles that its fixtures export. 0: none.
PROCESSES ?= 2
# Handed to pytest: make test ARGS="tests/test_house.py -x"
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PORT ?= 8000
REQUEST := examples/stickers/requests/first/request.json

.PHONY: help video serve test test-slow lint bench bench-serve gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make video      install what generating needs (no torch), write out/video.mp4 and out/sheet.png"
	@echo "make serve      install what the server needs, show its page at http://127.0.0.1:$(PORT) (PORT=8000)"
	@echo "make test       install everything, run the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the latency suite"
	@echo "make bench-serve  50 clients, 1,000 requests, killed workers: the server under load (minutes)"
	@echo "make gpu        check kernels and model on a GPU, then measure them against their rivals (9 minutes)"
	@echo "make clean      remove $(VENV), build outputs and caches; out/ stays"

video: $(VENV)/.base
	@mkdir -p out
	$(BIN)/conceptmaster generate --request $(REQUEST) --output out/video.mp4 --sheet out/sheet.png
	@echo "video: $(CURDIR)/out/video.mp4"
	@echo "sheet: $(CURDIR)/out/sheet.png"

serve: $(VENV)/.serve
	@mkdir -p out
	@echo "starting: its page will be at http://127.0.0.1:$(PORT), its jobs are in out/jobs, Ctrl-C ends it"
	$(BIN)/conceptmaster serve --data out/jobs --port $(PORT) $(ARGS)

test: $(VENV)/.dev
	$(TEST) -n $(PROCESSES) --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev
	$(TEST) -n $(PROCESSES) --dist loadfile -m slow $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/pytest benchmarks --benchmark-only $(ARGS)

bench-serve: $(VENV)/.dev
	$(BIN)/python -m conceptmaster.benchmarks.serving $(ARGS)

# Installs nothing: it needs a PyTorch built for CUDA, and runs in whatever environment PYTHON is of.
gpu:
	@mkdir -p out/gpu && ln -sfn '$(CURDIR)' out/gpu/conceptmaster
	PYTHONPATH='$(CURDIR)/out/gpu'"$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m conceptmaster.benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: made when the step has succeeded, so a second call is quick and an interrupted one starts again.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is not (`$(PYTHON) -V 2>&1`): make PYTHON=python3.11" >&2; \
		exit 1; }
	@echo "creating $(VENV) with `$(PYTHON) -V 2>&1`"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Editable, so that a change in the sources needs no second install.
$(VENV)/.base: $(VENV)/.created setup.py pyproject.toml
	@echo "installing conceptmaster and what generating needs into $(VENV)"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.serve: $(VENV)/.created setup.py pyproject.toml
	@echo "installing conceptmaster[serve] into $(VENV)"
	@$(PIP) install -e '.[serve]'
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "installing $(TORCH) into $(VENV) (large: minutes)"
	@$(PIP) install $(PIP_TORCH) '$(TORCH)'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch setup.py pyproject.toml
	@echo "installing conceptmaster[export,train,serve,ray,data,nouns,mc-bench,dev] into $(VENV)"
	@$(PIP) install -e '.[export,train,serve,ray,data,nouns,mc-bench,dev]'
	@mkdir -p $(VENV)/mypy && ln -sfn '$(CURDIR)' $(VENV)/mypy/conceptmaster  # see [tool.mypy] in pyproject.toml
	@touch $@
