# What can be done here. Each target does the set-up that it needs, and nothing twice.

SCENARIO    ?= server_moves_to_new_address
ENGINE      ?= auto
PYTEST_ARGS ?=
EXAMPLES    ?= 50000
# Tests at once, each with what it starts on one processor, of which two may share one: a lab waits
# half of its time. With more than four the kernel's own locks are in the way. JOBS=0: one by one.
JOBS        ?= $(shell n=$$(nproc) && echo $$((n < 2 ? 2 : 4)))
PYTEST       = .venv/bin/pytest -n $(JOBS) --dist worksteal
MANY        ?= 16x50
REPS        ?= 1
ONLY        ?=
SECONDS     ?= 60
FUZZ_ARGS   ?=
MINUTES     ?= 2
CHAOS_SECONDS ?= 30
CHAOS_ARGS  ?=
KERNELS     ?= own newest
BENCH_ARGS  ?=
PLOTS_ARGS  ?=

# Tests skip what this machine lacks, but not in CI nor as root, where the set-up can provide it:
# there a missing tool is a failure. `make test NATKEEP_REQUIRE=` skips there too.
ALL_REQUIRED := root,powers,criu,pycriu,runc,scapy,aioquic,dnsmasq,socat,iperf3,nftables,ruff,mypy,sphinx,matplotlib
NATKEEP_REQUIRE ?= $(if $(CI)$(filter 0,$(shell id -u)),$(ALL_REQUIRED))
export NATKEEP_REQUIRE

CAPABILITIES := -all,+net_admin,+sys_admin,+dac_read_search,+net_raw
ACTING_TESTS := tests/kernel tests/criu tests/checkpoint tests/plan $(addprefix tests/test_,cli.py \
	lifecycle.py journal.py policy.py children.py capabilities.py names_property.py)

# pytest rewrites what it imports: five seconds of each run where it may not keep that.
unexport PYTHONDONTWRITEBYTECODE

# nft, criu and the like live in sbin, which not every shell has in its path.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

# faults: how many kills at random, and what else bench/faults takes.
KILLS       ?= 500
FAULTS_ARGS ?=

.PHONY: help setup demo test test-quick test-long check lab matrix bench bench-hook bench-migrate bench-pods bench-fleet bench-control bench-stall bench-path bench-plots bench-million deb test-deb soak chaos kernels fuzz faults many test-caps docs man clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup: ## packages, .venv/ and a CRIU that works on this kernel (needs root when one is missing)
	@scripts/setup
	@scripts/get-criu

demo: root setup ## move a real server to another address; shows what its peer saw (needs root)
	@.venv/bin/natkeep lab run server_moves_to_new_address --engine auto --report .lab/demo

test: setup kernel containerd ## the whole test suite; PYTEST_ARGS='-k word' for a part of it, JOBS=2 tests at once
	@$(PYTEST) $(PYTEST_ARGS)

test-quick: setup ## under a minute: what needs no kernel, and one move by CRIU in a practice network
	@NATKEEP_EXAMPLES=500 $(PYTEST) -m quick $(PYTEST_ARGS)

test-long: setup kernel containerd ## the whole test suite, with EXAMPLES=50000 of what gets into nft's text (test: 5,000)
	@NATKEEP_EXAMPLES=$(EXAMPLES) $(PYTEST) $(PYTEST_ARGS)

check: ## lint and types
	@scripts/setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

lab: root setup ## one practice network: SCENARIO=name ENGINE=auto|criu|repair (needs root)
	@.venv/bin/natkeep lab run $(SCENARIO) --engine $(ENGINE)

docs: ## the pages as a site, in .lab/docs; what Sphinx warns of is an error
	@scripts/setup
	@.venv/bin/sphinx-build -q -W --keep-going -b html -c docs . .lab/docs && echo .lab/docs/README.html

matrix: root setup ## the correctness matrix, beside rules written by hand: REPS=1 ONLY='name' (needs root)
	@.venv/bin/natkeep lab matrix --reps $(REPS) $(if $(ONLY),--only '$(ONLY)')

kernels: root ## what passes on Debian's kernels, own and newest, in virtual machines; KERNELS=own (needs root)
	@scripts/setup kernels
	@scripts/get-criu
	@scripts/get-kernels $(KERNELS) || :
	@.venv/bin/python -m bench.kernels $(KERNELS)

fuzz: ## mutants of real dumps, journals and lists: SECONDS=60; ends in 1 if one is a finding
	@scripts/setup
	@.venv/bin/python -m fuzz --seconds $(SECONDS) $(FUZZ_ARGS)

many: root setup ## 16 processes of 50 moves each in the same namespaces: MANY=16x50 (needs root)
	@NATKEEP_MANY=$(MANY) .venv/bin/pytest tests/test_many_at_once.py -q

deb: ## the Debian package, by Debian's tools, into .lab/deb/ (needs root when these are missing)
	@scripts/setup deb
	@scripts/make-deb

test-deb: root ## the Debian package: lintian; installed, upgraded and removed in a copy of this root
	@scripts/setup deb
	@NATKEEP_REQUIRE=$(NATKEEP_REQUIRE),debhelper,lintian .venv/bin/pytest tests/test_deb.py $(PYTEST_ARGS)

test-caps: root setup ## the tests of what acts, with natkeep's three capabilities (and scapy's) alone
	@NATKEEP_REQUIRE=root,nftables,scapy setpriv --no-new-privs --bounding-set $(CAPABILITIES) --inh-caps -all \
		.venv/bin/pytest $(ACTING_TESTS) $(PYTEST_ARGS)

bench: root setup ## all four benches, each figure asked for beside the one reached; JSON in .lab/bench/ (needs root)
	@.venv/bin/python -m bench $(BENCH_ARGS)

bench-plots: setup ## docs/performance/*.png from what `make bench` wrote; installs matplotlib into .venv/
	@.venv/bin/python -c 'import matplotlib' 2>/dev/null || .venv/bin/python -m pip install -q \
		--disable-pip-version-check --no-input -e '.[plots]' </dev/null
	@.venv/bin/python -m bench.plots $(PLOTS_ARGS)

bench-million: root setup ## a million kept connections at one gateway: time and memory (needs root, 2 GiB)
	@.venv/bin/python -m bench.million $(BENCH_ARGS)

bench-hook: root setup ## what each call of natkeep-hook costs a restore (needs root)
	@.venv/bin/python -m bench.hook $(BENCH_ARGS)

bench-migrate: root setup ## how long a peer hears nothing in natkeep migrate, beside CRIU in place (needs root, sshd)
	@.venv/bin/python -m bench.migrate $(BENCH_ARGS)

bench-pods: root setup containerd ## pods that move, IPv4 and IPv6, and the two ways to lose them: BENCH_ARGS='--reps 20' (needs root)
	@.venv/bin/python -m bench.pods $(BENCH_ARGS)

bench-path: root setup ## what a packet costs, kept or somebody else's, beside plain routing (needs root)
	@.venv/bin/python -m bench.path $(BENCH_ARGS)

bench-control: root setup ## prepare, open, teardown beside what is done by hand, 1 to 100,000 connections (needs root)
	@.venv/bin/python -m bench.control $(BENCH_ARGS)

bench-stall: root setup ## how long a peer waits, with and without hold: BENCH_ARGS='--reps 20' (needs root)
	@.venv/bin/python -m bench.stall $(BENCH_ARGS)

soak: root setup ## moves back and forth under load, and nothing grows: MINUTES=20 (needs root)
	@.venv/bin/python -m bench.soak --minutes $(MINUTES)

bench-fleet: root setup ## 10,000 moves at one gateway, 100 agents, and the way from an order to ready, by etcd (needs root, etcd-server)
	@.venv/bin/python -m bench.fleet $(BENCH_ARGS)

chaos: root setup ## a fleet's moves while etcd, agents and who orders die: CHAOS_SECONDS=30 without a quorum (needs root, etcd-server)
	@.venv/bin/python -m bench.chaos --seconds $(CHAOS_SECONDS) $(CHAOS_ARGS)

faults: root setup ## natkeep struck at every point and killed KILLS=500 times: nothing is left (needs root)
	@.venv/bin/python bench/faults --kills $(KILLS) $(FAULTS_ARGS)

man: ## the man pages, into dist/man/
	@scripts/setup
	@.venv/bin/python scripts/make_man.py dist/man

clean: ## remove .venv/, .lab/ and the caches; the system's packages stay
	rm -rf .venv .lab .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual machine of the suite's, where there is a qemu.
.PHONY: kernel
kernel: setup
	@! command -v qemu-system-x86_64 >/dev/null || scripts/get-kernels own || :

# For pods of the lab; where there is none, what needs it skips.
.PHONY: containerd
containerd: setup
	@[ "$$(id -u)" != 0 ] || scripts/get-containerd

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo 'make: needs root, for network namespaces and CRIU' >&2; exit 1; }
