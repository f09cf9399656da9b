# make demo     train two small models on this machine, decode with every decoder, print a comparison (MINUTES=8.5)
# make smollm   download a small chat model and ask it a question
# make test     run the test suite, without slow tests
# make lint     check style and formatting
# make format   fix style and formatting
# make clean    remove the virtual environment, runs and build outputs
# Every target but clean creates the virtual environment .venv if needed, and updates it when setup.py has changed.

PYTHON  ?= python3
VENV    ?= .venv
MINUTES ?= 8.5
BIN     := $(VENV)/bin

.PHONY: demo smollm test lint format clean

demo: $(VENV)/installed
	$(BIN)/python -m msn_jax.demo --minutes=$(MINUTES)

smollm: $(VENV)/installed
	$(BIN)/python -m msn_jax.smollm

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
