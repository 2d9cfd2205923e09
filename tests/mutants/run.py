"""Runs the named tests of every known wrong variant: `python -m tests.mutants.run --help`.

One pytest session collects the tests once. They must pass on the code as it is. Then each variant
is put in place, its tests run until one fails, and the code is put back. Every named test must
notice its variant, alone, and by looking at a number: a variant that crashes with a NameError or
the like was never anybody's code.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from tqdm import tqdm

from .patching import NotApplicable, applied
from .table import VARIANTS, Variant

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # of CPU time; a test that takes longer under a variant hangs: that is noticed too
BROKEN = ("NameError", "AttributeError", "TypeError", "KeyError", "UnboundLocalError", "IndexError")
BROKEN += ("RuntimeError",)  # what torch raises for shapes that do not fit


class Campaign:
    """A pytest plugin that runs its own loop: the tests once as they are, then once a variant.

    problems: one line for each variant that survives, does not apply, or whose test is at fault
    """

    def __init__(self, variants: Sequence[Variant]):
        self.variants, self.problems, self.noticed = variants, [], 0

    def pytest_runtestloop(self, session) -> bool:
        """In place of pytest's loop over all the tests that were collected."""
        items = {name: items_of(session, name) for name in named_tests(self.variants)}
        bad = {name for name in tqdm(items, "as they are", **BAR) if not self.passes(name, items)}
        for variant in tqdm(self.variants, "variants", **BAR):
            problem = self.judge(variant, items, bad)
            self.problems += [f"{variant.id}: {problem}"] if problem else []
            self.noticed += problem is None
        return True

    def passes(self, name: str, items: dict) -> bool:
        """Whether a test is there and passes on the code as it is; notes a problem if not."""
        if not items[name]:
            self.problems.append(f"{name}: there is no such test")
            return False
        failed = first_failure(items[name])
        if failed:
            self.problems.append(f"{failed}; it fails on the code as it is")
        return not failed

    def judge(self, variant: Variant, items: dict, bad: set[str]) -> str | None:
        """What is wrong with a variant: None if each of its tests noticed it."""
        if bad & set(variant.tests):
            return f"its test is at fault: {', '.join(sorted(bad & set(variant.tests)))}"
        try:
            with applied(variant.module, variant.function, variant.old, variant.new):
                failures = {name: first_failure(items[name]) for name in variant.tests}
        except NotApplicable as error:
            return f"does not apply: {error}"
        blind = [name for name, failure in failures.items() if not failure]
        crashes = [failure for failure in failures.values() if failure and crashed(failure)]
        if blind:
            return f"survives {', '.join(blind)}"
        return f"crashes: {crashes[0]}" if crashes else None


BAR = {"file": sys.stderr, "disable": None, "leave": False}


def named_tests(variants: Sequence[Variant]) -> list[str]:
    """Every test that a variant names, once."""
    return list(dict.fromkeys(name for variant in variants for name in variant.tests))


def items_of(session, name: str) -> list:
    """The collected items of a test: one, or one for each of its parameters."""
    return [item for item in session.items if item.nodeid.split("[")[0] == name]


def first_failure(items: list) -> str | None:
    """Runs items until one fails; its node id and what was raised, None if all pass.

    Each item is torn down entirely, so that no fixture made before lives on.
    """
    for item in items:
        with time_limit(item):
            reports = runtestprotocol(item, log=False, nextitem=None)
        for report in reports:
            if report.failed:
                return f"{item.nodeid}: {raised(report)}"
    return None


def raised(report) -> str:
    """The first line of what a failed report says was raised."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().split("\n")[0]


def crashed(failure: str) -> bool:
    """Whether a failure is that of broken code and not of a wrong number."""
    # A loss that has no gradient any more is wrong, not broken: torch says so by a RuntimeError.
    without_gradient = "does not require grad" in failure
    return failure.split(": ", 1)[1].startswith(BROKEN) and not without_gradient


@contextmanager
def time_limit(item):
    """TimeoutError inside the test if it takes longer than SECONDS."""

    def stop(*_):
        raise TimeoutError(f"{item.nodeid} took longer than {SECONDS} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(variants: Sequence[Variant], root: Path = ROOT) -> Campaign:
    """Runs the campaign; raises RuntimeError if pytest could not collect the tests."""
    campaign = Campaign(variants)
    files = list(dict.fromkeys(name.split("::")[0] for name in named_tests(variants)))
    options = ["-qq", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-o", "addopts="]
    there = [str(root / name) for name in files if (root / name).is_file()]
    status = pytest.main([*options, f"--rootdir={root}", *there], plugins=[campaign])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest stopped before the variants were run, with status {status}")
    return campaign


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if every variant is noticed by each of its tests."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants.run",
        description="Puts known wrong versions of minippo's functions in place, one by one, and "
        "fails if one is not noticed by each test it names, or no longer fits the code.",
    )
    parser.add_argument("--only", nargs="+", metavar="ID", help="run these variants only")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    given = parser.parse_args(arguments)
    known = {variant.id: variant for variant in VARIANTS}
    if unknown := set(given.only or ()) - set(known):
        parser.error(f"no variant is called {', '.join(sorted(unknown))}; see --list")
    chosen = [known[name] for name in given.only or known]
    if given.list:
        print("\n".join(f"{v.id:<34}{v.module}.{v.function}: {v.misconception}" for v in chosen))
        return 0
    start = time.monotonic()
    campaign = run(chosen)
    print(f"\n{campaign.noticed} of {len(chosen)} variants noticed by every test they name", end="")
    print(f", {time.monotonic() - start:.0f} s")
    print("".join(f"  {problem}\n" for problem in campaign.problems), end="")
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
