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
# The training data: more keyframes than the preview needs, and small ones.
TOWN = --dataroot demo/town --cache demo/small --teacher $(TEACHER) --image-size 80x140 --feature-size 112x196 \
	--grid 8x50x50 --range -5 5 -25 25 -25 25
RUN = --cache demo/small --split mini_train --no-tensorboard --no-progress --save-every 1000
FEW = $(RUN) --set labels=12.5 --set optim.epochs=30
EVALUATE = $(BIN)/occfeat-train evaluate --cache demo/small --split mini_val --no-progress
demo: setup
	rm -rf demo
	@echo '## Targets: a synthetic city of 2 scenes -> a cache of the default size; see demo/preview/index.html'
	$(BIN)/occfeat-targets synth --out demo/city --scenes 2 --keyframes 4 --image-size 450x800 --sweeps 2
	$(BIN)/occfeat-targets build --dataroot demo/city --cache demo/cache --split mini_train --teacher $(TEACHER)
	$(BIN)/occfeat-targets verify --cache demo/cache --split mini_train
	$(BIN)/occfeat-targets preview --cache demo/cache --split mini_train --out demo/preview
	@echo
	@echo '## Training, scaled down for two cores: 64 synthetic keyframes (the paper: 28,130 of nuScenes), images 64x112 (224x400),'
	@echo '## 32 channels (128), a grid of 50x50 over 25 m (200x200 over 50 m), teacher $(TEACHER); the backbone is stated below.'
	@echo '## This shows that all steps work. It does not measure how much pretraining helps.'
	$(BIN)/occfeat-targets synth --out demo/town --scenes 8 --val-scenes 2 --keyframes 8 --image-size 135x240 --sweeps 1
	for split in mini_train mini_val; do \
		$(BIN)/occfeat-targets build $(TOWN) --split $$split && \
		$(BIN)/occfeat-targets verify --cache demo/small --split $$split && \
		$(BIN)/occfeat-train check --cache demo/small --split $$split || exit; \
	done
	$(BIN)/occfeat-train pretrain $(RUN) --preset small/occfeat --epochs 12 --validate mini_val --save-every 32 --out demo/pretrained
	for task in vehicles map; do \
		$(BIN)/occfeat-train finetune $(FEW) --preset small/$$task-10 --from demo/pretrained --out demo/$$task-pretrained && \
		$(BIN)/occfeat-train finetune $(FEW) --preset small/$$task-10 --out demo/$$task-scratch || exit; \
	done
	for run in pretrained vehicles-pretrained vehicles-scratch map-pretrained map-scratch; do \
		echo "## $$run"; $(EVALUATE) demo/$$run || exit; \
	done
	$(BIN)/occfeat-train report demo/pretrained demo/vehicles-pretrained demo/vehicles-scratch demo/map-pretrained demo/map-scratch \
		--cache demo/small --split mini_val --out demo/report.html

bench: setup
	for benchmark in voxelizer images sampling reads loader lifting step growth loop teacher rounding build memory planning; do \
		echo "## $$benchmark"; $(BIN)/python pipelines/benchmarks/$$benchmark.py || exit; \
	done

clean:
	rm -rf $(VENV) demo
