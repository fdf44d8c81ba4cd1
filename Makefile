# Every target explains itself: `make help`.
SHELL := /bin/bash
PY ?= .venv/bin/python
.DEFAULT_GOAL := help

help: ## Print every target with what it does
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

venv: .venv/.done ## Make .venv with everything (all extras)
.venv/.done: setup.cfg pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[dev,etcd,s3,zfs]'
	touch $@

check: venv ## Lint, types, import direction, dead links in the docs
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
.PHONY: help venv check
