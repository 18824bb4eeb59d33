# Two commands on a bare machine (git, python3, make): `make demo` shows the main job, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/.installed
	$(BIN)/python tools/demo.py

# Two workers, which share the files as tests/conftest.py says, in its order: slow ones first.
PYTEST_ARGS ?= -n 2 --dist loadscope --no-loadscope-reorder
test: .venv/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python tools/verify.py

.venv/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-dev: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch .venv/.installed $@

clean:
	rm -rf .venv dist demo bundles/*/output
