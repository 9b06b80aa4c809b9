# Everything runs in .venv, which `install` makes from requirements.lock (exact versions, hashes).
# ARGS reaches the command:  make study ARGS="experiment=..."   make test ARGS="-k controller"

PYTHON ?= python3 python3.13 python3.12 python3.11
UV_VERSION := 0.13.9
ARGS ?=

BIN := .venv/bin
UV_STAMP := .venv/.uv-$(UV_VERSION)
LOCKED := .venv/.locked
STAMP := .venv/.installed
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

# If it is set, every Ray worker compiles what it imports anew: 2-3 times slower to start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install study figures test test-cluster test-slurm kill hostile lint lint-format \
	lint-check lint-types format lock wheel wheel-check

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make the environment .venv; done again only when the lock or pyproject.toml changes

study: $(STAMP) ## run the default study, to its report: selection, 3 fresh seeds, the test set
	$(BIN)/python -m analysis.pipeline $(ARGS)

figures: $(STAMP) ## the paper's figures in out/figures, as PDF, PNG and CSV (ARGS="out=FOLDER")
	for figure in fig3 fig4 figS1 figS2; do $(BIN)/python -m analysis.figures.$$figure $(ARGS) || exit; done

# A file is one process's, as its tests share fixtures: a Ray, a trained network.
test: lint ## lint, then every test, in three processes
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slurm: $(STAMP) ## cluster/slurm.sbatch on a real SLURM (Debian: slurm-wlm, munge); not part of test
	$(BIN)/python -m tests.slurm $(ARGS)

test-cluster: $(STAMP) ## three hosts, MLflow on PostgreSQL, and what happens to them (root; ARGS="data=FOLDER"); not part of test
	$(BIN)/uv pip install -q --python $(BIN)/python "psycopg[binary]"
	$(BIN)/python -m tests.hosts $(ARGS)

kill: $(STAMP) ## kill real studies again and again, and compare what is left (ARGS="times=25")
	$(BIN)/python -m tests.kill $(ARGS)

hostile: $(STAMP) ## hostile inputs and environments, from a table (ARGS="only=REGEX jobs=1")
	$(BIN)/python -m benchmarks.hostile $(ARGS)

lint: lint-format lint-check lint-types ## check format and style (ruff) and types (pyright)

lint-format: $(STAMP)
	$(BIN)/ruff format --check .

lint-check: $(STAMP)
	$(BIN)/ruff check .

lint-types: $(STAMP)
	$(BIN)/pyright

format: $(STAMP) ## rewrite the code as ruff wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(UV_STAMP) ## resolve pyproject.toml into requirements.lock (newest versions: ARGS=--upgrade)
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --extra dev --generate-hashes \
		--no-header $(ARGS) pyproject.toml -o requirements.lock

wheel: $(STAMP) ## build the package, dist/*.whl
	rm -rf build dist # a build keeps files that are gone from the source
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --no-index -w dist .
	rm -rf build

# Of the lock, only the versions: what is installed is what the wheel itself asks for.
wheel-check: wheel ## install the wheel into an empty environment, run a small study from an empty folder
	@set -e; place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; unset PYTHONPATH; \
	$(BIN)/uv venv -q --python $(BIN)/python "$$place/venv"; \
	$(BIN)/uv pip install -q --compile-bytecode --python "$$place/venv/bin/python" \
		--constraint requirements.lock dist/*.whl; \
	mkdir "$$place/empty"; cd "$$place/empty"; \
	../venv/bin/disinhib --help; ../venv/bin/disinhib study experiment=smoke

# A venv that works is kept; one that is broken, or of another Python, is made again.
$(UV_STAMP):
	@if ! $(BIN)/python -c 'import pip; $(SUPPORTED)' 2>/dev/null; then \
		for python in $(PYTHON); do \
			$$python -c '$(SUPPORTED)' 2>/dev/null && break; \
			python=; \
		done; \
		if [ -z "$$python" ]; then \
			echo "install: needs Python 3.11, 3.12 or 3.13 with venv (Debian: python3-venv); tried: $(PYTHON). Name one: make install PYTHON=/path/to/python3" >&2; \
			exit 2; \
		fi; \
		echo "$$python -m venv .venv"; \
		$$python -m venv --clear .venv; \
	fi
	$(BIN)/python -m pip install -q uv==$(UV_VERSION)
	@touch $@

$(LOCKED): requirements.lock $(UV_STAMP)
	$(BIN)/uv pip sync -q --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@touch $@

# After every sync, which removes what the lock does not name: the project too.
$(STAMP): pyproject.toml $(LOCKED)
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation --offline -e .
	@touch $@
