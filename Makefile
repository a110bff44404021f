# Each target installs what it misses, then does its job.
#
#   make demo       wire a tap to vhost-net, or to the embedded engine, and send traffic through it
#   make demo-kernel  the same on a real kernel's vhost-net, in a VM
#   make demo-vmm   boot a kernel in our own VMM, its network on a real kernel's vhost-net, in a VM
#   make test       lint, types, host tests, lab tests on $(KERNELS)
#   make test-all   the same on every kernel, and what is long
#   make soak       the same for hours: a minute of load for each change, 1 GiB of TCP, 200 kills
#   make lint-c     the module: compiler's warnings, sparse, checkpatch
#   make kmod       the module for the running kernel
#   make bench      packets a second and CPU cost, in instructions
#   make clean      remove what these made in this folder (not the kernels in the cache)

PYTHON  ?= python3
KERNELS ?= 6.1
ALL     := 6.1 6.12 7.2
BIN     := .venv/bin
NATIVE  := $(wildcard vhostctl/guest/src/*.[ch] kmod/core/*.[ch] kmod/user/*.[ch]) \
	   $(wildcard vhostctl/*/native.cdef vhostctl/*/build.py)

# What of tests/system needs a vhost-net and no node.
ON_ENGINE := address_space changes dirty_log doctor gso handover iotlb load many migrate \
	     multiqueue kvm kvm_notifiers negotiation notifiers peer_bugs selftest service \
	     service_qmp session vmm_hostile vmm_net vmm_run vmm_suspend vmm_wild workers
SKIPS   := --allowed-skips .ci/allowed-skips.txt
TWO     := -n 2 --dist loadgroup
# What runs on the host waits more than it works, and none of it for minutes: one that does
# shows where each thread stands, and ends.
HOST_LIMIT ?= 300
HOST    := -n 4 --dist loadgroup --max-worker-restart 0 \
	   -o faulthandler_timeout=$(HOST_LIMIT) -o faulthandler_exit_on_timeout=true
MARKS   := not soak
# What is long begins first, so that the two that run at a time end together.
LONG    := $(patsubst %,tests/vm/test_%.py,vmm system conformance kmod)
LAB_TESTS := $(LONG) $(filter-out $(LONG),$(sort $(wildcard tests/vm/test_*.py)))
# How much of everything, where the default is for a machine that somebody waits at.
SOAK    := VHOSTCTL_TEST_SECONDS=60 VHOSTCTL_TEST_GSO_MIB=1024 VHOSTCTL_TEST_GSO_SETS=244 \
	   VHOSTCTL_TEST_KILLS=200 \
	   VHOSTCTL_VMM_SECONDS=30 VHOSTCTL_VMM_MIB=64 VHOSTCTL_TEST_LIMIT=14400 HOST_LIMIT=14400

.DELETE_ON_ERROR:
.PHONY: demo demo-kernel demo-vmm test test-all soak lint lint-c host-test lab-test \
	kmod bench bytecode packages test-packages kernels clean

demo: .venv/ready bytecode
	@.ci/demo $(firstword $(KERNELS))

demo-kernel: .venv/ready bytecode
	@.ci/demo $(firstword $(KERNELS)) kernel

demo-vmm: .venv/ready bytecode
	@.ci/demo-vmm $(firstword $(KERNELS))

test: lint lint-c host-test lab-test

test-all:
	$(MAKE) test KERNELS="$(ALL)" MARKS=

soak:
	$(SOAK) $(MAKE) test-all

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-c: .venv/ready kernels test-packages
	$(BIN)/vhostctl kmod build -k 6.1 --sparse
	$(BIN)/python .ci/checkpatch.py

kmod: .venv/ready
	$(BIN)/vhostctl kmod build

host-test: .venv/ready
	$(BIN)/python -m pytest $(HOST) tests/unit tests/cli tests/core $(SKIPS)
	$(BIN)/python -m pytest $(HOST) tests/conformance $(ON_ENGINE:%=tests/system/test_%.py) \
		--device engine $(SKIPS)

lab-test: .venv/ready bytecode kernels test-packages
	VHOSTCTL_TEST_KERNELS="$(KERNELS)" \
	$(BIN)/python -m pytest $(TWO) -m "$(MARKS)" $(LAB_TESTS) $(SKIPS)

bench: .venv/ready bytecode kernels
	@.ci/bench $(firstword $(KERNELS))

kernels: .venv/ready
	$(BIN)/vhostctl lab fetch --missing --headers $(sort 6.1 $(KERNELS))

# A VM starts our programs faster with it, and cannot keep what it compiles itself.
bytecode: .venv/ready
	@$(BIN)/python -m compileall -q vhostctl tests

packages:
	@.ci/packages

test-packages:
	@.ci/packages acpica-tools apparmor dkms iperf3 perl sparse

.venv/ready: setup.py pyproject.toml $(NATIVE) | packages
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[lab,test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find vhostctl -name '_native*.so' -o -name '_native*.o' -o -name '_native.c' | xargs rm -f
	find . -name __pycache__ -prune -exec rm -rf {} +
