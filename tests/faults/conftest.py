"""The table of planted faults and what found each, at the end of the tests' output."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter):
    """Print what the tests recorded as properties, which reach this process from every worker."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    found = [of for report in reports if "test_faults.py" in report.nodeid for of in report.user_properties]
    if found:
        terminalreporter.section("planted faults")
        for fault, what in found:
            terminalreporter.write_line(f"{fault:<46} {what}")
