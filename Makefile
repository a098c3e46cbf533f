# The first target that needs .venv makes it; `make help` tells the rest.
PYTHON ?= python3
PYTEST_ARGS ?=
TEST_WORKERS ?= 3
LOCK_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=
LOAD_ARGS ?=
BIN := .venv/bin
VENV := .venv/.synced
LOAD_VENV := .venv-load/.synced
TRITON_VENV := .venv-triton/.synced
MLSERVER_VENV := .venv-mlserver/.synced
GHZ_VERSION := v0.121.0
GHZ := .tools/ghz-$(GHZ_VERSION)

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help venv venv-mlserver venv-triton install run test interop soak grid bench bench-mlserver example-digits \
	load-rest load-grpc check format protos lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV) ## create or update .venv from requirements-dev.txt (PYTHON=python3.12 to choose)

$(VENV): requirements-dev.txt tools/venv.sh tools/uv.sh
	@echo "making .venv from requirements-dev.txt"
	@tools/venv.sh

install: $(VENV) ## install the project itself into .venv, editable
	tools/uv.sh pip install --no-deps --editable .

# The launcher leaves with 0 after Ctrl-C. A terminal's Ctrl-C reaches make, too: it waits for the launcher, says
# nothing and ends by the signal, as any interrupted command does.
run: $(VENV) ## start mock, router and gateway; Ctrl-C drains and stops them
	@$(BIN)/python tools/run.py

# Compiled once, as in venv.sh: hundreds of processes are started.
test: $(VENV) ## run all tests, three files at a time; PYTEST_ARGS="-k batch -x" for some, TEST_WORKERS=0 for one by one
	@$(BIN)/python -m compileall -q protos router router_client rest_gateway mock_nn
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

interop: $(VENV) ## test with other people's clients and servers, and list the cases; PYTEST_ARGS as for test
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --interop-cases $(PYTEST_ARGS) tests/interop

soak: $(VENV) ## the rows of the reliability plan at their full counts, hours; SOAK_ARGS="kills cancels" for some
	@$(BIN)/python -m tests.reliability --full $(SOAK_ARGS)

grid: $(VENV) ## the release against a plain one over 528 kinds of model and traffic, a quarter of an hour; var/grid.svg
	@mkdir -p var
	@$(BIN)/python -m router.simulate.grid --svg var/grid.svg

bench: $(VENV) ## measure speed, about nine minutes; BENCH_ARGS="--quick" for one and a half
	@$(BIN)/python -m bench $(BENCH_ARGS)

bench-mlserver: $(VENV) $(MLSERVER_VENV) ## measure MLServer behind the router beside its own batching, about four minutes; BENCH_ARGS="--quick"
	@$(BIN)/python -m bench.mlserver $(BENCH_ARGS)

example-digits: $(VENV) var/digits/test.npz ## a real network at MLServer, asked through router and gateway: is every answer right?
	@$(BIN)/python -m examples.digits

var/digits/test.npz: examples/digits/train.py examples/digits/repository/digits/model-settings.json $(MLSERVER_VENV)
	@echo "training the network of examples/digits"
	@.venv-mlserver/bin/python examples/digits/train.py var/digits

load-rest: $(VENV) $(LOAD_VENV) ## put load on REST with locust, 20 s; LOAD_ARGS="--users 200", LOAD_HOST to aim elsewhere
	@$(BIN)/python -m tools.load rest $(LOAD_ARGS)

load-grpc: $(VENV) $(GHZ) ## put load on gRPC with ghz (needs Go), twice 10 s; LOAD_ARGS="--duration=60s", LOAD_HOST
	@$(BIN)/python -m tools.load --ghz $(GHZ) grpc $(LOAD_ARGS)

$(LOAD_VENV): requirements-load.txt $(VENV)
	@echo "making .venv-load from requirements-load.txt"
	@$(BIN)/python -m venv --clear --without-pip .venv-load
	@tools/uv.sh pip sync --quiet --require-hashes --python .venv-load/bin/python requirements-load.txt
	@touch $@

venv-mlserver: $(MLSERVER_VENV) ## create or update .venv-mlserver: MLServer, for example-digits, bench-mlserver and tests

$(MLSERVER_VENV): requirements-mlserver.txt | $(VENV)
	@echo "making .venv-mlserver from requirements-mlserver.txt"
	@$(BIN)/python -m venv --clear --without-pip .venv-mlserver
	@tools/uv.sh pip sync --quiet --require-hashes --compile-bytecode --python .venv-mlserver/bin/python requirements-mlserver.txt
	@touch $@

venv-triton: $(TRITON_VENV) ## create or update .venv-triton: a real Triton, 340 MB, for the interoperability tests

$(TRITON_VENV): requirements-triton.txt | $(VENV)
	@echo "making .venv-triton from requirements-triton.txt"
	@$(BIN)/python -m venv --clear --without-pip .venv-triton
	@tools/uv.sh pip sync --quiet --require-hashes --compile-bytecode --python .venv-triton/bin/python requirements-triton.txt
	@touch $@

$(GHZ):
	@command -v go >/dev/null || { echo "make load-grpc: Go is needed to install ghz, and there is no go" >&2; exit 1; }
	@echo "installing ghz $(GHZ_VERSION) into .tools"
	@GOBIN="$(CURDIR)/.tools" go install github.com/bojand/ghz/cmd/ghz@$(GHZ_VERSION)
	@mv .tools/ghz $@

check: $(VENV) ## lint, format, types, imports, generated code, protos, requirements, Dockerfile, compose; writes nothing
	$(BIN)/ruff check --no-cache --quiet
	$(BIN)/ruff format --no-cache --check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports --config importlinter.toml --no-cache --no-logo
	$(BIN)/python tools/generate_protos.py --check
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against protos/baseline.binpb
	$(BIN)/python tools/check_requirements.py
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml

format: $(VENV) ## let ruff and buf rewrite what they can
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format
	$(BIN)/buf format --write

protos: $(VENV) ## generate the Python code of protos/
	$(BIN)/python tools/generate_protos.py

lock: $(VENV) ## resolve the requirement files anew; LOCK_ARGS=--upgrade for newer versions
	tools/uv.sh pip compile --quiet --universal --generate-hashes --python-version 3.11 $(LOCK_ARGS) \
		--group dev pyproject.toml -o requirements-dev.txt
	tools/uv.sh pip compile --quiet --universal --generate-hashes --python-version 3.11 $(LOCK_ARGS) \
		-c requirements-dev.txt pyproject.toml -o requirements.txt
	tools/uv.sh pip compile --quiet --universal --generate-hashes --python-version 3.11 $(LOCK_ARGS) \
		--group load -o requirements-load.txt
	tools/uv.sh pip compile --quiet --universal --generate-hashes --python-version 3.11 $(LOCK_ARGS) \
		--group mlserver -o requirements-mlserver.txt
	tools/uv.sh pip compile --quiet --universal --generate-hashes --python-version 3.11 $(LOCK_ARGS) \
		--group triton -o requirements-triton.txt

clean: ## remove .venv and every cache
	rm -rf .venv .venv-load .venv-mlserver .venv-triton .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
