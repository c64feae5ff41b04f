# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints/ci.txt
STAMP := $(VENV)/.installed

.PHONY: demo demo-video test lint bench clean

demo: $(STAMP)  ## generate one picture dense and accelerated, and write a report
	$(BIN)/flashomni generate --model tiny-image --recipe balanced --compare --out out/demo
	@echo "open out/demo/report.html"

demo-video: $(STAMP)  ## the same for a short video
	$(BIN)/flashomni generate --model tiny-video --recipe balanced --compare --out out/demo-video

test: lint  ## format, lint, types, and every test that runs without a GPU
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_live_tiles.py tests/test_portable.py tests/test_gemm_q.py tests/test_gemm_o.py -k "not cpu and not reference"

lint: $(STAMP)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## speed of the ops here, against torch's dense ones
	$(BIN)/flashomni bench attention
	$(BIN)/flashomni bench gemm_q
	$(BIN)/flashomni bench gemm_o

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
