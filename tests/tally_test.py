"""tally.py: what counts as passed, failed and skipped."""

import contextlib
import io
import pathlib
import sys
import tempfile
import unittest
from xml.sax.saxutils import escape

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import tally  # noqa: E402

GTEST = "[==========] 7 tests from 2 test suites ran. (5 ms total)\n[  PASSED  ] 4 tests.\n"


GTEST_CASES = """[ RUN      ] Pool.Lends
[       OK ] Pool.Lends (1 ms)
[ RUN      ] Pool.Frees/3
tests/pool_test.cc:7: Failure
Expected equality of these values: 1 & 2
[  FAILED  ] Pool.Frees/3, where GetParam() = 3 (0 ms)
[ RUN      ] Pool.Grows
"""
UNITTEST_CASES = f"""F.
{"=" * 70}
FAIL: test_b (a_test.A.test_b)
What it is.
{"-" * 70}
Traceback (most recent call last):
  File "a_test.py", line 3, in test_b
AssertionError: 1 != 2

{"=" * 70}
ERROR: test_c (a_test.A.test_c)
{"-" * 70}
ValueError: no

{"-" * 70}
Ran 3 tests in 0.1s

FAILED (failures=1, errors=1)
"""


def case(status, output="", inner=""):
    return (f'<testcase name="t" status="{status}" time="1.5">{inner}'
            f"<system-out>{escape(output)}</system-out></testcase>")


def read(*cases):
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(f"<testsuite>{''.join(cases)}</testsuite>")
        file.flush()
        with contextlib.redirect_stderr(io.StringIO()):
            return tally.tally(file.name)


def count(*cases):
    return tuple(read(*cases)[0])


def failures(*cases):
    return [tuple(failure) for failure in read(*cases)[1]]


class Tally(unittest.TestCase):
    def test_counts_the_cases_of_googletest_programs(self):
        output = GTEST + "[  SKIPPED ] 1 test, listed below:\n[  FAILED  ] 2 tests, listed below:\n"
        self.assertEqual(count(case("fail", output)), (4, 2, 1))

    def test_counts_the_cases_of_unittest_programs(self):
        self.assertEqual(count(case("run", "Ran 5 tests in 0.1s\n\nOK (skipped=2)\n")), (3, 0, 2))
        self.assertEqual(
            count(case("fail", "Ran 5 tests in 0.1s\n\nFAILED (failures=1, errors=2)\n")),
            (2, 3, 0))

    def test_counts_any_other_program_once(self):
        self.assertEqual(count(case("run", "hello"), case("fail", "hello")), (1, 1, 0))

    def test_a_crash_after_passing_cases_is_a_failure(self):
        self.assertEqual(count(case("fail", GTEST)), (4, 1, 0))

    def test_what_did_not_run_is_a_failure(self):
        missing = case("notrun", inner='<skipped message="Unable to find executable"/>')
        self.assertEqual(count(missing), (0, 1, 0))

    def test_what_said_that_it_skips_is_skipped(self):
        said = case("notrun", inner='<skipped message="SKIP_RETURN_CODE=77"/>')
        self.assertEqual(count(said, case("disabled")), (0, 0, 2))

    def test_no_test_at_all_is_a_failure(self):
        self.assertEqual(count(), (0, 1, 0))

    def test_reads_what_pytest_writes(self):
        self.assertEqual(
            count('<testcase name="a"/>', '<testcase name="b"><failure/></testcase>',
                  '<testcase name="c"><error/></testcase>',
                  '<testcase name="d"><skipped type="pytest.skip"/></testcase>'),
            (1, 2, 1))


class Failures(unittest.TestCase):
    def test_a_googletest_case_is_named_with_what_it_said(self):
        self.assertEqual(
            failures(case("fail", GTEST_CASES)),
            [("t: Pool.Frees/3", ["tests/pool_test.cc:7: Failure",
                                  "Expected equality of these values: 1 & 2"]),
             ("t: Pool.Grows did not end, after 1.5 s", [])])

    def test_what_failed_before_a_crash_counts_beside_it(self):
        self.assertEqual(count(case("fail", GTEST_CASES)), (0, 2, 0))

    def test_a_unittest_case_is_named_with_the_end_of_its_traceback(self):
        self.assertEqual(
            failures(case("fail", UNITTEST_CASES)),
            [("t: test_b (a_test.A.test_b)", ["Traceback (most recent call last):",
                                              '  File "a_test.py", line 3, in test_b',
                                              "AssertionError: 1 != 2"]),
             ("t: test_c (a_test.A.test_c)", ["ValueError: no"])])

    def test_a_program_that_names_no_case_shows_its_end(self):
        lines = [f"line {i}" for i in range(40)]
        self.assertEqual(
            failures(case("fail", "\n".join(lines))),
            [("t, after 1.5 s", lines[-tally.MOST_LINES:])])

    def test_a_program_that_is_not_there_is_named(self):
        missing = case("notrun", "Unable to find executable: t")
        self.assertEqual(failures(missing), [("t, after 1.5 s", ["Unable to find executable: t"])])

    def test_a_pytest_case_has_its_id_its_message_and_its_place(self):
        self.assertEqual(
            failures('<testcase classname="tests.test_a.TestB" name="test_c[1]" '
                     'file="tests/test_a.py"><failure message="assert 1 == 2">def test_c():\n'
                     "&gt;   assert 1 == 2\n\ntests/test_a.py:4: AssertionError"
                     "</failure></testcase>",
                     '<testcase classname="tests.test_a" name="test_d"><error message="no fixture">'
                     "</error></testcase>"),
            [("tests/test_a.py::TestB::test_c[1]",
              ["assert 1 == 2", "tests/test_a.py:4: AssertionError"]),
             ("tests.test_a::test_d", ["no fixture"])])

    def test_what_passed_or_was_skipped_is_not_named(self):
        self.assertEqual(failures(case("run", GTEST), case("disabled"), '<testcase name="a"/>'), [])

    def test_a_summary_is_bounded(self):
        said = [str(i) * 300 for i in range(30)]
        lines = tally.summary([tally.Failure(f"case {i}", said) for i in range(13)])
        self.assertEqual(len(lines), tally.MOST_CASES * (1 + tally.MOST_LINES) + 1)
        self.assertEqual(lines[0], "case 0")
        self.assertEqual(lines[1], "    " + "0" * tally.LONGEST_LINE)
        self.assertEqual(lines[-1], "and 3 more, named above")


if __name__ == "__main__":
    unittest.main()
