# shardedit: what one types. Each target makes its own virtual environment when there is none.
# Only Python 3.11 (or newer) and make are assumed; PYTHON=/path/to/python chooses another interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
IMAGES ?= 24
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench demo-score geometry-score concepts-score consistory-score audit-score faults methods-table methods-evaluation h-edit-score gates-score recipe-reference clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## draw a small dataset, edit it with the bundled model, write demo-output/report.html
	$(BIN)/shardedit demo --output demo-output --images $(IMAGES)

# A few workers: the suite waits on subprocesses and on Ray as much as it computes. One thread each, or they fight.
test: $(STAMP) ## run the tests (WORKERS=1 for one process)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(STAMP) ## run the tests that take long or repeat another: before a release, not before every change
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

lint: $(STAMP) ## ruff (rules and layout) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## measure ratios on this machine, write build/bench.json
	$(BIN)/python -m benchmarks.run

demo-score: $(STAMP) ## score the bundled model on 256 fresh scenes, write build/demo_score.json
	$(BIN)/python -m demo_world.score

geometry-score: $(STAMP) ## move drawn scenes along their latent bases, compare these, write build/geometry.json
	$(BIN)/python -m demo_world.geometry_score

concepts-score: $(STAMP) ## collect, train, name and write concepts on drawn scenes, write build/concepts.json
	$(BIN)/python -m demo_world.concepts_score

audit-score: $(STAMP) ## plant defects in 2,000 pairs of photographs, audit them, write build/audit.json
	$(BIN)/python -m benchmarks.audit

consistory-score: $(STAMP) ## make sets of drawn faces that share their looks, write build/consistory.json
	$(BIN)/python -m demo_world.consistory_score

faults: $(STAMP) ## disturb runs in a thousand ways, compare, write build/faults.json; goes on where it was ended
	$(BIN)/python -m benchmarks.faults

methods-table: $(STAMP) ## compare all methods on drawn scenes, write docs/methods/table.md and build/methods.json
	$(BIN)/python -m demo_world.methods_table

methods-evaluation: $(STAMP) ## evaluate all methods on drawn scenes, write docs/methods/evaluated.md; goes on where it was ended
	$(BIN)/python -m demo_world.methods_evaluation

gates-score: $(STAMP) ## what gates and several attempts do on drawn scenes, write build/gates.json
	$(BIN)/python -m demo_world.gates_score

h-edit-score: $(STAMP) ## what h-Edit does on drawn scenes, write docs/methods/h_edit.md and build/h_edit.json
	$(BIN)/python -m demo_world.h_edit_score

flow-score: $(STAMP) ## score the editors of flow matching on the drawn world's flow model, write build/flow_methods.json
	$(BIN)/python -m demo_world.flow_score

recipe-reference: $(STAMP) ## write the tables of docs/recipe.md and docs/methods/README.md from the code
	$(BIN)/python -m jobs.recipe_reference
	$(BIN)/python -m jobs.methods_overview

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) build dist demo-output *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is older than what it depends on when dependencies change: then, and only then, pip runs again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "shardedit needs Python 3.11 or newer, and $(PYTHON) is not. Try: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes the first time"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
