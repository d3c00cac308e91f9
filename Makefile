# Everything runs from .venv, which `make install` creates; every other target installs first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
NPU := .torch-npu/.installed
TRITON := .triton/.installed
ARGS ?=

.PHONY: help install train test test-gpu check bench docs sbom clean

help:
	@echo "make install   create .venv with pinned versions of all that training and tests need"
	@echo "make train     train the quick-start model with two processes (ARGS='key=value ...')"
	@echo "make test      unit, distributed and end-to-end tests (ARGS='-k name ...')"
	@echo "make test-gpu  operators and two steps on an NVIDIA GPU against references on its host"
	@echo "make check     lint, format and types; Dockerfiles"
	@echo "make bench     benchmarks (what each is and takes: benchmarks/README.md)"
	@echo "make docs      the documentation as a site, with the reference: dist/site"
	@echo "make sbom      what this project depends on: dist/sbom.json, docs/dependencies.md"
	@echo "make clean     remove caches; .venv, data and runs stay"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, which takes some minutes"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq --disable-pip-version-check \
		-c constraints.txt -e ".[train,serve,deepspeed,test]"
	@touch $@

train: $(INSTALLED)
	$(BIN)/python -m pangu.train experiment=quickstart $(ARGS)

# torch-npu's operators, for the test of our calls against their schemas: in a folder of its own,
# since beside it torch does not import on a machine without CANN. Elsewhere than on Linux there is
# no wheel, and the test says that it is skipped.
$(NPU): pyproject.toml
	-$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade \
		--target .torch-npu torch-npu==2.13.0 && touch $@

# Triton, for the tests that run our kernels in its interpreter: in a folder of its own, since where
# it is found the engine imports it, which costs every process of the CPU build 84 MB. It has a
# wheel for Linux alone.
$(TRITON): pyproject.toml
	test "$$(uname)" != Linux || $(BIN)/python -m pip install -qq --disable-pip-version-check \
		--no-deps --no-compile --upgrade --target .triton triton==3.7.1
	@mkdir -p .triton && touch $@

test: $(INSTALLED) $(NPU) $(TRITON)
	$(BIN)/python -m pytest -n 2 $(ARGS)

# Without a GPU: 2, and a sentence. How fast it is: benchmarks/gpu.py.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pangu.doctor backend=cuda --device-check

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile

# All that end within minutes; see benchmarks/README.md.
BENCHMARKS = activation_memory data decoding expert_parallel_link forecast moe_layer peers placement \
	planner simulator_speed training_speed
bench: $(INSTALLED)
	@set -e; for name in $(BENCHMARKS); do \
		echo "== benchmarks/$$name.py"; $(BIN)/python "benchmarks/$$name.py"; \
	done

docs: $(INSTALLED)
	test -x .docs/bin/mkdocs || { $(PYTHON) -m venv .docs && \
		.docs/bin/pip install -qq --disable-pip-version-check mkdocs-material==9.8.1 mkdocstrings-python==2.0.11; }
	NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build --strict --quiet

# Of everything that `make install` installs, by tools that stay out of its environment.
sbom: $(INSTALLED)
	test -x .sbom/bin/python || $(PYTHON) -m venv .sbom
	.sbom/bin/python -m pip install -qq --disable-pip-version-check \
		cyclonedx-bom==7.2.1 pip-licenses==5.5.5
	mkdir -p dist
	.sbom/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml -o dist/sbom.json
	.sbom/bin/pip-licenses --python $(BIN)/python --format=json --with-urls \
		| $(BIN)/python docs/dependencies.py > docs/dependencies.md

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
