"""What is said about the code, in design/, docs/papers.md and module headers, is true of it."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "design"
DECISIONS = sorted(p for p in DESIGN.glob("*.md") if p.name != "README.md")
PAPERS = ROOT / "docs" / "papers.md"
WINGS = ("rlrf", "environments", "sandboxes", "trainers")
HEADINGS = ["Question", "Alternatives", "Decision", "What would change it"]
ARXIV = re.compile(r"(?<![\d.])\d{2}(?:0[1-9]|1[0-2])\.\d{5}(?!\d)")
FILE = re.compile(r"[\w./-]*\w\.(?:py|md)\b")


@functools.cache
def sources() -> dict[str, str]:
    """The code and the examples, by path."""
    folders = (*WINGS, "tests", "docs/examples", "benchmarks")
    paths = (p for f in folders for p in (ROOT / f).rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in paths}


def functions_of(source: str) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE))


def test_every_decision_is_named_by_the_code_that_it_governs():
    code = "".join(text for path, text in sources().items() if path.split("/")[0] in WINGS)
    named = set(re.findall(r"design/([\w-]+\.md)", code))
    assert named == {p.name for p in DECISIONS}
    index = (DESIGN / "README.md").read_text()
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == named


@pytest.mark.parametrize("page", DECISIONS, ids=lambda p: p.stem)
def test_a_decision_is_a_page_with_its_alternatives(page):
    text = page.read_text()
    assert len(text.splitlines()) <= 60
    if page.stem != "isolation":  # a table: so many decisions of one kind
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("page", [*DECISIONS, PAPERS], ids=lambda p: p.stem)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    known = [*sources(), *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("*/*.md"))]
    words = re.findall(r"`([^`\n]+)`|\]\(([^)#:]+)[^)]*\)|\((benchmarks/[\w.]+)\)", text)
    for name in {n for found in words for word in found for n in FILE.findall(word)}:
        wanted = name.removeprefix("../")
        assert any(f"/{path}".endswith(f"/{wanted}") for path in known), f"{page.name}: {name}"
    every = {name for path, code in sources().items() for name in functions_of(code)}
    named = set(re.findall(r"\btest_\w+\b(?!\.py|\*)", text))
    assert named <= every, f"{page.name}: {named - every}"


def rows():
    for line in PAPERS.read_text().splitlines():
        if ARXIV.search(line):
            _, method, _, file, tests, _ = line.split("|")
            yield pytest.param(file.strip(" `"), tests, id=method.strip())


@pytest.mark.parametrize(("file", "tests"), list(rows()))
def test_a_method_is_where_the_index_says_and_pinned_by_its_tests(file, tests):
    assert file in sources()
    pins = re.findall(r"`(tests/\w+\.py)::(\w+)`", tests)
    assert pins
    for path, name in pins:
        assert name in functions_of(sources()[path]), f"{path} has no {name}"


def test_every_paper_that_is_cited_is_in_the_index():
    pages = {p.name: p.read_text() for p in (ROOT / "docs").rglob("*.md")}
    index = set(ARXIV.findall(pages.pop("papers.md")))
    assert "2601.20802" in index
    code = {path: text for path, text in sources().items() if not path.startswith("tests/")}
    for path, text in {**code, **pages}.items():
        assert set(ARXIV.findall(text)) <= index, path


GRADERS = [
    path
    for folder in ("environments/rlrf_environments", "sandboxes/rlrf_sandboxes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]
GRADERS += [*sorted((ROOT / "rlrf" / "sandbox").glob("*.py"))]
GRADERS += [*sorted((ROOT / "rlrf" / "tools").glob("*.py"))]


@pytest.mark.parametrize("path", GRADERS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_graders_sandboxes_and_parsers_say_what_they_do_not_do(path):
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"\b(?:does|do) not\b", header)
