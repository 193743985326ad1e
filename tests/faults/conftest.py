"""The table of planted faults and what found each, at the end of the tests' output."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter):
    from catalogue import FOUND  # the modules beside this file are found once it has run

    if FOUND:
        terminalreporter.section("planted faults")
        for fault, what in FOUND.items():
            terminalreporter.write_line(f"{fault:<46} {what}")
