# make test   install into .venv, then run linters, type checker and all tests
# make check  the same without the slow tests
# make demo   install into .venv, then run everything on a small synthetic city: data set, cache, training, demo/report.html
# make bench  run all benchmarks of pipelines/benchmarks

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup lint test check demo bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}; make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[targets,train,dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One worker per core, at most four, because each takes up to 3 GB. One worker runs all tests of a module and builds its fixtures once.
PYTEST = $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadscope \
	--no-loadscope-reorder --durations 15
test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -m 'not slow'

# The teacher has random weights unless TEACHER is a hub id or a local folder. The output states this.
TEACHER ?= random:facebook/dinov2-small
# Without TEACHER, the study has no arm with a trained teacher.
demo: setup
	rm -rf demo
	@echo '## Targets: a synthetic city -> a cache of the default size; see demo/preview/index.html'
	$(BIN)/occfeat-targets synth --out demo/full/city --scenes 1 --keyframes 2 --image-size 450x800 --sweeps 1
	$(BIN)/occfeat-targets build --dataroot demo/full/city --cache demo/full --split mini_train --teacher $(TEACHER)
	$(BIN)/occfeat-targets verify --cache demo/full --split mini_train --samples 1
	$(BIN)/occfeat-targets preview --cache demo/full --split mini_train --out demo/preview
	@echo
	@echo '## Does pretraining help? The smallest size of pipelines/study: pretraining, finetuning and evaluation with two seeds.'
	$(BIN)/python -m pipelines.study --size demo --out demo $(if $(filter random:%,$(TEACHER)),,--teacher $(TEACHER))

bench: setup
	for benchmark in voxelizer images corruptions sampling reads loader lifting step growth methods loop teacher rounding build memory planning; do \
		echo "## $$benchmark"; $(BIN)/python pipelines/benchmarks/$$benchmark.py || exit; \
	done

clean:
	rm -rf $(VENV) demo
