# Two commands do everything, each from nothing: make train, make test.
.PHONY: help setup train test lint docs doctor bench-runtime bench-auto bench-balance bench-eplb clean
.DEFAULT_GOAL := help
BIN := .venv/bin

# make train takes: SCHEDULE=1f1b|interleaved|dualpipev|FILE.csv  EPLB=1  ITERS=n  RANKS=n  PLATFORM=auto|cpu|cuda
#                   DIR=folder  FRESH=1  ARGS="further Megatron flags"
TRAIN := $(if $(SCHEDULE),--schedule $(SCHEDULE)) $(if $(EPLB),--eplb) $(if $(ITERS),--iters $(ITERS)) $(if $(RANKS),--ranks $(RANKS)) \
	$(if $(PLATFORM),--platform $(PLATFORM)) $(if $(DIR),--dir $(DIR)) $(if $(FRESH),--fresh) $(ARGS)

help:
	@echo "make train   train a real Megatron-Core MoE model under DualPipeV on this machine (SCHEDULE= EPLB=1 ITERS= FRESH=1 ...)"
	@echo "make test    lint, type check and run all tests"
	@echo "make bench-runtime  time the runtime beside its simulator, torch's schedules and Megatron's (ARGS=\"--steps 10\")"
	@echo "make bench-auto  train under --cf-schedule auto on stages that sleep and look at every step (ARGS=\"--ranks 4\")"
	@echo "make bench-balance  measure the balancer: balancedness, traffic, speed, growth (ARGS=\"speed --eplb FILE\")"
	@echo "make bench-eplb  measure expert balancing in training: exactness, balance, overhead (ARGS=\"overhead\")"
	@echo "make docs    build the docs as a site in site/, API pages included"
	@echo "make doctor  say what is installed and whether it fits"
	@echo "make setup   only make .venv and install; the others do it where it is missing"

.venv/.installed: pyproject.toml
	@bash scripts/setup.sh

setup: .venv/.installed

train: setup
	@$(BIN)/python examples/pretrain_moe/train.py $(TRAIN)

test: lint
	@bash scripts/find-browser.sh >/dev/null || true
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: setup
	@$(BIN)/python -c 'import mkdocs, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	@$(BIN)/mkdocs build --strict

doctor: setup
	@$(BIN)/counterflow doctor

bench-runtime: setup
	@$(BIN)/python benchmarks/runtime.py $(ARGS)

bench-auto: setup
	@$(BIN)/python benchmarks/auto.py $(ARGS)

bench-balance: setup
	@$(BIN)/python benchmarks/balance.py $(ARGS)

bench-eplb: setup
	@$(BIN)/python benchmarks/expert_balancing.py $(ARGS)

clean:
	rm -rf .venv runs site .pytest_cache .ruff_cache .mypy_cache .hypothesis
