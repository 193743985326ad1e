# Every target sets itself up: a virtual environment in .venv with an editable install and the development extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup

.PHONY: demo test check nightly transformers-suite format fuzz campaign bench peers perf gpu-report clean

demo: $(READY)
	$(BIN)/swat-flex demo

# Minutes. What is left out of it is marked `slow`.
test: $(READY)
	$(PYTEST) -m "not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

# Every test, and for hours cases that no run has drawn before; half an hour of configurations for GPUs among them.
nightly: $(READY)
	$(PYTEST) --hypothesis-profile=night
	$(BIN)/python tests/triton/search.py --seconds 1800
	$(MAKE) transformers-suite

# transformers' own tests on our model and our attention; SOURCE=a checkout of transformers adds those of generation.
transformers-suite: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[suite]"
	$(BIN)/python tests/hf/suite/run.py $(if $(SOURCE),--source $(SOURCE))

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(READY)
	$(BIN)/swat-flex fuzz

# A million cases of 50 seeds and more; stopped and started again it goes on.
campaign: $(READY)
	TRITON_INTERPRET=1 $(BIN)/swat-flex fuzz --record perf/results/fuzz.json --cases 1000000 --seconds 300

bench: $(READY)
	mkdir -p .benchmarks
	$(BIN)/pytest perf --benchmark-sort=name --benchmark-columns=median,iqr,rounds --benchmark-json=.benchmarks/now.json
	$(BIN)/python -m perf regression .benchmarks/now.json

# Packages to measure against; those that are missing are named in the tables.
peers: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[peers]"

# The committed CPU records, their pictures, and the figures of README.md and docs/benchmarks.md. On an idle machine.
perf: $(READY)
	$(BIN)/python -m perf --suite cpu --json perf/results/cpu.json --png perf/results/cpu.png
	$(BIN)/python -m perf bars --json perf/results/bars.json
	$(BIN)/python -m perf --suite scaling --json perf/results/scaling.json --png perf/results/scaling.png
	$(BIN)/python -m perf readme

gpu-report: $(READY)
	$(BIN)/python -m perf gpu-report

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# torch goes first and alone, so that the pinned version decides which build pip takes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swat_flex needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,fuzz]"
	touch $@
