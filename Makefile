# `make demo` and `make test` set everything up by themselves; they need python3 (3.11 or newer) only.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

# Tests start some hundred processes; without bytecode each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-optimized third-party heavy docs notebooks gallery wheel kills lint types format bench clean

demo: $(READY)
	$(RUN) examples/digits.py

# A process for every core. One that has nothing left takes the second half of what another has left, so tests of one
# file stay together but for a few cuts, and no long file is left over at the end.
PARALLEL := --numprocesses auto --dist worksteal

# Most of a test's time went into optimizing small programs. These flags compile them six times as fast, and round a few
# results differently: `make test-optimized` runs what is about bits, cost and learned numbers without them, and
# `QUICK=` everything, in twice the time. They are flags of the jaxlib in requirements-dev.txt: XLA ends the process at
# one that it does not know, as jaxlib 0.11.2 does not know the last of them.
QUICK := --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 \
	--xla_cpu_use_fusion_emitters=false
test test-all: export XLA_FLAGS := $(strip $(QUICK) $(XLA_FLAGS))
# The bits of computed schedules, of which unoptimized programs round some otherwise. OPTIMIZED has them.
BITS := $(if $(QUICK),--deselect tests/config/test_schedules.py::test_a_traced_horizon_gives_the_bits_of_a_concrete_one)

# Every kind of test: all but the further cases, which are marked `slow` or `long`.
test: $(READY)
	$(RUN) -m pytest $(PARALLEL) $(BITS) $(ARGS)

# With the cases marked `slow`; what .ci/run runs.
ALL := "not long and not third_party and not heavy and not tensorflow"
test-all: $(READY)
	$(RUN) -m pytest $(PARALLEL) $(BITS) -m $(ALL) $(ARGS)

# What is about the bits of a result, about what a program costs, and about numbers that are learned: with all of XLA.
OPTIMIZED := tests/compile tests/config/test_schedules.py tests/core tests/data/test_padding.py tests/features/test_sweep.py \
	tests/fit/test_resume.py tests/metrics tests/sharding tests/test_examples.py tests/test_loop.py tests/test_steps.py \
	tests/test_transforms.py
test-optimized: $(READY)
	$(RUN) -m pytest $(PARALLEL) $(OPTIMIZED) $(ARGS)

# Models and loggers of packages that nothing else needs. They go to a folder of their own, and not into the environment.
# Of what the packages of loggers ask for, what a run that is offline imports. TensorBoard 2.21 wants another protobuf.
MODELS := bijx==1.3.2 jax-autovmap==0.3.0 diffrax==0.7.2 equinox==0.13.8 lineax==0.1.1 optimistix==0.1.0 einops==0.8.2
LOGGERS := tensorboardX==2.6.5 tensorboard==2.20.0 wandb==0.31.0 mlflow-skinny==3.17.2 \
	alembic==1.20.1 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 cachetools==8.0.2 \
	certifi==2026.10.19.post1 cffi==2.1.1 charset-normalizer==3.5.3 click==8.5.1 cryptography==50.0.2 \
	databricks-sdk==0.162.0 fastapi==0.165.0 idna==3.20 importlib-metadata==8.7.0 mako==1.4.3 markupsafe==3.0.4 \
	opentelemetry-api==1.45.2 opentelemetry-exporter-otlp-proto-common==1.45.2 \
	opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 \
	opentelemetry-semantic-conventions==0.66b2 platformdirs==4.14.8 pydantic==2.14.4 pydantic-core==2.50.5 \
	requests==2.34.2 sqlalchemy==2.1.9 sqlparse==0.6.1 starlette==1.10.0 typing-inspection==0.4.5 urllib3==2.8.0
# For History.to_pandas.
TABLES := pandas==2.3.3 python-dateutil==2.9.0.post0 pytz==2025.2 six==1.17.0 tzdata==2025.2
# For export_prediction.
EXPORT := flatbuffers==25.12.19
# Metrics: clu.metrics and metrax, without what other modules of clu ask for.
METRICS := clu==0.0.12 google-metrax==0.2.4 wrapt==2.5.2
# For data of Hugging Face.
SOURCES := datasets==5.2.0 dill==0.4.1 filelock==4.3.1 fsspec==2026.9.0 h11==0.16.0 httpcore2==2.16.2 httpx==0.28.1 \
	httpx2==2.16.2 huggingface-hub==2.4.0 multiprocess==0.70.19 pyarrow==26.0.1 tqdm==4.70.1 truststore==0.10.5 \
	xxhash==4.1.0
# Torch, 880 MB where the index has a build for the CPU. TensorFlow, 1.8 GB, no target installs: `pytest -m tensorflow`.
HEAVY := torch==2.13.0 sympy==1.14.0 mpmath==1.4.1 networkx==3.6.1 jinja2==3.1.6 markupsafe==3.0.4 filelock==4.3.1 \
	fsspec==2026.9.0 setuptools==84.2.1
# The folder's name tells dill, which Hugging Face hashes with, that these are no modules of the caller's.
OTHERS := .third-party/site-packages
# What runs a notebook, and makes a page of it.
JUPYTER := asttokens==3.0.2 attrs==26.1.0 beautifulsoup4==4.15.0 bleach==6.4.0 comm==0.2.3 defusedxml==0.7.1 \
	executing==2.3.0 fastjsonschema==2.22.3 ipykernel==7.4.0 ipython-pygments-lexers==1.1.1 ipython==9.18.1 jedi==0.20.1 \
	jinja2==3.1.6 jsonschema-specifications==2025.9.1 jsonschema==4.26.0 jupyter-client==8.10.0 jupyter-core==5.9.1 \
	jupyterlab-pygments==0.3.0 markupsafe==3.0.4 matplotlib-inline==0.2.2 mistune==3.4.0 nbclient==0.11.0 \
	nbconvert==7.17.2 nbformat==5.11.1 nest-asyncio2==1.7.4 pandocfilters==1.5.1 parso==0.8.7 pexpect==4.9.0 \
	platformdirs==4.14.8 prompt-toolkit==3.0.53 ptyprocess==0.7.0 pure-eval==0.2.4 pyzmq==27.3.0 referencing==0.37.0 \
	rpds-py==2026.9.1 soupsieve==4.1.3 stack-data==0.6.3 tinycss2==1.5.1 tornado==6.6.1 traitlets==5.16.1 wcwidth==0.9.4 \
	webencodings==0.6.1
third-party: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OTHERS) \
		$(MODELS) $(LOGGERS) $(TABLES) $(EXPORT) $(METRICS) $(SOURCES) $(JUPYTER)
	PYTHONPATH=$(CURDIR)/$(OTHERS) $(RUN) -m pytest -m third_party tests/third_party $(ARGS)

heavy: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OTHERS) $(HEAVY)
	PYTHONPATH=$(CURDIR)/$(OTHERS) $(RUN) -m pytest -m heavy tests/third_party $(ARGS)

# The documentation site, in .site, without a warning. What builds it goes to a folder of its own, as above. To read it with
# its search: `python -m http.server --directory .site`.
docs: $(READY) .docs-packages/.ready
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 PYTHONPATH=.docs-packages $(RUN) -m mkdocs build --quiet $(ARGS)

.docs-packages/.ready: requirements-docs.txt | $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .docs-packages \
		-r requirements-docs.txt
	touch $@

# Executes the notebooks anew, and writes what they print and draw into them.
notebooks: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .jupyter $(JUPYTER)
	PYTHONPATH=$(CURDIR)/.jupyter $(RUN) -m nbconvert --to notebook --execute --inplace examples/notebooks/*.ipynb

# Runs the examples anew, and draws the pictures of docs/gallery.md from what they learned.
gallery: $(READY)
	$(RUN) examples/gallery.py

# The wheel in an empty environment of every Python that is there, without and with the extra `datarax`; see .ci/wheel.
wheel: $(READY)
	.ci/wheel --datarax

# A hundred kills, a process for every step to resume from, an array of 4 GiB; minutes, and 10 GiB of memory.
kills: $(READY)
	$(RUN) -m pytest -m long -rP $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# A quarter of an hour on two quiet cores. `make bench ARGS=--quick` shows only that everything runs; one alone is
# `make bench BENCHMARKS=tail`. The first run of peers needs a package index.
BENCHMARKS := dispatch sharding processes end_to_end peers layers input prefetch memory compile tail metrics checkpoint \
	features progress
bench: $(READY)
	for name in $(BENCHMARKS); do $(RUN) benchmarks/$$name.py --json .bench/$$name.json $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) .bench .third-party .docs-packages .site .jupyter runs .pytest_cache .mypy_cache .ruff_cache .coverage

# The list is complete, so pip need not resolve anything, and never hears that datarax on Python 3.11
# would like TensorFlow (1.8 GB) for data sources that are not used here. See README, "Installation".
$(READY): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
