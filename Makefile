# Every target first creates the environment in .venv, once. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# A new lock or an interrupted install makes a new environment, so .venv always equals the lock.
LOCKED := $(VENV)/.locked
STAMP := $(VENV)/.installed

# make demo METHODS=all RATIOS="0.5 0.25" IMAGES=96 OUT=outputs/all; all are optional.
DEMO_OPTIONS := $(if $(METHODS),--methods $(METHODS)) $(if $(RATIOS),--ratios $(RATIOS)) \
  $(if $(IMAGES),--num-images $(IMAGES)) $(if $(OUT),--out "$(OUT)")

.DEFAULT_GOAL := help
.PHONY: help setup lock demo test test-slow test-oldest test-processors test-torchao check lint types format reproduce-mini bench figures train-mini docs readme clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP) ## install the tested versions into .venv
	@echo "Ready. To use it in this shell: source $(VENV)/bin/activate"

# Versions are not resolved here, except what torch pins.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

$(LOCKED): requirements.txt requirements-torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "llava_todre needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@echo "Installing requirements.txt into $(VENV), once; a few minutes and 2 GB (more if torch comes" \
	  "with CUDA)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --no-deps --require-hashes -r requirements.txt
	@$(PIP) --no-warn-conflicts -r requirements-torch.txt
	@touch $@

$(STAMP): $(LOCKED) pyproject.toml setup.py
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

UV := 0.13.9
UV_AT := $(VENV)/uv-$(UV)
EXTRAS := eval video demo peft quantised dev

# Independent of this machine's settings of pip and uv, and of other indexes.
lock: ## resolve requirements.txt again, from PyPI alone (OPTIONS=--upgrade: newest versions)
	@[ -d $(UV_AT) ] || { $(PYTHON) -m venv --clear $(UV_AT).part && $(UV_AT).part/bin/python -m pip \
	  install --quiet --disable-pip-version-check uv==$(UV) && mv $(UV_AT).part $(UV_AT); }
	@env $(patsubst %,-u %,$(filter UV_%,$(.VARIABLES))) $(UV_AT)/bin/uv --config-file uv.toml \
	  pip compile --quiet --universal --python-version 3.10 --generate-hashes \
	  --default-index https://pypi.org/simple $(addprefix --extra ,$(EXTRAS)) --group tested \
	  --constraints requirements-torch.txt --no-emit-package torch --custom-compile-command "make lock" \
	  --output-file requirements.txt pyproject.toml $(OPTIONS)

# Threads that spin while they wait make the demo ten times slower on a busy machine.
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: $(STAMP) ## compare methods on the bundled model (METHODS=all RATIOS IMAGES=96 OUT)
	@$(PY) -m llava_todre.cli demo $(DEMO_OPTIONS)
	@$(PY) -m eval report "$(or $(OUT),outputs/demo)"

# Workers get the tests in order and steal the rest from each other, so few files are split and few
# fixtures made twice.
PYTEST := $(PY) -m pytest -q
SHARED := -n auto --dist worksteal

test: $(STAMP) ## run the tests (offline, CPU)
	@$(PYTEST) $(SHARED)

test-slow: $(STAMP) ## the tests that take minutes: more of the same, kept out of CI
	@$(PYTEST) $(SHARED) -m slow

# The oldest supported transformers and hub package, with the other packages of the environment.
OLDEST := 5.17.0
OLDEST_HUB := 1.31.0
OLDEST_AT := $(VENV)/transformers-$(OLDEST)
# Left out: tests without hooks into transformers, and what hf/test_matrix.py compares as well.
NOT_AGAIN := $(addprefix --ignore=tests/hf/test_,$(addsuffix .py,calls_at_once finite original \
  stock_flops)) $(addprefix --ignore=tests/model/test_,$(addsuffix .py,against_original config_check \
  images memory prompt rgb shard_names sources)) \
  --deselect=tests/hf/test_equality.py::test_both_stages

test-oldest: $(STAMP) ## test models and decoders with the oldest supported transformers
	@[ -d $(OLDEST_AT) ] || { $(PIP) --no-deps --target $(OLDEST_AT).part transformers==$(OLDEST) \
	  huggingface_hub==$(OLDEST_HUB) && mv $(OLDEST_AT).part $(OLDEST_AT); }
	@PYTHONPATH=$(OLDEST_AT) $(PYTEST) $(SHARED) tests/hf tests/model tests/test_in_decoder.py \
	  tests/test_withdrawal.py $(NOT_AGAIN)

# Not in the environment: PyPI's torchvision cannot be imported with a CPU build of torch.
TORCHVISION := 0.28.0
TORCHVISION_AT := $(VENV)/torchvision-$(TORCHVISION)

test-processors: $(STAMP) ## test stock models with processors that need torchvision
	@[ -d $(TORCHVISION_AT) ] || { $(PIP) --no-deps --target $(TORCHVISION_AT).part \
	  torchvision==$(TORCHVISION) && mv $(TORCHVISION_AT).part $(TORCHVISION_AT); }
	@PYTHONPATH=$(TORCHVISION_AT):tests/hf $(PYTEST) -p torchvision_operators \
	  tests/hf/test_processors.py

# Not in the environment: without a GPU it prints warnings when it is imported.
TORCHAO := 0.18.0
TORCHAO_AT := $(VENV)/torchao-$(TORCHAO)

test-torchao: $(STAMP) ## test models quantised by torchao
	@[ -d $(TORCHAO_AT) ] || { $(PIP) --no-deps --target $(TORCHAO_AT).part torchao==$(TORCHAO) \
	  && mv $(TORCHAO_AT).part $(TORCHAO_AT); }
	@PYTHONPATH=$(TORCHAO_AT) $(PYTEST) -k torchao tests/model/test_quantised.py \
	  tests/hf/test_quantised_stock.py tests/test_lock.py

check: lint types test ## lint, format, types and tests, which a pull request must pass

lint: $(STAMP) ## ruff: lint and format check
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(STAMP) ## mypy, strict on the pure files
	@$(PY) -m mypy

format: $(STAMP) ## format with ruff
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

reproduce-mini: $(STAMP) ## Tables 1, 4, 5, 6 on the bundled model, with lmms-eval (15 minutes)
	@PYTHON=$(PY) bash scripts/reproduce_mini.sh

bench: $(STAMP) ## time every stage of an answer, and compare with what FLOPs allow (minutes)
	@$(PY) -m eval bench

figures: $(STAMP) ## draw all figures into docs/figures (minutes)
	@PYTHON=$(PY) bash scripts/figures.sh

train-mini: $(STAMP) ## train the bundled model (about an hour on 2 cores)
	@PYTHON=$(PY) bash scripts/train_mini.sh

docs: $(STAMP) ## write the generated pages of docs/, and configs/methods
	@$(PY) -m eval docs
	@$(PY) -m eval.pages.licences

readme: $(STAMP) ## write the README's table and list of methods
	@$(PY) -m eval readme

clean: ## remove .venv and caches, but not results and checkpoints
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
