# Every target explains itself: `make help`.
SHELL := /bin/bash
VENV ?= .venv
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
# One test process a core: more only wait for each other.
TEST_WORKERS ?= $(shell nproc)
# What the tests run against, as PROGRAM=PACKAGE: real qemu, gpg, etcd, S3 (Swift) and container tools.
TEST_PROGRAMS := qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils systemd-analyze=systemd gpg=gnupg gpgv=gpgv \
	openssl=openssl skopeo=skopeo umoci=umoci etcd=etcd-server swift-proxy-server=swift-proxy \
	swift-account-server=swift-account swift-container-server=swift-container swift-object-server=swift-object \
	memcached=memcached haproxy=haproxy etcdctl=etcd-client chromium=chromium
# What make cluster-demo runs.
CLUSTER_PROGRAMS := qemu-system-x86_64=qemu-system-x86 etcd=etcd-server haproxy=haproxy memcached=memcached \
	swift-proxy-server=swift-proxy swift-account-server=swift-account swift-container-server=swift-container \
	swift-object-server=swift-object
# More words for pytest, for a part of the tests: make test PYTEST_ARGS="tests/unit -k names"
PYTEST_ARGS ?=
WITHOUT ?=
.DEFAULT_GOAL := help
.PHONY: help venv demo cluster-demo run check format test test-zfs bench bench-zfs install clean

help: ## Print every target with what it does
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-13s%s\n", $$1, $$2}'

venv: $(VENV)/.done ## Make .venv with everything, all extras (PYTHON=/path chooses the interpreter)
$(VENV)/.done: setup.cfg setup.py pyproject.toml scripts/make-venv imaging/sendstream/native.c
	@scripts/make-venv $(VENV)

demo: venv ## Show the whole system at work and boot a guest (IMAGE=/path to any raw disk or stream overrides the guest)
	@scripts/ensure-packages qemu-system-x86_64=qemu-system-x86
	@$(VENV)/bin/python -m demo

cluster-demo: venv ## Show two image services on etcd and S3 behind a load balancer, and what happens when each part is killed
	@scripts/ensure-packages $(CLUSTER_PROGRAMS)
	@$(VENV)/bin/python -m demo.cluster

run: venv ## Start both daemons in the foreground on ports 19999 and 20000, and print three commands to try
	@$(VENV)/bin/python -m demo.run

check: venv ## Lint, format, types, import direction, dead links in the docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m tests.links

format: venv ## Format the code and repair what ruff can repair
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: venv ## Run every test but those of real OpenZFS (make test-zfs), setting up what they need (WITHOUT="qemu" leaves one out)
	@scripts/ensure-packages $(TEST_PROGRAMS)
	$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile --ignore-glob='*/integration/test_zfs_*.py' \
		$(addprefix --without ,$(WITHOUT)) $(PYTEST_ARGS)

test-zfs: venv ## Run what needs real OpenZFS alone, in throw-away virtual machines where this one has none (root)
	VENV=$(VENV) tests/lab/test-zfs

bench: venv ## Measure against the obvious alternatives, side by side; prints the tables of docs/benchmarks.md
	@scripts/ensure-packages curl=curl nginx=nginx-light
	$(VENV)/bin/python -m bench

bench-zfs: venv ## Measure the zfs driver beside the zfs program, on the pool of the lab (root; about a quarter of an hour)
	@[ -e /sys/module/zfs/version ] || modprobe -q zfs 2>/dev/null || tests/lab/setup --no-probe
	MISTIFY_PATIENCE=8 tests/lab/zfs-vm --cpus 1 --udev light --timeout 5400 -- $(VENV)/bin/python -m bench.zfs

install: venv ## Install programs, systemd units and settings (DESTDIR, PREFIX=/usr/local, SYSCONFDIR=/etc)
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' VENV='$(VENV)' scripts/install

clean: ## Remove everything that was made here: .venv, caches, build leftovers
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
