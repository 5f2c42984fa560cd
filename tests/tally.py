#!/usr/bin/env python3
"""Counts test cases in a JUnit file of ctest or pytest: prints "PASSED FAILED SKIPPED", and below
it each failed case's name with the first lines of what it said, for a summary.

In ctest's a GoogleTest or unittest program counts with its cases, another one as one test. A program that
failed without saying which case (a crash, a time-out, a sanitizer's report), or that did not run,
counts as one failure. No test at all is a failure too. What failed or was skipped is named on
stderr as well.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

MOST_CASES = 10  # of a file, that are printed with what they said
MOST_LINES = 12  # of a case
LONGEST_LINE = 200

GTEST_TOTAL = re.compile(r"^\[=+\] (\d+) tests? from \d+ test suites? ran\.", re.MULTILINE)
GTEST_PASSED = re.compile(r"^\[  PASSED  \] (\d+) tests?\.", re.MULTILINE)
GTEST_SKIPPED = re.compile(r"^\[  SKIPPED \] (\d+) tests?, listed below:", re.MULTILINE)
GTEST_FAILED = re.compile(r"^\[  FAILED  \] (\d+) tests?, listed below:", re.MULTILINE)
UNITTEST_TOTAL = re.compile(r"^Ran (\d+) tests? in ", re.MULTILINE)
UNITTEST_END = re.compile(r"^(OK|FAILED)(?: \(([^)]*)\))?$", re.MULTILINE)
UNITTEST_CASE = re.compile(
    r"^={70}\n(?:FAIL|ERROR): (?P<name>[^\n]+)\n(?:[^\n]+\n)*?-{70}\n"
    r"(?P<said>.*?)(?=^[=-]{70}$|\Z)",
    re.MULTILINE | re.DOTALL)


class Failure(NamedTuple):
    name: str
    said: list  # lines


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


def last(lines):
    """Of what has no beginning that counts: a traceback, a whole program's output."""
    return lines[-MOST_LINES:]


def gtest_failures(text, took):
    found, running, said = [], None, []
    for line in text.splitlines():
        if line.startswith("[ RUN      ] "):
            running, said = line.split("] ", 1)[1], []
        elif running and line.startswith(f"[  FAILED  ] {running}"):
            found.append(Failure(running, said))
            running = None
        elif line.startswith(("[       OK ] ", "[  SKIPPED ] ")):
            running = None
        else:
            said.append(line)
    if running:
        found.append(Failure(f"{running} did not end, {took}", last(said)))
    return found


def unittest_failures(text):
    return [Failure(found["name"], last(found["said"].strip().splitlines()))
            for found in UNITTEST_CASE.finditer(text)]


def failures_of_program(case):
    """What failed in a program that ctest ran, at least one."""
    name, text = case.get("name"), case.findtext("system-out") or ""
    # ctest does not tell a time-out from other failures; how long it took does.
    took = f"after {float(case.get('time', 0)):.1f} s"
    found = gtest_failures(text, took) + unittest_failures(text)
    if found:
        return [Failure(f"{name}: {one.name}", one.said) for one in found]
    return [Failure(f"{name}, {took}", last(text.strip().splitlines()))]


def failure_of_pytest(case):
    """With its id, where the file has it (junit_family=xunit1)."""
    module, path = case.get("classname", ""), case.get("file")
    if path is not None:
        # tests.test_a.TestB in tests/test_a.py
        classes = module[len(path.removesuffix(".py")):].replace(".", "::")
        module = path + classes
    verdict = case.find("failure") if case.find("failure") is not None else case.find("error")
    said = verdict.get("message", "").splitlines()[:MOST_LINES - 1]
    place = (verdict.text or "").strip().splitlines()[-1:]  # FILE:LINE: AssertionError
    return Failure(f"{module}::{case.get('name')}", said + place)


def of_case(case):
    """(passed, failed, skipped) of one <testcase>, and its failures."""
    skipped, status = case.find("skipped"), case.get("status")
    if status is None:  # pytest
        if case.find("failure") is not None or case.find("error") is not None:
            return (0, 1, 0), [failure_of_pytest(case)]
        return ((1, 0, 0) if skipped is None else (0, 0, 1)), []
    # ctest also calls a program skipped that it could not find.
    said_so = skipped is not None and skipped.get("message", "").startswith("SKIP_")
    if status == "disabled" or said_so:
        return (0, 0, 1), []
    counted = of_output(case.findtext("system-out") or "")
    if status == "run":
        return counted or (1, 0, 0), []
    failures = failures_of_program(case)
    passed, failed, skipped = counted or (0, 0, 0)
    return (passed, max(failed, len(failures)), skipped), failures


def tally(path):
    """[passed, failed, skipped], and the failures."""
    total, failures = [0, 0, 0], []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        counts, failed = of_case(case)
        if counts[2]:
            print(f"{case.get('name')}: {counts[2]} skipped", file=sys.stderr)
        for failure in failed:
            print(f"failed: {failure.name}", file=sys.stderr)
        total = [a + b for a, b in zip(total, counts)]
        failures += failed
    if not any(total):
        print(f"{path}: no test ran", file=sys.stderr)
        total[1] = 1
        failures = [Failure(f"{path}: no test ran", [])]
    return total, failures


def summary(failures):
    """The lines that a reader of the log's end needs."""
    lines = []
    for failure in failures[:MOST_CASES]:
        lines.append(failure.name)
        lines += [f"    {line[:LONGEST_LINE]}" for line in failure.said[:MOST_LINES]]
    if len(failures) > MOST_CASES:
        lines.append(f"and {len(failures) - MOST_CASES} more, named above")
    return lines


def main():
    if len(sys.argv) != 2:
        print("usage: tally.py JUNIT.xml", file=sys.stderr)
        return 2
    total, failures = tally(sys.argv[1])
    print(*total)
    for line in summary(failures):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
