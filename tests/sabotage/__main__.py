"""Spoils a copy of the package, edit by edit: the notebook of each has to notice.

    python -m tests.sabotage --only 07

A course whose outputs are compared is worth what the comparison would catch. For each notebook
`edits.py` lists three mistakes: a sign, a shift, a mask, or what the lesson is about. Each is made
in a copy of the package, and nbval runs the committed notebook with that copy, until the first cell
that fails. First every notebook runs with a copy that nothing was done to: it has to pass, or the
failures of the others would say nothing. And a copy that no kernel imported has shown nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import tyro
from tqdm import tqdm

from .edits import EDITS, Edit

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1200  # a notebook that takes longer hangs: an error, not a verdict
NBVAL = "-m pytest -q -x --nbval --nbval-current-env --nbval-cell-timeout=900 -p no:cacheprovider"
# What the kernel of a notebook is told; MINIPPO_MINE: no student's functions in place of ours.
ALONE = {"MINIPPO_MINE": "off", "JUPYTER_PREFER_ENV_PATH": "1", "HF_HUB_OFFLINE": "1"}
# What code raises that nobody ever had: such an edit is no mistake of a reader's.
BROKEN = ("NameError", "SyntaxError", "IndentationError", "ImportError", "AttributeError")

COLOURS = re.compile(r"\x1b\[[0-9;]*m|#x1B\[[0-9;]*m")  # of a traceback, and as XML has them


class NoVerdict(RuntimeError):
    """A run that says nothing about its edit; the message says why."""


@dataclass(frozen=True)
class Run:
    """What became of one run: where it failed and why, both empty if it passed."""

    cell: str
    reason: str
    seconds: float


def edited(source: str, edit: Edit) -> str:
    """A file's text with the edit made; NoVerdict if the old text does not stand there once."""
    if (count := source.count(edit.old)) != 1:
        message = f"{edit.old!r} stands {count} times in {edit.file}"
        raise NoVerdict(f"{message}; give the edit a text that is there once")
    return source.replace(edit.old, edit.new)


def prepare(place: Path, notebook: Path, edit: Edit | None) -> Path:
    """A copy of package and notebook in a folder; returns the file that its import leaves behind.

    The edited module itself writes it, so that one that the notebook never imports is found out.
    """
    root = notebook.parents[1]
    shutil.copytree(root / "minippo", place / "minippo", ignore=_CACHES)
    (place / "data").symlink_to(root / "data", target_is_directory=True)
    (place / "notebooks").mkdir()
    shutil.copy(notebook, place / "notebooks")
    file, witness = place / "minippo" / (edit.file if edit else "__init__.py"), place / "imported"
    text = file.read_text(encoding="utf-8")
    text = edited(text, edit) if edit else text
    file.write_text(f"{text}\nopen({str(witness)!r}, 'w').close()\n", encoding="utf-8")
    return witness


_CACHES = shutil.ignore_patterns("__pycache__")


def run(notebook: Path, edit: Edit | None = None) -> Run:
    """Runs a notebook under nbval with a copy of the package; NoVerdict if that says nothing."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="minippo-sabotage-") as folder:
        place = Path(folder)
        witness = prepare(place, notebook, edit)
        paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | ALONE | {"PYTHONPATH": os.pathsep.join(paths)}
        report = place / "report.xml"
        command = [sys.executable, *NBVAL.split(), f"--junitxml={report}", f"--rootdir={place}"]
        done = subprocess.run(
            [*command, str(place / "notebooks" / notebook.name)],
            cwd=place, env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        if done.returncode not in (0, 1):
            raise NoVerdict(f"pytest stopped with status {done.returncode}: {done.stdout[-300:]}")
        if not witness.exists():
            file = edit.file if edit else "__init__.py"
            raise NoVerdict(f"no kernel imported {file} of the copy")
        return Run(*first_failure(report), time.monotonic() - began)


def first_failure(report: Path) -> tuple[str, str]:
    """(cell, reason) of the first failure in pytest's report, empty if there is none."""
    for case in ElementTree.parse(report).iter("testcase"):
        for failure in (*case.findall("failure"), *case.findall("error")):
            return case.get("name"), reason_of(failure.text or "")
    return "", ""


def reason_of(text: str) -> str:
    """In a word: the name of what a cell raised, or that its output is another one."""
    for line in reversed(COLOURS.sub("", text).splitlines()):
        name = line.split(":")[0].strip()
        if name.isidentifier() and name.endswith(("Error", "CheckFailed", "Exception")):
            return name
    return "another output"


def problem_of(edit: Edit, found: Run) -> str:
    """What is wrong with an edit after its run; empty if its notebook noticed it."""
    if not found.cell:
        return "unnoticed"
    return f"nobody ever had such code: {found.reason}" if found.reason in BROKEN else ""


def judged(notebook: Path, edit: Edit | None) -> tuple[Run | None, str]:
    """The run with an edit (or none), and the problem with it; empty if all is as it should be."""
    try:
        found = run(notebook, edit)
    except (NoVerdict, subprocess.TimeoutExpired) as error:
        return None, f"no verdict: {error}"
    if edit is None:
        return found, f"{found.cell} fails without any edit" if found.cell else ""
    return found, problem_of(edit, found)


def campaign(edits: Sequence[Edit], root: Path, jobs: int) -> list[tuple[str, Edit | None, str]]:
    """Runs notebooks without and with the edits; prints a line for each, returns the problems."""
    books = {number: notebook_of(root, number) for number in sorted({e.notebook for e in edits})}
    tasks = [*((number, None) for number in books), *((e.notebook, e) for e in edits)]
    problems = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(judged, books[task[0]], task[1]): task for task in tasks}
        for job in tqdm(as_completed(waiting), "sabotage", len(waiting), disable=None, leave=False):
            (number, edit), (found, problem) = waiting[job], job.result()
            tqdm.write(line(number, edit, found, problem))
            problems += [(number, edit, problem)] if problem else []
    return problems


def notebook_of(root: Path, number: str) -> Path:
    """The built notebook of that number; ValueError if there is none."""
    found = sorted((root / "notebooks").glob(f"{number}_*.ipynb"))
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} notebooks {number}_*.ipynb in {root}/notebooks")
    return found[0]


def line(number: str, edit: Edit | None, found: Run | None, problem: str) -> str:
    """One row of the table."""
    file, what = (edit.file, edit.what) if edit else ("", "nothing is edited: has to pass")
    seen = "passes" if edit is None else f"{found.cell}, {found.reason}" if found else ""
    seconds = f"{found.seconds:4.0f} s" if found else ""
    return f"{number}  {file:20} {what:68} {problem.upper()[:40] or seen:28} {seconds}"


@dataclass(frozen=True)
class Settings:
    """What to try."""

    only: Annotated[tuple[str, ...], tyro.conf.arg(help="numbers of notebooks")] = ()
    jobs: int = 2  # notebooks that run at the same time


def main(settings: Settings, root: Path = ROOT, edits: Sequence[Edit] = EDITS) -> int:
    """Runs the edits; the exit status is 1 if one goes unnoticed or a run says nothing."""
    if unknown := set(settings.only) - {edit.notebook for edit in edits}:
        print(f"no edit is for notebook {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [e for e in edits if not settings.only or e.notebook in settings.only]
    problems = campaign(chosen, root, settings.jobs)
    blamed = {edit for _, edit, _ in problems if edit}
    # Where a notebook fails by itself, its failures show nothing.
    void = {number for number, edit, _ in problems if edit is None}
    noticed = sum(edit not in blamed and edit.notebook not in void for edit in chosen)
    print(f"\n{noticed} of {len(chosen)} edits noticed")
    for number, edit, problem in problems:
        print(f"  {number} {f'{edit.file}, {edit.what}' if edit else 'as it is'}: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, prog="python -m tests.sabotage", description=__doc__)))
