# `make demo` and `make test` set everything up by themselves; they need python3 (3.11 or newer) only.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-all third-party kills lint types format bench clean

demo: $(READY)
	$(RUN) examples/digits.py

# A process for every core. One that has nothing left takes the second half of what another has left, so tests of one
# file stay together but for a few cuts, and no long file is left over at the end.
PARALLEL := --numprocesses auto --dist worksteal

# Every kind of test: all but the further cases, which are marked `slow` or `long`.
test: $(READY)
	$(RUN) -m pytest $(PARALLEL) $(ARGS)

# With the cases marked `slow`; what .ci/run runs.
test-all: $(READY)
	$(RUN) -m pytest $(PARALLEL) -m "not long and not third_party" $(ARGS)

# Models of packages that nothing else needs. They go to a folder of their own, and not into the environment.
third-party: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .third-party \
		bijx==1.3.2 jax-autovmap==0.3.0 diffrax==0.7.2 equinox==0.13.8 lineax==0.1.1 optimistix==0.1.0 einops==0.8.2 \
		pandas==2.3.3 python-dateutil==2.9.0.post0 pytz==2025.2 six==1.17.0 tzdata==2025.2
	PYTHONPATH=.third-party $(RUN) -m pytest -m third_party tests/third_party $(ARGS)

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

# Ten minutes on two quiet cores. `make bench ARGS=--quick` shows only that everything runs; one alone is
# `make bench BENCHMARKS=tail`. The first run of peers needs a package index.
BENCHMARKS := dispatch sharding end_to_end peers input memory compile tail metrics checkpoint features
bench: $(READY)
	for name in $(BENCHMARKS); do $(RUN) benchmarks/$$name.py --json .bench/$$name.json $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) .bench .third-party runs .pytest_cache .mypy_cache .ruff_cache .coverage

# The list is complete, so pip need not resolve anything, and never hears that datarax on Python 3.11
# would like TensorFlow (1.8 GB) for data sources that are not used here. See README, "Installation".
$(READY): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
