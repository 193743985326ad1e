"""What the README and docs/ show runs, and so does every file of examples/."""

import re
from pathlib import Path

import pytest
from programs import run

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
BLOCK = re.compile(r"^(<!-- no-run -->\n+)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The page's Python, each block on its own lines, so that a traceback names the page's line."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        if block[1] is None:
            first = text.count("\n", 0, block.start(2))
            code = block[2].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page).strip()], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_another(page, tmp_path):
    """A page's blocks share their names; `<!-- no-run -->` before one leaves it out."""
    script = tmp_path / f"page_{page.stem}.py"  # no name of a package
    script.write_text(blocks(page), encoding="utf-8")
    run(script, tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example, tmp_path):
    run(example, tmp_path)
