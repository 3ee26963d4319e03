"""Extended fuzzing: the properties in tests/pipeline/test_fuzz.py with many more cases.

    python -m benchmarks.fuzz                       100,000 cases: half an hour on a busy core
    python -m benchmarks.fuzz --times 38 --seed 7   repeats the cases of a run with seed 7

Prints a row for each property: the number of cases, whether it failed, and the time in seconds.
Above the table, hypothesis shows the smallest input of each failure. The exit status is 1 if there
is a failure.
"""

import argparse
import os
import random
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "tests/pipeline/test_fuzz.py"


class Outcomes:
    """A pytest plugin that collects the outcome of each test."""

    def __init__(self) -> None:
        self.reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.reports.append(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--times", type=float, default=38, help="multiplies the test suite's number of cases"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    os.environ["FUZZ_CASES"] = str(options.times)
    seed = f"--hypothesis-seed={options.seed}"
    print(f"seed {options.seed}", flush=True)
    outcomes = Outcomes()
    status = pytest.main(
        ["-n", "0", "-p", "no:cacheprovider", "-q", "--tb=short", seed, str(TESTS)], [outcomes]
    )
    if TESTS.stem not in sys.modules:  # the tests could not be imported
        sys.exit(status)
    cases = sys.modules[TESTS.stem].CASES
    print(f"\n{'property':<72}{'cases':>9}{'failed':>8}{'seconds':>9}")
    for report in outcomes.reports:
        name = report.nodeid.rpartition("::")[2]
        shown = name.removeprefix("test_").replace("_", " ")
        print(f"{shown:<72}{cases[name]:>9,}{report.failed:>8}{report.duration:>9.1f}")
    seconds = sum(report.duration for report in outcomes.reports)
    failures = sum(report.failed for report in outcomes.reports)
    print(f"{f'seed {options.seed}':<72}{cases.total():>9,}{failures:>8}{seconds:>9.1f}")
    sys.exit(status)


if __name__ == "__main__":
    main()
