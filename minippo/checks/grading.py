"""Grading a notebook: it is run anew, and what its checks passed is checked once more outside it.

The notebook runs in a kernel of its own, in an empty folder, with MINIPPO_GRADE set: there a check
writes its verdict to a file, raises nothing, and hands back minippo's own function where the
student's is not right, so that one exercise does not decide on the next. A cell that fails does not
stop the run. What a verdict calls solved counts only if the function, from the source that the
check saved, passes again in a process that never saw the notebook.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from minippo.checks import saving
from minippo.checks.checking import GRADE_VARIABLE
from minippo.checks.own import EXERCISES, verified
from minippo.engine.files import write_file

CALL = re.compile(r"\bcheck_(\w+)\b")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback
RECHECK_SECONDS = 300
UNSAVED = "It could not be checked again outside the notebook."


def grade(path: Path, timeout: int = 120, expect: Iterable[str] = ()) -> list[dict[str, str]]:
    """Runs a notebook and says for each exercise: {"exercise", "result", "sentence"}.

    path: the student's .ipynb; it is read only
    timeout: seconds for one cell, which is interrupted then
    expect: functions that have to be there, also if their checks were taken out of the notebook
    returns: one dict per function whose check the notebook names, in that order, then the other
        expected ones; result is solved, wrong, unwritten, or "not checked" where minippo's check
        never saw the function
    Raises ValueError if the file is no notebook or names no check, or if an expected one has none.
    """
    if unknown := [name for name in expect if name not in EXERCISES]:
        known = ", ".join(EXERCISES)
        raise ValueError(f"there is no check of {', '.join(unknown)}, only of {known}")
    notebook = _read(path)
    code = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    names = list(dict.fromkeys([*exercises(code), *expect]))
    if not names:
        raise ValueError(f"{path} has no exercise: no cell calls a check, such as check_gae(gae)")
    with tempfile.TemporaryDirectory(prefix="minippo-grade-") as folder:
        verdicts, mine = Path(folder) / "verdicts.jsonl", Path(folder) / "mine.py"
        stop = _run(notebook, Path(folder), verdicts, mine, timeout)
        found = {name: _not_checked(name, notebook, stop) for name in names}
        found |= {v["exercise"]: v for v in _lines(verdicts) if v["exercise"] in found}
        found |= _recheck([v for v in found.values() if v["result"] == "solved"], mine)
    return list(found.values())


def exercises(sources: Iterable[str]) -> list[str]:
    """The functions whose checks some code names, in order and once each."""
    names = [name for source in sources for name in CALL.findall(source) if name in EXERCISES]
    return list(dict.fromkeys(names))


def table(verdicts: list[dict[str, str]]) -> str:
    """The verdicts as lines of text, the count last."""
    wide = max(len(v["exercise"]) for v in verdicts)
    lines = [f"{v['exercise']:<{wide}}  {v['result']:<11}  {v['sentence']}" for v in verdicts]
    solved = sum(v["result"] == "solved" for v in verdicts)
    return "\n".join([*lines, f"solved {solved} of {len(verdicts)}"])


def all_solved(verdicts: list[dict[str, str]]) -> bool:
    """Whether every exercise is solved."""
    return all(verdict["result"] == "solved" for verdict in verdicts)


def write_json(path: Path, notebook: Path, verdicts: list[dict[str, str]]) -> None:
    """Writes the verdicts: {"notebook", "solved", "of", "exercises": [...]}."""
    solved = sum(verdict["result"] == "solved" for verdict in verdicts)
    summary = {"notebook": notebook.name, "solved": solved, "of": len(verdicts)}
    text = json.dumps(summary | {"exercises": verdicts}, indent=2) + "\n"
    write_file(path, text.encode())


def _read(path: Path):
    try:
        import nbclient  # noqa: F401  said here, before anything is read
        import nbformat
    except ImportError as error:
        message = 'grading runs notebooks: pip install "minippo[course]"'
        raise ValueError(f"{message} ({error})") from error
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (OSError, ValueError, AttributeError, KeyError, nbformat.ValidationError) as error:
        short = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no notebook that can be read: {short}") from error
    return notebook


def _run(notebook, folder: Path, verdicts: Path, mine: Path, timeout: int) -> str:
    """Runs all cells; why it stopped before the last one, empty if it did not."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    settings = {GRADE_VARIABLE: str(verdicts), saving.VARIABLE: str(mine), "TQDM_DISABLE": "1"}
    work = folder / "work"
    work.mkdir()
    with tqdm(total=len(code), desc="grade", unit="cell", file=sys.stderr) as bar:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            interrupt_on_timeout=True,
            allow_errors=True,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(work)}},
            on_cell_executed=lambda **_: bar.update(),
        )
        try:
            client.execute(env=_environment() | settings)
        except (CellTimeoutError, DeadKernelError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def _environment() -> dict[str, str]:
    """This process's environment, in which Python finds this very minippo, whatever the folder."""
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "JUPYTER_PREFER_ENV_PATH": "1"}
    return {k: v for k, v in os.environ.items() if k != GRADE_VARIABLE} | settings


def _not_checked(name: str, notebook, stop: str) -> dict[str, str]:
    """The verdict on an exercise whose check left none, with the error that kept it from it."""
    sentence = f"check_{name} of minippo never ran on it."
    errors = [
        f"{output.ename}: {output.evalue}"
        for cell in notebook.cells
        if cell.cell_type == "code" and f"check_{name}" in cell.source
        for output in cell.outputs
        if output.output_type == "error"
    ]
    where = "The cell that calls it" if errors else "The run"
    if why := " ".join(COLOURS.sub("", (errors or [stop])[0]).split())[:200]:
        sentence += f" {where} ended with {why}"
    return {"exercise": name, "result": "not checked", "sentence": sentence}


def _lines(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _recheck(solved: list[dict[str, str]], mine: Path) -> dict[str, dict[str, str]]:
    """New verdicts on functions that were solved, from their source and in a new process."""
    if not solved:
        return {}
    answer = mine.with_name("answer.json")
    names = [verdict["exercise"] for verdict in solved]
    command = [sys.executable, "-m", "minippo.checks.grading", str(answer), *names]
    settings = _environment() | {saving.VARIABLE: str(mine)}
    with contextlib.suppress(subprocess.TimeoutExpired):  # then there is no answer
        subprocess.run(command, env=settings, timeout=RECHECK_SECONDS, capture_output=True)
    doubts = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}
    verdicts = {}
    for verdict in solved:
        name = verdict["exercise"]
        doubt = doubts.get(name, "It ended the process in which it was checked again.")
        if doubt == UNSAVED:
            doubt += f" {verdict['sentence']}"
        verdicts[name] = verdict | {"sentence": f"{name} is right."}
        if doubt:
            verdicts[name] = verdict | {"result": "wrong", "sentence": doubt}
    return verdicts


def _doubts(names: list[str]) -> dict[str, str]:
    """For every function what speaks against it, empty where it is right."""
    saved = saving.sections()
    return {name: verified(name, saved)[1] if name in saved else UNSAVED for name in names}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(_doubts(sys.argv[2:])), encoding="utf-8")
