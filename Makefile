# make train   sets up, and trains TASK on data that come with the packages (ARGS="--rounds=20 ..." for more flags)
# make test    sets up, and passes the tests
# make docs    builds the site of the documentation in site/ (site/index.html)
# make notebook         opens the notebooks in JupyterLab
# make test-notebooks   runs them as they are run in JupyterLab and on Colab, which takes minutes
# make test-wheel       makes a wheel, and installs it in both ways of docs/install.md, which takes minutes
# make test-benchmarks  runs what `make benchmark` runs, in its quick form, which takes a minute
# make benchmark        measures rounds of this project and of its peers, which takes an hour (ARGS=--data_dir=DIR)
# make lock    pins the newest versions that pyproject.toml allows
# make clean   removes all that the other targets brought, except for runs/

TASK ?= mnist_2nn
ARGS ?=

# All that is downloaded stays in this directory, where `make clean` finds it.
export UV_CACHE_DIR ?= $(CURDIR)/.uv/cache
export UV_PYTHON_INSTALL_DIR ?= $(CURDIR)/.uv/python
# Colab's constraints are those of its own Python.
unexport PIP_CONSTRAINT UV_CONSTRAINT UV_BUILD_CONSTRAINT
# Images for containers often set it: each program would compile all that it imports anew, which takes 6 of 10 seconds.
unexport PYTHONDONTWRITEBYTECODE
UV := $(or $(shell command -v uv),.uv/bin/uv)
PYTHON := .venv/bin/python
PEERS := pytorch fedjax flower
# The builds for a CPU, which are not on the package index: uv knows where they are, or pip's settings have them.
TORCH := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)

.PHONY: train test notebook test-notebooks test-wheel test-benchmarks docs benchmark lock clean

train: .venv/ready
	$(PYTHON) -m binaries.train --task=$(TASK) --data=embedded --cache_dir=.uv/clients $(ARGS)

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) -m pytest

notebook: .venv/jupyter
	TF_CPP_MIN_LOG_LEVEL=$(or $(TF_CPP_MIN_LOG_LEVEL),3) .venv/bin/jupyter lab $(ARGS) notebooks

# Not named test_*.py, so that `make test` goes without it.
test-notebooks: .venv/jupyter
	UV=$(UV) $(PYTHON) -m pytest --numprocesses=0 tests/notebooks.py $(ARGS)

test-wheel: .venv/ready | $(UV)
	UV=$(UV) $(PYTHON) -m pytest --numprocesses=0 tests/wheel.py

test-benchmarks: .venv/ready
	$(PYTHON) -m pytest tests/benchmarking.py

.venv/jupyter: notebooks/requirements.txt .venv/ready
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --requirement notebooks/requirements.txt
	touch $@

.venv/ready: requirements.lock pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python 3.11 .venv
	$(UV) pip install --python $(PYTHON) --no-deps --requirement requirements.lock
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .
	touch $@

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict

# Without the configuration in pyproject.toml, whose overrides are those of the packages that training needs.
.venv-docs/ready: docs/requirements.txt | $(UV)
	$(UV) venv --quiet --clear --python 3.11 .venv-docs
	$(UV) pip install --no-config --quiet --python .venv-docs/bin/python --no-deps --requirement docs/requirements.txt
	touch $@

benchmark: .venv/ready $(PEERS:%=.venv-peers/%/ready)
	$(PYTHON) -m benchmarks.round_time $(if $(findstring --quick,$(ARGS)),,--output=results/round_time.csv) $(ARGS)

.venv-peers/%/ready: benchmarks/peers/%.txt | $(UV)
	$(UV) venv --quiet --clear --python 3.11 .venv-peers/$*
	$(UV) pip install --no-config $(TORCH) --python .venv-peers/$*/bin/python --no-deps --requirement $<
	touch $@

.uv/bin/uv:
	python3 -m venv .uv || (echo "make: python3 has no venv: install it (python3-venv), or install uv" >&2; exit 1)
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv

lock: | $(UV)
	$(UV) pip compile --quiet --upgrade --python-version 3.11 --extra dev --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	$(UV) pip compile --no-config --quiet --upgrade --python-version 3.11 --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" --output-file docs/requirements.txt docs/requirements.in
	$(UV) pip compile --quiet --upgrade --python-version 3.11 --no-emit-index-url --no-annotate \
		--constraint requirements.lock --custom-compile-command "make lock" \
		--output-file notebooks/requirements.txt notebooks/requirements.in
	for peer in $(PEERS); do \
		$(UV) pip compile --no-config $(TORCH) --quiet --upgrade --python-version 3.11 --no-emit-index-url --no-annotate \
			--custom-compile-command "make lock" --output-file benchmarks/peers/$$peer.txt benchmarks/peers/$$peer.in \
			|| exit; \
	done

clean:
	rm -rf .venv .venv-docs .venv-peers .uv site dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
