# make setup | bench | test | test-fast | lint | horovod. Everything goes into .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup bench test test-fast lint horovod firecaffe results clean

setup: $(VENV)/.ready

# Made again when what to install changes. The stamp comes last: a set-up that was cut off is done again.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"scaletrain needs Python 3.11 or newer; this is {v.major}.{v.minor} (say which with make PYTHON=...)")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

bench: setup
	$(BIN)/scaletrain bench scaling examples/digits.yaml --workers 1,2 --exchange native,ring,tree,none --repeats 3 --set epochs=12 --out runs/bench-$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not cluster and not gpu"

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Horovod 0.28.1 against this torch; two to four minutes.
horovod: setup
	launch/build_horovod.sh $(BIN)/python

# FireCaffe's curves on emulated hosts (root; network namespaces): server, tree and ring, NiN and GoogLeNet, 1 to 16 hosts. An estimated 20 minutes;
# started again after a stop it measures what is missing (runs/firecaffe).
firecaffe: setup
	$(BIN)/scaletrain bench firecaffe

# Every figure in benchmarks/results/, with hardware, versions and commit in each header (root; hours: best on a machine that does nothing else).
results: setup
	$(BIN)/scaletrain bench collectives --workers 2,4 --algorithms auto,native --sizes 4K,64K,1M,25M,100M --out benchmarks/results/collectives_one_host.json
	$(BIN)/scaletrain bench parameter-server --output benchmarks/results/parameter_server
	$(BIN)/scaletrain bench prediction
	$(BIN)/scaletrain bench firecaffe

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
