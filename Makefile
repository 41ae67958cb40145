# Every target sets up .venv by itself, once. Needs Python 3.11 to 3.13, make and git; no root, no GPU, no compiler.
# PYTHON=/path/to/python chooses the interpreter that .venv is made from.

PY := .venv/bin/python
STAMP := .venv/.installed
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11)
PIP := $(PY) -m pip --disable-pip-version-check install -qq -c constraints.txt

TYPED := unimodal tokenizers/unimodal_tokenizers generators/unimodal_generators experiments

.DEFAULT_GOAL := help
.PHONY: help venv checked demo demo-vq shapes designs designs-full tokenizers evaluate-demo faults bench bench-gpu test test-slow lint format wheel clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

# --- installation

# The editable install holds this folder's path: a checkout that was moved or copied installs again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

# A .venv that works is kept. Otherwise the first Python that runs, is recent enough and can make environments makes it:
# a candidate may exist and still fail (shims of version managers), so each is asked for its version.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $(STAMP); \
	version='import sys; print("%d.%d.%d" % sys.version_info[:3])'; \
	supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	if $(PY) -c "$$supported" 2>/dev/null && $(PY) -m pip --version >/dev/null 2>&1; then \
		echo "Python $$($(PY) -c "$$version") in .venv"; \
	else \
		chosen=; seen=; bare=; \
		for candidate in $(CANDIDATES); do \
			found=$$("$$candidate" -c "$$version" 2>/dev/null) || { seen="$$seen $$candidate does not run;"; continue; }; \
			seen="$$seen $$candidate is $$found;"; \
			"$$candidate" -c "$$supported" || continue; \
			if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then chosen=$$candidate; break; fi; \
			bare="$$candidate ($$found)"; \
		done; \
		if [ -z "$$chosen" ] && [ -n "$$bare" ]; then \
			echo "make: $$bare cannot create environments: its venv or ensurepip module is missing (on Debian and Ubuntu: apt install python3-venv), or name another with PYTHON=..." >&2; exit 2; \
		elif [ -z "$$chosen" ]; then \
			echo "make: needs Python 3.11, 3.12 or 3.13; found:$$seen. Install one or name it with PYTHON=..." | sed 's/;\././' >&2; exit 2; \
		fi; \
		echo "Python $$found ($$chosen) makes .venv"; \
		"$$chosen" -m venv --clear .venv >/dev/null || { echo "make: $$chosen -m venv failed: see the lines above" >&2; exit 2; }; \
	fi
	@echo "Installing the pinned versions into .venv: a few minutes, about 6 GB of disk"
	@$(PIP) pip
	@$(PIP) --build-constraint constraints.txt --editable . --group dev
	@$(PY) -m unimodal.environment
	@echo "$(CURDIR)" > $(STAMP)

venv: $(STAMP) ## create .venv and install (the other targets do it themselves)

# Packages may have been changed by hand since: looked at before anything long starts.
checked: $(STAMP)
	@$(PY) -m unimodal.environment

# --- what a user does

demo: checked ## train, generate and score on real images; leaves out/demo/index.html
	@$(PY) -m experiments.digits --recipe lightning_configs/models/digits_mot_flow.yaml --out out/demo

demo-vq: checked ## the same with discrete tokens: leaves out/demo-vq/index.html
	@$(PY) -m experiments.digits --recipe lightning_configs/models/digits_vq_ar.yaml \
		--tokenizer lightning_configs/tokenizers/digits_vq.yaml --out out/demo-vq

shapes: checked ## train the shapes recipe and its tokenizer, and score it in full; leaves out/shapes/index.html
	@$(PY) -m experiments.evaluation --only shapes --full --out out/shapes

designs: checked ## train ten published designs on the same digits, one seed; leaves out/designs/digits/report.md
	@$(PY) -m experiments.designs --quick --jobs 2 --out out/designs

designs-full: checked ## the same with three seeds, and on the coloured shapes: many hours; goes on where `make designs` ended
	@$(PY) -m experiments.designs --jobs 2 --out out/designs

tokenizers: checked ## train every tokenizer on photographs, three held out in turn: about 6 hours of one core; leaves out/tokenizers/report.md
	@$(PY) -m experiments.tokenizers --out out/tokenizers

evaluate-demo: checked ## ask the digits and shapes recipes all that needs nothing of others; leaves out/evaluate-demo/index.html
	@$(PY) -m experiments.evaluation --out out/evaluate-demo

faults: checked ## provoke what goes wrong in long runs, two minutes; writes docs/faults.md
	@$(PY) -m experiments.faults --out out/faults

bench: checked ## measure speed and memory against other libraries; leaves out/bench.json
	@$(PY) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transfusion_pytorch") is None)' || \
		$(PIP) --build-constraint constraints.txt --editable '.[bench]'
	@$(PY) -m experiments.benchmarks --out out/bench.json

bench-gpu: checked ## the same on one CUDA device; leaves experiments/benchmarks/results/gpu_<card>.json
	@$(PY) -m experiments.benchmarks.gpu

# --- what a developer does

# A process a core, eight at most; a file's tests stay together, because they share what they train; slow files come first.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: checked ## run every quick test
	@$(PY) -m pytest $(PARALLEL) -m "not slow"

test-slow: checked ## run the others: trainings, processes that are killed and continued, compilers
	@$(PY) -m pytest $(PARALLEL) -m slow

lint: $(STAMP) ## style, formatting, types; then that each of these tools is able to fail
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(TYPED)
	@bash .ci/lint-can-fail $(PY) $(TYPED)

format: $(STAMP) ## rewrite the code in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

wheel: $(STAMP) ## build the wheel into dist/
	$(PY) -m build --wheel --no-isolation --outdir dist .

clean: ## remove caches and builds; .venv and out/ stay
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find unimodal tokenizers generators experiments tests -name __pycache__ -prune -exec rm -rf {} +
