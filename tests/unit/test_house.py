"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.links import anchors, dead_links, pages

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("agent_image", "image_service", "imaging", "rpc", "demo", "bench", "tests")
FUNCTION_LINES_MAX = 50  # what fits on a screen; the linter's limits on statements and complexity come on top
FILE_LINES_MAX = 500
# Spelt so that this file does not find itself.
FORBIDDEN = {
    "a promise instead of work": re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b"),
    "a private path": re.compile(r"(?<![\w.])/(ro" r"ot/\.|wo" r"rk/\w)"),
    "an empty promise": re.compile(r"raise NotImpl" r"ementedError"),
    "a swallowed error": re.compile(r"except[^\n]*:\s*pa" r"ss\b"),
}


def _modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def _published() -> list[Path]:
    """Every text file of the tree that is not made by a tool."""
    made = {"__pycache__", "build", "dist"}
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [
            name
            for name in below
            if name == ".ci" or not (name in made or name.startswith(".") or name.endswith(".egg-info"))
        ]
        found += [Path(folder, name) for name in names]
    return [path for path in sorted(found) if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0


def test_functions_are_at_most_a_screen_long() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or 0)
        - node.lineno
        + 1
        - _docstring_lines(node)
        for path in _modules()
        for node in _functions(path)
    }
    assert len(lengths) > 100
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES_MAX} == {}


def test_files_are_at_most_500_lines_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _modules()}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES_MAX} == {}


def test_modules_say_what_they_are_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in _modules()
        if not path.is_relative_to(ROOT / "tests") and not ast.get_docstring(_tree(path))
    ]
    assert silent == []


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_files_contain_nothing_forbidden(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _published()
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1)
        if FORBIDDEN[what].search(line)
    ]
    assert found == [], what


def test_docs_have_no_dead_links() -> None:
    assert [line for page in pages(ROOT) for line in dead_links(page)] == []


def test_docs_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    queue = [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", page.read_text())
        queue += [(page.parent / target).resolve() for target in targets if "://" not in target]
    assert {str(page.relative_to(ROOT)) for page in pages(ROOT)} - {
        str(page.relative_to(ROOT)) for page in seen
    } == set()


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A heading, with `code`\n# Twice\n# Twice\n```\n# not one\n```\n")
    page = tmp_path / "page.md"
    links = ["there.md", "there.md#a-heading-with-code", "there.md#twice-1", "https://example.org/x", "#here"]
    dead = ["gone.md", "there.md#not-one", "#nowhere"]
    page.write_text("# Here\n" + "\n".join(f"[x]({link})" for link in [*links, *dead]) + "\n`[x](quoted.md)`\n")
    assert [line.rsplit(": ", 1)[1] for line in dead_links(page)] == dead
    assert anchors(tmp_path / "there.md") == {"a-heading-with-code", "twice", "twice-1"}


def test_make_every_target_is_explained_and_documented() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    explained = set(re.findall(r"^([a-z][a-z-]*):.*## \S", makefile, re.MULTILINE))
    assert targets == explained
    documented = "\n".join(page.read_text() for page in pages(ROOT))
    assert {target for target in targets if f"make {target}" not in documented} == set()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony.group(1).split()) == targets


# What an import is called where its distribution is called otherwise, or comes with another one.
DISTRIBUTIONS = {
    "dns": "dnspython",
    "jsonschema": "jsonrpcserver",
    "oslash": "jsonrpcserver",
    "urllib3": "requests",
    "yarl": "aiohttp",
    "botocore": "boto3",
}
NOT_FROM_THE_INDEX = {"libzfs_core", "_typeshed"}  # the distribution's; the type checker's


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_imports_are_of_declared_dependencies() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    declared = re.findall(r"^[\w-]+", settings["options"]["install_requires"], re.MULTILINE)
    declared += [name for extra in extras.values() for name in re.findall(r"^[\w-]+", extra, re.MULTILINE)]
    known = {*sys.stdlib_module_names, *PACKAGES, *NOT_FROM_THE_INDEX, *(name.replace("-", "_") for name in declared)}
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in _modules()
        for name in _imported(path)
        if DISTRIBUTIONS.get(name, name) not in known
    }
    assert undeclared == set()


def test_console_scripts_lead_to_functions() -> None:
    text = (ROOT / "setup.cfg").read_text()
    scripts = re.findall(r"^    (mistify-[\w-]+) = ([\w.]+):(\w+)$", text, re.MULTILINE)
    assert [name for name, _, _ in scripts] == ["mistify-agent-image", "mistify-image-service", "mistify-image"]
    for name, module, function in scripts:
        assert callable(getattr(importlib.import_module(module), function, None)), name
