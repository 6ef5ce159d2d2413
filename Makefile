# Two commands on a fresh machine: `make guide` and `make test`.
PYTHON ?= python3.11
GUIDE_ENV := .venv-guide
TEST_ENV := .venv
QUIET := TF_CPP_MIN_LOG_LEVEL=3
ARGS ?=

.PHONY: guide test test-all format check

guide: $(GUIDE_ENV)/ready
	$(QUIET) KERAS_BACKEND=jax $(GUIDE_ENV)/bin/python guides/distill_paligemma.py $(ARGS)

test: $(TEST_ENV)/ready
	$(QUIET) KERAS_BACKEND=jax $(TEST_ENV)/bin/python -m pytest -n 2 \
		--cov=keras_laid --cov-report=term-missing:skip-covered --cov-fail-under=90
	$(QUIET) KERAS_BACKEND=tensorflow $(TEST_ENV)/bin/python -m pytest -n 2
	$(QUIET) KERAS_BACKEND=torch $(TEST_ENV)/bin/python -m pytest -n 2

test-all: $(TEST_ENV)/ready
	for backend in jax tensorflow torch; do \
		$(QUIET) HYPOTHESIS_PROFILE=thorough \
		KERAS_BACKEND=$$backend $(TEST_ENV)/bin/python -m pytest -n 2 \
			-m "extra_large or not extra_large" || exit 1; \
	done

format: $(TEST_ENV)/ready
	$(TEST_ENV)/bin/ruff check --fix .
	$(TEST_ENV)/bin/ruff format .

check: $(TEST_ENV)/ready
	$(TEST_ENV)/bin/ruff check .
	$(TEST_ENV)/bin/ruff format --check .

$(GUIDE_ENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(GUIDE_ENV)
	$(GUIDE_ENV)/bin/pip install --quiet -c constraints.txt -e ".[jax]"
	touch $@

$(TEST_ENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST_ENV)
	$(TEST_ENV)/bin/pip install --quiet -c constraints.txt -e ".[jax,tensorflow,torch,haystacks,test]"
	touch $@
