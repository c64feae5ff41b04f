# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints/ci.txt
STAMP := $(VENV)/.installed

# Tests run in as many processes as there are cores, each with one thread; eight are enough. Python
# keeps what it compiled, also where a container says otherwise: every process would compile it anew.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Tests of portable kernels: to import the others takes longer than many a kernel.
INTERPRETED = $(shell grep -lE 'with_gpu_marks|mark\.triton' tests/unit/test_*.py)

# What `make contracts` tries: newest, a version, or anything else that pip installs.
DIFFUSERS ?= newest

# The newest Triton that the GPU kernels are known to build with.
NEWEST_TRITON := 3.9.0

.PHONY: demo demo-video quick test unit studio-test serve serve-test plugins-test lint compile interpret \
	docs docs-version bench contracts dist clean

# Ray is heavy, and its dependencies are many: the server has an environment of its own.
SERVE_VENV ?= build/serve-venv
SERVE_BIN := $(SERVE_VENV)/bin
SERVE_STAMP := $(SERVE_VENV)/.installed

# SGLang and vLLM-Omni pin their torch and much more: one of their own for each, 23 GB in all.
PLUGINS_VENVS ?= build/plugins

demo: $(STAMP)  ## generate one picture dense and accelerated, and write a report
	$(BIN)/flashomni generate --model tiny-image --recipe balanced --compare --out out/demo
	@echo "open out/demo/report.html"

demo-video: $(STAMP)  ## the same for a short video
	$(BIN)/flashomni generate --model tiny-video --recipe balanced --compare --out out/demo-video

quick: $(STAMP)  ## under a minute: of every test that is not slow one case
	$(PYTEST) --quick tests/unit

test: lint unit interpret compile  ## format, lint, types, and every test that runs without a GPU

unit: $(STAMP)  ## every test that runs here, those of the built wheels among them
	$(PYTEST)

interpret: $(STAMP)  ## the portable kernels in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) -m triton $(INTERPRETED)

compile: $(STAMP)  ## the GPU kernels for sm_80 to sm_90 with the newest Triton, without a GPU
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/newest triton==$(NEWEST_TRITON)
	PYTHONPATH=$(VENV)/newest $(PYTEST) tests/unit/test_compile_portable.py \
		tests/unit/test_compile_sm90.py tests/unit/test_compile_sm90_gemm.py

contracts: $(STAMP)  ## which adapters hold on the newest diffusers, or on DIFFUSERS=0.41.0
	$(BIN)/python tools/contracts.py --diffusers "$(DIFFUSERS)" --workers $(WORKERS)

studio-test: $(STAMP)  ## the studio and the pages of reports in a headless Chromium, if there is one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/studio/browser.py tests/studio/reports.py

lint: $(STAMP)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation as a site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

docs-version: docs  ## the site, as its version (or SITE_VERSION=dev), on the branch gh-pages; PUSH=--push publishes it
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) mike
	version=$$($(BIN)/python -c 'import flashomni; print(flashomni.__version__.rpartition(".")[0])'); \
	export NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH"; \
	mike deploy $(PUSH) --update-aliases $(if $(SITE_VERSION),$(SITE_VERSION),$$version latest) && \
	$(if $(SITE_VERSION),true,mike set-default $(PUSH) latest)

bench: $(STAMP)  ## speed of the ops here, against torch's dense ones
	$(BIN)/flashomni bench op attention
	$(BIN)/flashomni bench op gemm_q
	$(BIN)/flashomni bench op gemm_o

serve: $(SERVE_STAMP)  ## a server of the small model on port 8000, until it is interrupted
	PATH="$(abspath $(SERVE_BIN)):$$PATH" $(SERVE_BIN)/serve run flashomni.serve:app $(ARGS)

serve-test: $(SERVE_STAMP)  ## a real server: replicas, load, a replica that is killed
	$(SERVE_BIN)/python -m pytest --confcutdir tests/serve tests/serve

plugins-test: plugins-test-sglang plugins-test-vllm_omni  ## the plug-ins in the servers themselves, without a GPU

plugins-test-%: $(PLUGINS_VENVS)/%/.installed
	$(PLUGINS_VENVS)/$*/bin/python -m pytest --confcutdir tests/plugins tests/plugins/test_$*.py

.PRECIOUS: $(PLUGINS_VENVS)/%/.installed
$(PLUGINS_VENVS)/%/.installed: tests/plugins/%.txt pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $< || \
		{ echo "the plug-in was not tested: pip cannot install $<, it says why above"; exit 1; }
	$(@D)/bin/python -m pip install --quiet -e packages/flashomni-assets -e .
	touch $@

$(SERVE_STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(SERVE_BIN)/python || $(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_BIN)/python -m pip install --quiet --upgrade pip
	$(SERVE_BIN)/python -m pip install --quiet -c $(CONSTRAINTS) \
		-e packages/flashomni-assets -e '.[serve]' pytest pytest-timeout
	touch $@

$(STAMP): pyproject.toml packages/flashomni-assets/pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) \
		-e packages/flashomni-assets -e '.[dev]'
	touch $@

dist: $(STAMP)  ## wheel and sdist of both distributions, checked, in dist/; TAG=v1.2.3 has to fit
	rm -rf dist
	$(BIN)/python -m hatchling build --directory $(abspath dist)
	cd packages/flashomni-assets && $(abspath $(BIN))/python -m hatchling build -d $(abspath dist)
	$(BIN)/python tools/check_dist.py dist $(if $(TAG),--tag $(TAG))

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
