# Two targets matter to most people: `make demo` and `make test`. Both prepare what they need.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find vswitch tests benchmarks -name '*.pyx' -o -name '*.pxd' -o -name '*.h') $(wildcard vswitch/relay/*.c)

# The first interpreter that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# The sanitizers' build of `make fuzz`, besides the one that is installed.
SANITIZED := build/sanitized
SECONDS ?= 60
TIMES ?= 50
MINUTES ?= 10

.PHONY: help setup required notice demo test test-all repeat roots check bench fuzz soak mutants model format clean

help:
	@echo 'make demo      boot three QEMU guests on one switch and let them ping each other'
	@echo 'make test      run the tests (unit, conformance, end to end with QEMU guests)'
	@echo 'make test-all  the same and the longer matrices, also with the QEMU and kernel of Debian 13'
	@echo 'make roots     as root: both of these in fresh roots of Debian 13, Ubuntu 24.04 and 26.04;'
	@echo '               ARGS="debian-13 --commands demo" for less, ARGS=--help for more'
	@echo 'make repeat    TESTS=file TIMES=50: run some tests that often; STRESS=2: beside stress-ng --cpu 2'
	@echo 'make check     ruff, mypy, the stubs, names nobody uses, and which package may import which'
	@echo 'make bench     measure this switch beside others, with tables and a plot'
	@echo 'make fuzz      SECONDS=60: random guests, frontends and clients against a sanitizers build;'
	@echo '               CASE=file runs a case that it wrote again'
	@echo 'make soak      MINUTES=10: everything that happens in months, and every frame accounted for'
	@echo 'make mutants   change the fast path in 120 places, one at a time, and see which tests notice;'
	@echo '               ARGS="--count 10 --only fdb" for less, ARGS=--help for more'
	@echo 'make model     check the hand-over between threads with spin'
	@echo 'make setup     virtual environment, Cython extensions, system packages for the tests'
	@echo 'make format    let ruff format the code'
	@echo 'make clean     remove what was built, the virtual environment too'

setup: $(VENV)/.built

# All that is missing, at once and before anything is built. The demo has other guests without QEMU.
NEEDS := build
setup test test-all repeat bench fuzz soak mutants model: NEEDS := build test
demo: NEEDS := --without demo build

required:
	@[ -n "$(PYTHON)" ] || { echo 'error: vswitch needs Python 3.11 or newer, and none is on PATH' >&2; \
		echo '  hint: install it and try again, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m vswitch.lab.requirements --install $(NEEDS)

demo: $(VENV)/.built
	@$(BIN)/vswitch demo $(ARGS)

# Before the minutes of building and of tests.
notice:
	@[ "$$(id -u)" = 0 ] || echo 'not root: tests that take root will be skipped, pytest says how many'

test: notice setup
	@$(BIN)/python -m pytest -m 'not slow' $(ARGS)

test-all: notice setup
	@$(BIN)/python -m pytest $(ARGS)

# Needs nothing of what is built here: it clones and builds in each root.
roots:
	@$(PYTHON) -m tests.roots.roots $(ARGS)

# The output of each run that failed stays in build/repeat-NUMBER.log.
repeat: setup
	@mkdir -p build; rm -f build/repeat-*.log; passed=0; \
	$(if $(STRESS),stress-ng --quiet --cpu $(STRESS) & stress=$$!; trap "kill $$stress" EXIT;) \
	for n in $$(seq $(TIMES)); do \
		if $(BIN)/python -m pytest -q $(TESTS) $(ARGS) >build/repeat-$$n.log 2>&1; \
		then passed=$$((passed + 1)); rm build/repeat-$$n.log; else echo "failed: build/repeat-$$n.log"; fi; \
	done; \
	echo "$$passed of $(TIMES) runs passed$(if $(STRESS), beside stress-ng --cpu $(STRESS))"; \
	[ $$passed = $(TIMES) ]

check: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# What Cython adds to every module is in no stub, and its classes are all laid out in C.
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml --ignore-missing-stub \
		--ignore-disjoint-bases $(subst /,.,$(basename $(filter %.pyx,$(SOURCES))))
	$(BIN)/cython-lint --no-pycodestyle --max-line-length 120 vswitch tests benchmarks
	$(BIN)/python -m pytest -q tests/unit/project/test_imports.py tests/unit/project/test_cython_names.py

bench: setup
	@$(BIN)/python -m benchmarks $(ARGS)

fuzz: setup $(SANITIZED)/.built
	@$(BIN)/python -m tests.fuzz.fuzz --sanitized $(SANITIZED) \
		$(if $(CASE),--case $(CASE),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

$(SANITIZED)/.built: $(VENV)/.built
	@echo 'building the Cython extensions with AddressSanitizer and UBSan (some minutes)'
	@VSWITCH_SANITIZE=address,undefined $(BIN)/python setup.py -q build \
		--build-base build/sanitized-objects --build-lib $(SANITIZED)
	@touch $@

soak: setup
	@$(BIN)/python -m tests.soak.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: setup
	@$(BIN)/python -m tests.mutants $(ARGS)

model: setup
	@$(BIN)/python -m pytest -q tests/model $(ARGS)

format: $(VENV)/.built
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: | required
	@echo 'creating the virtual environment in $(VENV)'
	@$(PYTHON) -I -m venv --clear $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check 'setuptools>=77' 'cython>=3.1'
	@touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py $(SOURCES) | required
	@echo 'building the Cython extensions and installing vswitch into $(VENV) (about a minute)'
	@$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@$(BIN)/python setup.py -q build_tools
	@touch $@

clean:
	rm -f vswitch/relay/vswitch-relay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find vswitch tests benchmarks \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +
	for source in $(filter %.pyx,$(SOURCES)); do rm -f "$${source%.pyx}.c" "$${source%.pyx}.html"; done
