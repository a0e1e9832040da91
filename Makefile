# Two commands are all it takes:
#   make demo   the main job: make .venv, install, run polydigits, print the table
#   make test   everything tested, in the same environment
PYTHON ?= python3
PRESET ?= laptop
SEED ?= 0
OUT ?= runs
BIN := .venv/bin

.PHONY: demo test notebooks lab clean

demo: .venv/ready
	$(BIN)/mld run polydigits --preset $(PRESET) --seed $(SEED) --out $(OUT)

test: .venv/ready notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# every lesson cell of every library notebook; those of tables and studies are run, in small, by pytest
notebooks: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --skip-folder-re '^[_.]|^tables$$|^studies$$'

lab: .venv/ready
	$(BIN)/jupyter lab nbs

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv, about 2 GB: some minutes"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv
