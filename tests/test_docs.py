"""The pages for readers: what they link to is there, the README is short, every room is described."""

import re
from pathlib import Path

import pytest
from test_layers import ARROWS

REPOSITORY = Path(__file__).parent.parent
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page):
    """What a link to a heading of the page is called: lower case, spaces as hyphens, no other marks."""
    headings = HEADING.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_a_page_resolves(page):
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link} is not there"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: no such heading"


def test_the_readme_is_read_in_a_few_minutes():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_architecture_names_every_room():
    described = re.findall(r"^\| (`.*?) \|", (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8"), re.M)
    missing = set(ARROWS) - {room for cell in described for room in re.findall(r"`(\w+)`", cell)}
    assert not missing, f"docs/architecture.md describes no {', '.join(sorted(missing))}"
