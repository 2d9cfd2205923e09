"""Does minippo work with other versions of what it stands on? Tried in a virtual environment anew.

    python -m tests.versions lowest                  the lowest that pyproject.toml allows
    python -m tests.versions newest --python 3.13    the newest of everything, with that Python

runs the unit tests, and the lessons, whose cells have to run and whose claims have to hold. Where
an output is not the committed one, the cell is listed: another version may initialise a model
otherwise. The environment stays in .venv-lowest or .venv-newest, to be looked at. Exit status 0 if
all of it passed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
PYTEST = ("pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider")
NBVAL = (*PYTEST, "--nbval-current-env", "--nbval-cell-timeout=900")


def make_environment(folder: Path, which: str, python: str) -> Path:
    """A new virtual environment with minippo in it; the path of its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    uv = [sys.executable, "-m", "uv"]
    interpreter = folder / "bin" / "python"
    venv = ["venv", "--quiet", "--no-python-downloads", "--python", python, str(folder)]
    where = ["--python", str(interpreter), "--resolution", RESOLUTION[which]]
    for command in (venv, ["pip", "install", *where, "--editable", ".[course,test]"]):
        subprocess.run([*uv, *command], check=True, cwd=ROOT)
    return interpreter


def installed(interpreter: Path) -> dict[str, str]:
    """Name and version of what minippo asks for itself, as installed there."""
    code = (
        "import importlib.metadata as m, json, re; "
        "names = {re.match(r'[\\w-]+', r)[0] for r in m.requires('minippo') if 'extra' not in r or "
        "'course' in r or 'test' in r}; "
        "print(json.dumps({n: m.version(n) for n in sorted(names)}))"
    )
    ran = subprocess.run([str(interpreter), "-c", code], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def run(name: str, interpreter: Path, *command: str) -> bool:
    """Whether the command passed; what it prints is shown."""
    print(f"== {name}", flush=True)
    settings = os.environ | {"MINIPPO_MINE": "off", "JUPYTER_PREFER_ENV_PATH": "1"}
    began = time.monotonic()
    status = subprocess.run([str(interpreter), "-m", *command], cwd=ROOT, env=settings).returncode
    print(f"== {name}: {time.monotonic() - began:.0f} s, exit status {status}", flush=True)
    return status == 0


def cells_of(report: Path) -> tuple[list[str], list[str]]:
    """From the report of a strict run: the cells with other outputs, and those that do not run."""
    differ, fail = [], []
    for case in ElementTree.parse(report).iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            of_output = "Cell outputs differ" in (problem.text or "")
            (differ if of_output else fail).append(f"{case.get('classname')}: {case.get('name')}")
    return differ, fail


def main() -> int:
    """Makes the environment, runs everything, sums up."""
    parser = argparse.ArgumentParser(description="Tries minippo with other versions.")
    parser.add_argument("which", choices=RESOLUTION, help="which versions that pyproject allows")
    parser.add_argument("--python", default="3.11", help="a version, or a path to an interpreter")
    options = parser.parse_args()
    folder = ROOT / f".venv-{options.which}"
    interpreter, report = make_environment(folder, options.which, options.python), folder / "cells"
    lessons = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("notebooks/*.ipynb"))
    unit = run("unit tests", interpreter, *PYTEST, "-m", "not integration", "tests")
    to_file = f"--junitxml={report}"
    same = run("lessons", interpreter, *NBVAL, "--nbval", "--tb=no", to_file, *lessons)
    differ, fail = cells_of(report)
    if not same and not differ and not fail:
        fail = ["none was run"]
    print(f"== {options.which}: Python {options.python}", end=", ")
    print(", ".join(f"{name} {version}" for name, version in installed(interpreter).items()))
    print(f"unit tests {'pass' if unit else 'FAIL'}; cells with other outputs: {len(differ)}")
    print("".join(f"  {cell}\n" for cell in differ), end="")
    print(f"cells that do not run, or whose claim does not hold: {len(fail)}")
    print("".join(f"  {cell}\n" for cell in fail), end="")
    return 0 if unit and not fail else 1


if __name__ == "__main__":
    sys.exit(main())
