# Two commands on a bare machine (git, python3, make): `make demo` shows the main job, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check serve label-test clean

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

# MONAI Label serves every bundle from its zip: an environment of its own, see tools/monailabel_app/README.md.
STUDIES ?= studies
PORT ?= 8000
LABEL := $(CURDIR)/.venv-label/bin

serve: .venv/.installed .venv-label/.installed
	rm -rf dist/*.zip dist/monailabel_app/model
	$(BIN)/python tools/package.py
	$(BIN)/python -m zipfile -e dist/monailabel_app.zip dist
	for zip in dist/*_v*.zip; do $(BIN)/python -m zipfile -e $$zip dist/monailabel_app/model; done
	mkdir -p $(STUDIES)
	PATH="$(LABEL):$$PATH" monailabel start_server --app dist/monailabel_app --studies $(STUDIES) --host 127.0.0.1 --port $(PORT)

label-test: .venv/.installed-dev .venv-label/.installed
	$(BIN)/python -m pytest -m slow tests/test_monailabel.py

.venv-label/.installed: requirements.txt tools/monailabel_app/requirements.txt
	test -x $(LABEL)/python || $(PYTHON) -m venv .venv-label
	$(LABEL)/python -m pip install --quiet -r requirements.txt -r tools/monailabel_app/requirements.txt
	$(LABEL)/python -m pip install --quiet --no-deps monailabel==0.8.5 pydicom-seg==0.4.1
	touch $@

clean:
	rm -rf .venv .venv-label dist demo bundles/*/output
