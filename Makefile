# make train and make test do everything, each from nothing; make check is the loop while editing (docs/testing.md).
.PHONY: help setup train test check test-unit test-ranks nightly lint docs doctor
.PHONY: bench-runtime bench-handover bench-auto bench-balance bench-eplb bench-analyze bench-plan clean
.DEFAULT_GOAL := help
BIN := .venv/bin

# make train takes: TRAINER=megatron|deepspeed
#                   SCHEDULE=1f1b|interleaved|dualpipev|FILE.csv  EPLB=1  ITERS=n  RANKS=n  PLATFORM=auto|cpu|cuda
#                   TE=1  FP8=delayed|tensorwise|blockwise|mxfp8  DIR=folder  FRESH=1  ARGS="further Megatron flags"
TRAINER := megatron
EXAMPLE_megatron := examples/pretrain_moe/train.py
EXAMPLE_deepspeed := examples/pretrain_deepspeed/train.py
TRAIN := $(if $(SCHEDULE),--schedule $(SCHEDULE)) $(if $(EPLB),--eplb) $(if $(ITERS),--iters $(ITERS)) $(if $(RANKS),--ranks $(RANKS)) \
	$(if $(PLATFORM),--platform $(PLATFORM)) $(if $(filter-out 0,$(TE)),--te) $(if $(FP8),--fp8 $(FP8)) \
	$(if $(DIR),--dir $(DIR)) $(if $(FRESH),--fresh) $(ARGS)

help:
	@echo "make train   train a real Megatron-Core MoE model under DualPipeV on this machine (SCHEDULE= EPLB=1 TE=1 FP8=blockwise ...)"
	@echo "make train TRAINER=deepspeed   the same for a DeepSpeed PipelineModule"
	@echo "make check   while editing: lint, types and the fast unit tests, in a minute (TESTS=\"tests/unit/test_eplb.py\" ...)"
	@echo "make test-unit   all tests that start no ranks"
	@echo "make test-ranks  the tests that train, on four ranks of the CPU"
	@echo "make test    all of it: lint, types, test-unit and test-ranks"
	@echo "make nightly the long sweeps: 2,000 examples a property, 2,000 drawn command lines, every schedule with every feature"
	@echo "make bench-runtime  time the runtime beside its simulator, torch's schedules and Megatron's (ARGS=\"--steps 10\")"
	@echo "make bench-handover  time a hand-over between the two parts of an overlapped pair"
	@echo "make bench-auto  train under --cf-schedule auto on stages that sleep and look at every step (ARGS=\"--ranks 4\")"
	@echo "make bench-balance  measure the balancer: balancedness, traffic, speed, growth (ARGS=\"speed --eplb FILE\")"
	@echo "make bench-eplb  measure expert balancing in training: exactness, balance, overhead, an emulated device (ARGS=\"device\")"
	@echo "make bench-analyze  measure the analyser of traces: agreement, invariance, time and memory (ARGS=\"cost --gigabytes 2\")"
	@echo "make bench-plan  score the planner on published runs (ARGS=\"--held-out\"), or on CPU ranks (ARGS=cpu)"
	@echo "make docs    build the docs as a site in site/, API pages included"
	@echo "make doctor  say what is installed and whether it fits"
	@echo "make setup   only make .venv and install; the others do it where it is missing"

.venv/.installed: pyproject.toml scripts/setup.sh
	@bash scripts/setup.sh

setup: .venv/.installed

train: setup
	@$(BIN)/python $(or $(EXAMPLE_$(TRAINER)),$(error TRAINER=$(TRAINER) given; allowed: megatron, deepspeed)) $(TRAIN)

# PYTEST="further options of pytest"
RUN_TESTS := $(BIN)/python -m pytest $(PYTEST)
WITHOUT_RANKS := tests/unit tests/megatron tests/browser
# A file's tests stay together: they share what they compile and import.
BESIDE := -n auto --maxprocesses 4 --dist loadfile

# Lint and types run beside the tests.
check: setup
	@$(MAKE) --no-print-directory lint & lint=$$!; \
	$(RUN_TESTS) $(BESIDE) -q -m "not slow and not nightly" $(or $(TESTS),tests/unit tests/megatron); tests=$$?; wait $$lint && exit $$tests

test-unit: setup
	@bash scripts/find-browser.sh >/dev/null || true
	@$(RUN_TESTS) $(BESIDE) $(WITHOUT_RANKS)

test-ranks: setup
	@$(RUN_TESTS) tests/distributed tests/gpu

# Both, whatever the first finds.
test: lint
	@$(MAKE) --no-print-directory --keep-going test-unit test-ranks

nightly: setup
	@HOSTILE_DRAWS=2000 $(RUN_TESTS) $(BESIDE) $(WITHOUT_RANKS) --hypothesis-profile=nightly
	@$(RUN_TESTS) -m nightly tests/distributed
	@$(BIN)/python -m benchmarks.equality
	@$(BIN)/python -m benchmarks.hybrid
	@$(BIN)/python -m benchmarks.te
	@$(BIN)/python -m benchmarks.deepspeed
	@$(BIN)/python -m benchmarks.pairs
	@$(BIN)/python -m benchmarks.just_in_time
	@$(BIN)/python -m benchmarks.works_with

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
	@$(BIN)/python -m benchmarks.runtime $(ARGS)

bench-handover: setup
	@$(BIN)/python -m benchmarks.handover $(ARGS)

bench-auto: setup
	@$(BIN)/python -m benchmarks.auto $(ARGS)

bench-balance: setup
	@$(BIN)/python -m benchmarks.balance $(ARGS)

bench-analyze: setup
	@$(BIN)/python -m benchmarks.analyze $(ARGS)

bench-plan: setup
	@$(BIN)/python -m benchmarks.plan $(ARGS)

bench-eplb: setup
	@$(BIN)/python -m benchmarks.expert_balancing $(ARGS)

clean:
	rm -rf .venv runs site .pytest_cache .ruff_cache .mypy_cache .hypothesis
