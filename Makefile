# What can be done here. Each target does the set-up that it needs, and nothing twice.

SCENARIO    ?= server_moves_to_new_address
ENGINE      ?= auto
PYTEST_ARGS ?=
REPS        ?= 1
ONLY        ?=

# Tests skip what this machine lacks, but not in CI nor as root, where the set-up can provide it:
# there a missing tool is a failure. `make test NATKEEP_REQUIRE=` skips there too.
ALL_REQUIRED := root,criu,pycriu,runc,scapy,nftables,ruff,mypy
NATKEEP_REQUIRE ?= $(if $(CI)$(filter 0,$(shell id -u)),$(ALL_REQUIRED))
export NATKEEP_REQUIRE

# nft, criu and the like live in sbin, which not every shell has in its path.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help setup demo test check lab matrix bench-hook clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## packages, .venv/ and a CRIU that works on this kernel (needs root when one is missing)
	@scripts/setup
	@scripts/get-criu

demo: root setup ## move a real server to another address; shows what its peer saw (needs root)
	@.venv/bin/natkeep lab run server_moves_to_new_address --engine auto

test: setup ## the whole test suite; PYTEST_ARGS='-k word' for a part of it
	@.venv/bin/pytest $(PYTEST_ARGS)

check: ## lint and types
	@scripts/setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

lab: root setup ## one practice network: SCENARIO=name ENGINE=auto|criu|repair (needs root)
	@.venv/bin/natkeep lab run $(SCENARIO) --engine $(ENGINE)

matrix: root setup ## the correctness matrix, beside rules written by hand: REPS=1 ONLY='name' (needs root)
	@.venv/bin/natkeep lab matrix --reps $(REPS) $(if $(ONLY),--only '$(ONLY)')

bench-hook: root setup ## what each call of natkeep-hook costs a restore (needs root)
	@.venv/bin/python bench/hook.py

clean: ## remove .venv/, .lab/ and the caches; the system's packages stay
	rm -rf .venv .lab .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo 'make: needs root, for network namespaces and CRIU' >&2; exit 1; }
