#!/usr/bin/env python3
"""Counts test cases in a JUnit file of ctest or pytest: prints "PASSED FAILED SKIPPED".

In ctest's a GoogleTest or unittest program counts with its cases, another one as one test. A program that
failed without saying which case (a crash, a time-out, a sanitizer's report), or that did not run,
counts as one failure. No test at all is a failure too. What failed or was skipped is named on
stderr.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree

GTEST_TOTAL = re.compile(r"^\[=+\] (\d+) tests? from \d+ test suites? ran\.", re.MULTILINE)
GTEST_PASSED = re.compile(r"^\[  PASSED  \] (\d+) tests?\.", re.MULTILINE)
GTEST_SKIPPED = re.compile(r"^\[  SKIPPED \] (\d+) tests?, listed below:", re.MULTILINE)
GTEST_FAILED = re.compile(r"^\[  FAILED  \] (\d+) tests?, listed below:", re.MULTILINE)
UNITTEST_TOTAL = re.compile(r"^Ran (\d+) tests? in ", re.MULTILINE)
UNITTEST_END = re.compile(r"^(OK|FAILED)(?: \(([^)]*)\))?$", re.MULTILINE)


def number(pattern, text):
    return sum(int(found) for found in pattern.findall(text))


def of_output(text):
    """(passed, failed, skipped) as the program itself says, or None if it says nothing."""
    if GTEST_TOTAL.search(text):
        return number(GTEST_PASSED, text), number(GTEST_FAILED, text), number(GTEST_SKIPPED, text)
    end = UNITTEST_END.search(text)
    if UNITTEST_TOTAL.search(text) and end:
        counts = dict(re.findall(r"(\w+)=(\d+)", end.group(2) or ""))
        failed = sum(int(counts.get(key, 0)) for key in ("failures", "errors"))
        skipped = int(counts.get("skipped", 0))
        return number(UNITTEST_TOTAL, text) - failed - skipped, failed, skipped
    return None


def of_case(case):
    """(passed, failed, skipped) of one <testcase>."""
    skipped, status = case.find("skipped"), case.get("status")
    if status is None:  # pytest
        if case.find("failure") is not None or case.find("error") is not None:
            return 0, 1, 0
        return (1, 0, 0) if skipped is None else (0, 0, 1)
    # ctest also calls a program skipped that it could not find.
    said_so = skipped is not None and skipped.get("message", "").startswith("SKIP_")
    if status == "disabled" or said_so:
        return 0, 0, 1
    text = case.findtext("system-out") or ""
    counted = of_output(text)
    if status == "run":
        return counted or (1, 0, 0)
    passed, failed, skipped = counted or (0, 0, 0)
    return passed, max(failed, 1), skipped


def tally(path):
    total = [0, 0, 0]
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        counts = of_case(case)
        for index, what in ((1, "failed"), (2, "skipped")):
            if counts[index]:
                print(f"{case.get('name')}: {counts[index]} {what}", file=sys.stderr)
        total = [a + b for a, b in zip(total, counts)]
    if not any(total):
        print(f"{path}: no test ran", file=sys.stderr)
        total[1] = 1
    return total


def main():
    if len(sys.argv) != 2:
        print("usage: tally.py JUNIT.xml", file=sys.stderr)
        return 2
    print(*tally(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
