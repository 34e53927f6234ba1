"""A pytest plugin: writes what becomes of a test as soon as it is known, since a run that is cut off prints none of it.

A line of JSON in the file that WALT_TEST_REPORTS names: for each test, and for each file how many it has.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # of pytest-xdist, whose reports come to the process that started it


def tell(**message: Any) -> None:
    with open(os.environ["WALT_TEST_REPORTS"], "a") as file:
        file.write(json.dumps(message) + "\n")


def pytest_collection_finish(session: Any) -> None:
    if WORKER in (None, "gw0"):
        for file, count in Counter(item.path.name for item in session.items).items():
            tell(file=file, tests=count)


def pytest_collectreport(report: Any) -> None:
    if WORKER is None and report.failed:
        outcome(report)


def pytest_runtest_logreport(report: Any) -> None:
    if WORKER is None and (report.when == "call" or not report.passed):
        outcome(report)


def outcome(report: Any) -> None:
    path, _, name = report.nodeid.partition("::")
    file = path.rsplit("/", 1)[-1]
    found = {"file": file, "test": name or file, "outcome": report.outcome, "message": reason(report)}
    tell(**found, text=report.longreprtext[-3000:] if report.failed else "", seconds=getattr(report, "duration", 0.0))


def reason(report: Any) -> str:
    """Why it failed or was skipped, in one line."""
    if report.passed:
        return ""
    found = report.longrepr
    if isinstance(found, tuple):  # file, line, reason
        return str(found[2]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    lines = (crash.message if crash else str(found)).strip().splitlines()
    return lines[0][:200] if lines else ""
