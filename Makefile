# Every target sets up what it needs: a fresh machine wants python3 >= 3.10 with venv, and make, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET ?= 1

.DEFAULT_GOAL := help
.NOTPARALLEL:  # one pip at a time
.PHONY: help demo test sanitize lint types bench wheel clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

demo: $(VENV)/.ready-demo  ## the main job: invert the demo photos, pictures and numbers in out/demo
	$(BIN)/clone-fast demo --out out/demo

test: $(VENV)/.ready-demo,test  ## the whole test suite
	$(BIN)/pytest tests

# No caching allocator: each tensor is an allocation of its own, so that what lies beside it is out of bounds, and memory
# that was used before does not count as written. It cannot serve a graph capture, hence no replays. What PyTorch's own
# kernels do is followed by initcheck only, which must know what they wrote; what cuDNN's do, it does not see, hence the
# plugin. Racecheck must be told of more barriers than it makes room for, or ends in an error of its own.
SANITIZER := PYTORCH_NO_CUDA_MEMORY_CACHING=1 CLONE_FAST_STRICT=1 compute-sanitizer --error-exitcode 1
SMALL_CSRC := -m gpu -k "(csrc or cuda) and not (replay or large or random or graph or stream)" -p no:cacheprovider
ONLY_OURS := --kernel-name kns=clone_fast
sanitize: $(VENV)/.ready-demo,test  ## compute-sanitizer over the GPU tests of csrc; needs a GPU
	for tool in "memcheck $(ONLY_OURS)" "racecheck $(ONLY_OURS) --num-cuda-barriers 256" initcheck; do \
	    PYTHONPATH=tests $(SANITIZER) --tool $$tool $(BIN)/python -m pytest -p sanitized $(SMALL_CSRC) \
	    $(wildcard tests/test_csrc*.py tests/test_kernels*.py) || exit 1; done

lint: $(VENV)/.ready-dev  ## ruff
	$(BIN)/ruff check .

types: $(VENV)/.ready-dev  ## mypy
	$(BIN)/mypy clone_fast benchmarks setup.py $(wildcard kernels/*.py)

bench: $(VENV)/.ready-demo,test  ## the benchmarks; small shapes where there is no GPU
	$(BIN)/pytest benchmarks --benchmark-only

wheel: $(VENV)/.ready-dev  ## sdist, and the wheel built from it, in dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:  ## all that make made, .venv too
	rm -rf $(VENV) build dist out *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f clone_fast/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .ready-<extras> says that .venv holds this package, editable, with these extras. When setup.py, pyproject.toml,
# constraints.txt or a source of csrc/ is newer, pip runs again. A .venv where pip did not come to its end still holds
# .installing, and is made anew.
.PHONY: interrupted
$(VENV)/.ready-%: setup.py pyproject.toml constraints.txt $(wildcard csrc/*.c* csrc/*.h) \
    $(if $(wildcard $(VENV)/.installing),interrupted)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "clone_fast needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	         "name another one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "$(PYTHON) cannot make virtual environments; install its venv package (python3-venv)" >&2; exit 1; }
	@if test -e $(VENV)/.installing || ! test -e $(BIN)/python; then \
	    rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/.installing && $(PYTHON) -m venv $(VENV); fi
	@touch $(VENV)/.installing
	@echo "installing clone_fast[$*] into $(VENV); the first time this fetches PyTorch and takes minutes"
	$(BIN)/python -m pip install --editable '.[$*]' --constraint constraints.txt
	@touch $@ && rm $(VENV)/.installing
