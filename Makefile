# `make help` lists what there is. Both environments are made from the locks, hashes checked.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
WORKERS ?= 2
JS     := tests/webhooks/js
CONTRACT_JS   := contract/node
CONTRACT_VENV := .venv-contract
BENCH_VENV    := .venv-bench
IS_NODE_RECENT := node -e 'const [a, b] = process.versions.node.split("."); process.exit(a * 100 + +b < 2019 ? 1 : 0)'
CLUSTER       := postgresql patroni python3-etcd etcd-server redis-server haproxy libfaketime
# Debian starts what it installs; none of that is wanted.
CREATION      := /etc/postgresql-common/createcluster.conf
JAKARTA       := /usr/share/java/jakarta-annotation-api.jar

# Webhooks may go to this machine, and in clear. Production refuses both settings.
OPEN_LOOPBACK := WEBHOOK_ALLOW_CIDRS=127.0.0.0/8,::1/128 WEBHOOK_ALLOW_HTTP=on

LOCK := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-header -q
LOCK_PROJECT := $(LOCK) pyproject.toml --extra build

.DEFAULT_GOAL := help
.PHONY: help serve test check format types unit browser node openssl redis fuzz lock clean bench bench-storm bench-soak bench-scale bench-start bench-tools bench-webhooks faults cluster sdk contract diff rolling contract-tools compilers sbom

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.serve ## Start the API on an embedded PostgreSQL at http://127.0.0.1:8000; or PORT=…, ARGS="--workers 2", STRIPE=sandbox, WEBHOOKS=local
	@$(if $(filter local,$(WEBHOOKS)),exec env $(OPEN_LOOPBACK)) \
	  $(if $(filter sandbox,$(STRIPE)),$(BIN)/python -m sandbox,$(BIN)/billing) serve $(ARGS)

test: check browser node openssl redis unit ## Run everything that must pass

check: $(VENV)/.test ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test ## Put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: $(VENV)/.test ## The tests alone; ARGS="-k keys" for some of them
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

fuzz: $(VENV)/.test ## Schemathesis by every caller, for MINUTES=15 in all; SEED=… and ONLY="owner" repeat a finding
	$(BIN)/python -m contract.fuzz --minutes $(or $(MINUTES),15) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only "$(ONLY)")

browser: ## Install chromium where that can be done (Debian, as root)
	@command -v chromium chromium-browser google-chrome >/dev/null \
	  || [ "$$BILLING_TESTS_WITHOUT_BROWSER" = 1 ] \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	  || { echo "Install chromium, or set BILLING_TESTS_WITHOUT_BROWSER=1 to leave the browser tests out."; exit 1; }

node: ## Install Node.js where that can be done (Debian, as root), and the packages of the tests' JavaScript
	@[ "$$BILLING_TESTS_WITHOUT_NODE" = 1 ] || $(MAKE) -s $(JS)/node_modules/.installed

openssl: ## Install openssl where that can be done (Debian, as root)
	@command -v openssl >/dev/null \
	  || [ "$$BILLING_TESTS_WITHOUT_OPENSSL" = 1 ] \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq openssl >/dev/null; } \
	  || { echo "Install openssl, or set BILLING_TESTS_WITHOUT_OPENSSL=1 to leave its tests out."; exit 1; }

redis: ## Install redis-server where that can be done (Debian, as root)
	@command -v redis-server >/dev/null \
	  || [ "$$BILLING_TESTS_WITHOUT_REDIS" = 1 ] \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq redis-server >/dev/null; } \
	  || { echo "Install redis-server, or set BILLING_TESTS_WITHOUT_REDIS=1 to leave its tests out."; exit 1; }

bench: bench-tools ## Measure requests beside Starlette, FastAPI and Django, for under 28 minutes; ARGS="--quick" for three
	$(BIN)/python -m benchmarks.requests $(ARGS)

bench-storm: bench-tools ## Measure `verify` while 32 clients log in, for some two minutes
	$(BIN)/python -m benchmarks.storm $(ARGS)

bench-soak: bench-tools ## Load a server as much as it bears for ten minutes, and say what broke and what it holds
	$(BIN)/python -m benchmarks.soak $(ARGS)

bench-scale: bench-tools ## Measure with up to a million tenants, and with 1, 2 and 4 processes; some 8 GB of disk
	$(BIN)/python -m benchmarks.scale $(ARGS)

bench-start: $(VENV)/.test ## Measure how long the server takes to its first answer, and its imports
	$(BIN)/python -m benchmarks.start $(ARGS)

bench-tools: $(VENV)/.test $(BENCH_VENV)/.installed ## Install what the measurements need; wrk where that can be done (Debian, as root)
	@command -v wrk >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq wrk >/dev/null; } \
	  || { echo "Install wrk."; exit 1; }

faults: $(VENV)/.test cluster ## Kill, stop, cut off and fill a whole installation, for under twenty minutes; ARGS="--only 'disk full'"
	@$(BIN)/python -m tests.faults.cluster $(ARGS)

cluster: ## Install PostgreSQL, Patroni, etcd, Redis, HAProxy and libfaketime where that can be done (Debian, as root)
	@{ command -v patroni && command -v etcd && command -v redis-server && command -v haproxy && ls /usr/lib/postgresql/*/bin/postgres \
	   && ls /usr/lib/*/faketime/libfaketimeMT.so.1; } >/dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	       && mkdir -p /etc/postgresql-common && { [ -e $(CREATION) ] || echo 'create_main_cluster = false' > $(CREATION); } \
	       && RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $(CLUSTER) >/dev/null; } \
	  || { echo "Install $(CLUSTER)."; exit 1; }

bench-webhooks: $(VENV)/.test ## Measure deliveries and their latency, for some five minutes
	$(BIN)/python -m benchmarks.webhooks $(ARGS)

sdk: contract-tools ## Generate SDKs in four languages into dist/sdk, and check their types
	$(BIN)/python -m contract.sdks

contract: contract-tools node ## Everything that judges the contract: linters, SDKs, proxy, flows, fuzzing, mutations; ARGS="--only proxy"
	$(BIN)/python -m contract $(ARGS)

diff: $(VENV)/.test $(CONTRACT_JS)/node_modules/.installed ## Name what breaks clients of an earlier document: BASE=main, or any revision
	@$(BIN)/python -m contract.breaking "$(BASE)"

rolling: $(VENV)/.test ## Try an earlier revision on the schema of this one: BASE=main, or any other
	$(BIN)/python -m tests.rolling "$(BASE)"

contract-tools: $(VENV)/.test $(CONTRACT_JS)/node_modules/.installed $(CONTRACT_VENV)/.installed compilers ## Install what judges the document and makes SDKs

compilers: ## Install compilers of Java and Go where that can be done (Debian, as root)
	@{ command -v javac && command -v go && test -e $(JAKARTA); } >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	       && apt-get install -y -qq default-jdk-headless libjakarta-annotation-api-java golang-go >/dev/null; } \
	  || { echo "Install a JDK (17 or later), Go, and jakarta.annotation-api as $(JAKARTA)."; exit 1; }

lock: $(VENV)/.test ## Renew the locks from pyproject.toml
	$(LOCK_PROJECT) -o requirements.lock
	$(LOCK_PROJECT) --extra test -c requirements.lock -o requirements-dev.lock
	$(LOCK) --group contract -c requirements-dev.lock -o requirements-contract.lock
	$(LOCK) --group bench -c requirements-dev.lock -o requirements-bench.lock

sbom: $(CONTRACT_VENV)/.installed ## Write what the server is made of to dist/sbom.json (CycloneDX)
	@mkdir -p dist
	$(CONTRACT_VENV)/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --mc-type application --output-reproducible -o dist/sbom.json

clean: ## Remove the environment and what tools left behind
	rm -rf $(VENV) $(CONTRACT_VENV) $(BENCH_VENV) $(JS)/node_modules $(CONTRACT_JS)/node_modules dist/sdk .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed.")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.serve: requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing what the server needs …"
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.test: requirements-dev.lock pyproject.toml | $(BIN)/python
	@echo "Installing what the tests need …"
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/.serve

$(JS)/node_modules/.installed: $(JS)/package.json $(JS)/package-lock.json
	@{ command -v node && command -v npm; } >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq nodejs npm >/dev/null; } \
	  || { echo "Install Node.js and npm, or set BILLING_TESTS_WITHOUT_NODE=1 to leave the JavaScript tests out."; exit 1; }
	@echo "Installing what the tests' JavaScript needs …"
	@cd $(JS) && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
	@touch $@

$(CONTRACT_JS)/node_modules/.installed: $(CONTRACT_JS)/package.json $(CONTRACT_JS)/package-lock.json
	@$(IS_NODE_RECENT) 2>/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq nodejs npm >/dev/null; } \
	  && $(IS_NODE_RECENT) \
	  || { echo "Install Node.js 20.19 or later, and npm."; exit 1; }
	@echo "Installing the linters, the proxy and the generators for TypeScript …"
	@cd $(CONTRACT_JS) && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
	@touch $@

$(CONTRACT_VENV)/.installed: requirements-contract.lock | $(BIN)/python
	@echo "Installing the generators of clients, and what lists our parts …"
	@$(PYTHON) -m venv $(CONTRACT_VENV)
	@$(CONTRACT_VENV)/bin/python -m pip --disable-pip-version-check -q install --require-hashes -r requirements-contract.lock
	@touch $@

$(BENCH_VENV)/.installed: requirements-bench.lock | $(BIN)/python
	@echo "Installing what is measured beside us …"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check -q install --require-hashes -r requirements-bench.lock
	@touch $@
