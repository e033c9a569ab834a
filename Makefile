# `make help` lists what there is to do. Everything runs in .venv, which is made when it is missing.
PYTHON := .venv/bin/python
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-pillow test-s3 test-cluster coverage check docs format quick-test test-data train-local clean

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/ready ## make .venv (about 3 minutes)

.venv/ready: pyproject.toml setup.py constraints.txt scripts/env_setup.sh loaders/_jpeg.c loaders/_resample.h
	scripts/env_setup.sh

demo: .venv/ready ## pack, train, be killed, resume and evaluate on real images, without a GPU (2 minutes)
	$(PYTHON) scripts/demo.py

test: .venv/ready ## run the tests, two at a time
	$(PYTHON) -m pytest -q -n 2 --dist worksteal

test-slow: .venv/ready ## run the tests that take minutes each: many kills, resumed on other numbers of processes
	$(PYTHON) -m pytest -q -m slow --timeout 2400

test-pillow: .venv/ready ## run the decoders' tests on plain Pillow, whose pixels they promise
	scripts/bench_setup.sh pillow
	.bench/pillow/bin/python -m pytest -q tests/test__jpeg.py tests/test_decode.py tests/test_convert.py

# Against OpenStack Swift, which is installed from Debian's packages (root), on loopback ports.
test-s3: .venv/ready ## run the S3 tests, and a training, against a real S3 server (root)
	@set -e; exports=$$(scripts/swift_up.sh); eval "$$exports"; trap scripts/swift_down.sh EXIT; \
	$(PYTHON) -m pytest -q tests/test_store.py tests/test_s3*.py tests/test_prefetch.py tests/test_copy.py \
		tests/test_duplicate.py tests/test_published.py tests/test_mirror.py \
		tests/test_train.py::test_training_from_s3 tests/test_train.py::test_checkpoints_on_s3_outlive_the_disk

# SLURM comes from Debian's packages (root), and runs on loopback ports.
test-cluster: .venv/ready ## run the tests on several nodes: SLURM, network namespaces (root)
	@set -e; exports=$$(scripts/slurm_up.sh); eval "$$exports"; trap scripts/slurm_down.sh EXIT; \
	$(PYTHON) -m pytest -q tests/cluster

check: .venv/ready ## format, lint, types, import rules
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_structure.py

docs: .venv/ready ## run the commands of README.md and docs/03_getting_started.md, as typed
	$(PYTHON) scripts/run_docs.py

coverage: .venv/ready ## run the tests, and show the lines that none of them runs
	$(PYTHON) -m pytest -q -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered

format: .venv/ready ## format the code
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

quick-test: data/digits-shards ## train and validate on one batch of the digits
	$(PYTHON) train.py --config recipes/demo.yaml --devices 1 trainer.fast_dev_run=true

test-data: data/digits-shards ## check every byte of the data in DATA, and time the loader (DATA=data/digits-shards)
	$(PYTHON) shard.py info $(DATA)
	$(PYTHON) shard.py verify $(DATA)
	$(PYTHON) scripts/trace_loader.py $(DATA) --global_batch 64 --workers 2 --steps 3

train-local: .venv/ready ## train recipes/local.yaml on the data in DATA
	$(PYTHON) train.py --config recipes/local.yaml --resume auto $(if $(filter command line,$(origin DATA)),data.root=$(DATA))

DATA ?= data/digits-shards

data/digits-shards: .venv/ready
	rm -rf data/digits
	$(PYTHON) scripts/make_demo_dataset.py data/digits
	$(PYTHON) shard.py pack data/digits $@ --shard_size 300KB

clean: ## remove what the demo and quick-test made
	rm -rf demo data/digits data/digits-shards
