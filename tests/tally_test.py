"""tally.py: what counts as passed, failed and skipped."""

import contextlib
import io
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import tally  # noqa: E402

GTEST = "[==========] 7 tests from 2 test suites ran. (5 ms total)\n[  PASSED  ] 4 tests.\n"


def case(status, output="", inner=""):
    return (f'<testcase name="t" status="{status}">{inner}'
            f"<system-out>{output}</system-out></testcase>")


def count(*cases):
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(f"<testsuite>{''.join(cases)}</testsuite>")
        file.flush()
        with contextlib.redirect_stderr(io.StringIO()):
            return tuple(tally.tally(file.name))


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


if __name__ == "__main__":
    unittest.main()
