# make demo      from nothing to a pretrained model: install, then text -> tokens -> training -> export -> sample
# make install   .venv with everything, and .venv/bin/swift-dist
# make test      the whole CPU test suite; test-fast: without what takes long (under 3 minutes)
# make test-cluster   whole jobs through a real Slurm and simulated nodes; as root it installs what that needs (apt-get)
# make lint      style and types
# make bench     our speed against bare megatron-core, torchrun, tokenizers and cp
# make gpu       what only an NVIDIA GPU can show, on one, in 12 minutes: runs/gpu/gpu.md
# make tables    the full tables of golden parity and of conversions (long)
# make clean     remove what the above made, except .venv; distclean: .venv too
#
# Variables: VENV, PYTHON, TORCH_ARGS (see .ci/install); DEMO: the demo's folder; JOBS: processes that run tests;
#   ARGS: more words for pytest.

VENV ?= .venv
DEMO ?= .demo
JOBS ?= 2
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Ranks wait for each other and runs for their start: some processes of tests leave less of the machine idle. A file
# goes to one of them: its tests share warm gangs, and runs that others are compared with.
SHARED_OUT := -n $(JOBS) --dist loadfile --no-loadscope-reorder
export VENV PYTHON TORCH_ARGS

TESTBED_PROGRAMS := slurmctld slurmd sbatch munged ip
TESTBED_PACKAGES := slurm-wlm slurmctld slurmd slurm-client munge iproute2

.PHONY: demo install test test-fast test-cluster lint bench gpu tables clean distclean

demo: install
	@bash docs/demo/run.sh $(DEMO)

install:
	@bash .ci/install

test: install
	$(PYTEST) $(SHARED_OUT) -m "not table and not testbed" $(ARGS)

test-fast: install
	$(PYTEST) $(SHARED_OUT) -m "not table and not slow and not testbed" $(ARGS)

test-cluster: install
	@absent=$$(for name in $(TESTBED_PROGRAMS); do PATH="$$PATH:/usr/sbin" command -v $$name >/dev/null || echo $$name; done); \
	if [ -n "$$absent" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends $(TESTBED_PACKAGES); } \
	        || echo "not installed; the tests that need it are skipped, and say so"; \
	fi
	$(PYTEST) -m "testbed and not table" $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

gpu: install
	@OMP_NUM_THREADS=1 bash tests/benchmarks/gpu.sh runs/gpu

tables: install
	$(PYTEST) -m table $(ARGS)

clean:
	rm -rf build dist .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) *.egg-info
