# make run [CPU=1]  install everything into .venv and rebuild what changed (dvc repro)
# make test         check with ruff and mypy, and run all tests
# make test-fast    the unit tests only: without tests/pipeline, which runs DVC, servers and browsers
# make app [PORT=7860]      a page on 127.0.0.1 for trying out the model
# make ui [PORT=5000]       MLflow on 127.0.0.1
# make variant NAME=seed-30m [QUEUE=1]      train a variant as a DVC experiment
# make promote [RUN=id]     make the model the champion if its validation loss is lower
# make serve        serve the champion on 127.0.0.1:5001
# make notebook     open the tour of the library in JupyterLab on 127.0.0.1
# make sweep        install the packages that `python -m folio sweep` needs for its reports
# make team         install the packages that a team's DVC remote needs (docs/team.md)
# make clean        delete .venv
# make lock [UPGRADE=1]     for maintainers: write the versions and hashes in requirements/

PYTHON ?= python3
VARIANTS := $(basename $(notdir $(wildcard variants/*.yaml)))
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# PyTorch's builds for CPUs and for NVIDIA GPUs have the same version; the latter is 2.8 GB larger
# and is installed only where there is an NVIDIA driver. CPU=1 or CPU= overrides this, and replaces
# the other build: .venv/torch contains the name of the installed one.
CPU ?= $(if $(wildcard /proc/driver/nvidia /dev/nvidiactl /dev/dxg),,1)
BUILD := $(if $(CPU),cpu,cuda)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: run test test-fast app ui variant promote serve notebook sweep team clean lock
.DEFAULT_GOAL := run

run: .venv/base | git
	dvc repro
	@echo 'models/gpt2 is the model, and models/evaluation/samples.md has samples of its text. Next: make ui'

TESTS_NEED := $(addprefix .venv/,app sweep team server test)
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
	@python -m folio ui $(if $(PORT),--port $(PORT))

variant: .venv/base | git
	@test -n '$(NAME)' || { echo 'NAME is missing: make variant NAME=..., one of $(VARIANTS)'; exit 1; }
	python -m folio variant '$(NAME)' $(if $(QUEUE),--queue)

promote: .venv/base
	python -m folio promote $(if $(RUN),'$(RUN)')

serve: .venv/base
	python -m folio serve

notebook: .venv/notebook
	jupyter lab --ip=127.0.0.1 --log-level=ERROR --ServerApp.root_dir=. $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/tour.ipynb

sweep: .venv/sweep
	@echo 'Next: python -m folio sweep --help'

team: .venv/team

clean:
	rm -rf .venv

lock: .venv/lock
	python requirements/lock.py $(if $(UPGRADE),--upgrade)

# Runs again when a requirements file changes. The files list every package with its hashes, so pip
# need not look for dependencies. Python runs startup.pth whenever it starts in .venv, and DVC keeps
# its site cache in .venv/dvc.
PIP := pip install --disable-pip-version-check
LOCKED := $(PIP) --no-deps --require-hashes
.venv/base: requirements/base.txt requirements/data.txt requirements/startup.pth .venv/torch
	@$(LOCKED) -r requirements/base.txt -r requirements/data.txt
	@cp requirements/startup.pth "$$(python -c 'import site; print(site.getsitepackages()[0])')"
	@mkdir -p -m 700 .venv/dvc
	@touch $@

.venv/torch: requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Folio needs Python 3.11 or newer: name one with make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo 'Installing into .venv (a few minutes), with PyTorch for' \
	  '$(if $(CPU),CPUs (CPU= for NVIDIA GPUs),NVIDIA GPUs (CPU=1 for CPUs)).'
	@echo 'pip is silent for a minute or two when it unpacks what it has downloaded.'
	@$(PYTHON) -m venv .venv
	@pip uninstall -qqy torch
	@$(if $(CPU),$(PIP) --no-deps --retries 1 --index-url $(TORCH_CPU_INDEX) -r $< || )$(PIP) -r $<
	@echo $(BUILD) > $@

.PHONY: another-build
ifeq ($(origin CPU),command line)
.venv/torch: $(if $(filter $(BUILD),$(shell cat .venv/torch 2>/dev/null)),,another-build)
endif

# Additional packages for the page, the notebook, sweeps, a team, the tests or maintainers.
.venv/%: requirements/%.txt .venv/base
	@$(LOCKED) -r $<
	@touch $@

.PHONY: git
git:
	@error=$$(LC_ALL=C git rev-parse --git-dir 2>&1 >/dev/null) || { case $$error in \
	  *'not a git repository (or any'*) \
	    echo 'DVC needs a git repository: git init && git add -A && git commit -m start' ;; \
	  *) echo "$$error" ;; esac; exit 1; }
