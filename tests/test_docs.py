"""The pages in docs/ and at the root: links, named files and the form of decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "stretto"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
ENTRY = re.compile(r"^## (.+)\n\n((?:.+\n)+)", re.MULTILINE)
NAMED = re.compile(r"`((?:[\w-]+/)+[\w.-]*)`")
FIELDS = ["Context", "Decision", "Figure", "Date", "Status"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs write them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def test_every_page_begins_with_its_title() -> None:
    assert [str(page) for page in PAGES if not page.read_text().startswith("# ")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    broken: list[str] = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_the_docs_exist(page: Path) -> None:
    """A path is below the root of the repository or below `src/stretto`."""
    made = ("site/", "application/", "recipe/", "evaluation/")
    names = [name for name in NAMED.findall(page.read_text()) if not name.startswith(made)]
    assert not [name for name in names if not any((top / name).exists() for top in (ROOT, PACKAGE))]


def test_every_decision_has_its_fields_in_order() -> None:
    for page in DECISIONS:
        if page.name == "index.md":
            continue
        text = page.read_text()
        entries = ENTRY.findall(text)
        assert len(entries) == text.count("\n## "), page
        for title, body in entries:
            assert re.findall(r"^- \*\*(\w+):\*\*", body, re.MULTILINE) == FIELDS, (page.name, title)
            assert re.search(r"^- \*\*Date:\*\* \d{4}-\d\d-\d\d$", body, re.MULTILINE), title
            assert re.search(r"^- \*\*Status:\*\* (accepted$|superseded by \[)", body, re.MULTILINE), title


def test_the_index_of_decisions_names_every_page() -> None:
    index = (DOCS / "decisions" / "index.md").read_text()
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == {page.name for page in DECISIONS} - {"index.md"}


def test_benchmarks_that_the_docs_run_as_scripts_find_what_they_import():
    """A script finds its neighbours. The packages `benchmarks` and `recipes` need `python -m`."""
    pages = [*PAGES, *(ROOT / "benchmarks").glob("*.py")]
    command = re.compile(r"python benchmarks/(\w+)\.py")
    named = {name for page in pages for name in command.findall(page.read_text())}
    assert len(named) > 10
    wrong = {
        name
        for name in named
        if re.search(
            r"^(from|import) (benchmarks|recipes)\b", (ROOT / f"benchmarks/{name}.py").read_text(), re.M
        )
    }
    assert wrong == set()
