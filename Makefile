# make train   sets up and trains the default experiment: an agent that never heard of us
# make test    sets up and runs the tests; make test-all also those that take minutes each, and more
#              examples of every property
# make test-frameworks   makes the environment of every example agent, then runs them all; with
#              FRAMEWORKS="curl openai" those alone
# make bench-spans   measures the span store beside agentlightning 0.3.0, see docs/benchmarks.md
# make bench-learner   measures a step of the learner beside TRL's
# make bench-step      measures whole steps of the default experiment beside TRL's trainer
# make bench-learner-gpu   measures a step of the learner on a GPU, where PyTorch sees one
# make bench-weights   measures handing new weights to an engine, by every way
# make soak           trains for half an hour while something dies every minute
# make bench-algorithms   trains with every algorithm, three seeds each; goes on where it was stopped
# make bench-off-policy   trains on older and older samples, with and without correction
# make bench-pipeline  measures asynchronous training beside synchronous
# make bench-gateway   measures the gateway beside agentlightning 1.0's, and with nothing in between
# make check   format, lint, types, and the direction of imports
VENV ?= .venv
ARGS ?=
# Which example agents: all of them, unless names are given.
FRAMEWORKS ?=

# Where it is set, as in many containers, every process would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup train test test-all test-frameworks bench-spans bench-gateway bench-learner bench-learner-gpu bench-step bench-weights bench-algorithms bench-off-policy bench-pipeline soak check format lock clean
.DEFAULT_GOAL := train

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.lock pyproject.toml scripts/setup
	@scripts/setup $(VENV)

train: setup
	@$(VENV)/bin/lightning-ray train experiment=calculator $(ARGS)

test: setup
	@scripts/run-tests $(VENV) "not slow and not frameworks" $(ARGS)

test-all: setup
	@HYPOTHESIS_PROFILE=thorough scripts/run-tests $(VENV) "not frameworks" $(ARGS)

test-frameworks: setup
	@$(VENV)/bin/python examples/frameworks/environments.py $(FRAMEWORKS)
	@FRAMEWORKS="$(FRAMEWORKS)" $(VENV)/bin/python -m pytest tests/frameworks -m frameworks $(ARGS)

bench-spans: setup
	@$(VENV)/bin/python -m benchmarks.spans $(ARGS)

bench-gateway: setup
	@$(VENV)/bin/python -m benchmarks.gateway $(ARGS)

bench-step: setup
	@$(VENV)/bin/python -m benchmarks.step $(ARGS)

bench-weights: setup
	@$(VENV)/bin/python -m benchmarks.weights $(ARGS)

soak: setup
	@$(VENV)/bin/python -m benchmarks.soak $(ARGS)

bench-algorithms: setup
	@$(VENV)/bin/python -m benchmarks.algorithms $(ARGS)

bench-off-policy: setup
	@$(VENV)/bin/python -m benchmarks.off_policy $(ARGS)

bench-pipeline: setup
	@$(VENV)/bin/python -m benchmarks.pipeline $(ARGS)

bench-learner: setup
	@$(VENV)/bin/python -m benchmarks.learner $(ARGS)

bench-learner-gpu: setup
	@$(VENV)/bin/python -m benchmarks.learner_gpu $(ARGS)

check: setup
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

format: setup
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

lock:
	@scripts/lock

clean:
	rm -rf outputs .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
