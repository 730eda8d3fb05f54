# Two commands do all set-up: `make demo` and `make test`. The environment is .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv demo test check lint bench docs wheel clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: venv  ## the main job: a book with planted facts, dense against sparse
	$(BIN)/saccade demo

test: venv  ## all tests, with the examples in the docstrings, two at a time with a thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: lint  ## what every push must pass, in about two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -x -m 'not slow'

lint: venv  ## format, lint, types
	$(BIN)/ruff format --check saccade tests bench conftest.py
	$(BIN)/ruff check saccade tests bench conftest.py
	$(BIN)/mypy

bench: venv  ## the figures of the README that a CPU can give; about half an hour
	$(BIN)/saccade eval --model reader --methods dense,minference,trishape,minference+duo,duo,streaming --no-controls --tasks needle --lengths 32768 --samples 8 --out saccade-out/reader-cpu-32k
	$(BIN)/saccade bench attend --device cpu --length 32768 --density 0.1 --dtype both
	$(BIN)/python bench/recall.py

docs: venv  ## one page per method from its docstring, and their pictures
	$(BIN)/python docs/build.py

wheel: venv  ## build the wheel and refuse one of 20 MB or more
	$(BIN)/python -m build --wheel
	$(BIN)/python -c "import pathlib; s=max(p.stat().st_size for p in pathlib.Path('dist').glob('*.whl')); print(s, 'bytes'); assert s < 20_000_000"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis saccade-out
