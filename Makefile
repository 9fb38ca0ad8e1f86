# make test   set everything up in .venv and run linters, type checker and tests
# make demo   set everything up and run the main job on a small synthetic city, from data set to checked cache
# make bench  every benchmark of pipelines/benchmarks, one after the other

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup test demo bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}; make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[targets,train,dev]'
	touch $@

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The teacher's weights are random unless TEACHER names a hub id or a local folder; the output says so.
TEACHER ?= random:facebook/dinov2-small
demo: setup
	rm -rf demo
	$(BIN)/occfeat-targets synth --out demo/city --scenes 2 --keyframes 4 --image-size 450x800 --sweeps 2
	$(BIN)/occfeat-targets build --dataroot demo/city --cache demo/cache --split mini_train --teacher $(TEACHER)
	$(BIN)/occfeat-targets verify --cache demo/cache --split mini_train
	$(BIN)/occfeat-targets preview --cache demo/cache --split mini_train --out demo/preview
	$(BIN)/occfeat-train check --cache demo/cache --split mini_train

bench: setup
	for benchmark in voxelizer images sampling reads teacher rounding build memory; do \
		echo "## $$benchmark"; $(BIN)/python pipelines/benchmarks/$$benchmark.py || exit; \
	done

clean:
	rm -rf $(VENV) demo
