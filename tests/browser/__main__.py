"""Opens notebooks in JupyterLab in Chromium, runs them from top to bottom, and takes pictures.

    python -m tests.browser --only 03 --out /tmp/pictures

For looking at what a reader sees: NAME-01.png and so on are the notebook from top to bottom, a
screen each, after all cells have run. Whatever differs from the committed notebook is said.
Chromium and its driver come from the system (Debian: apt install chromium chromium-driver).
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import nbformat
import tyro
from tqdm import tqdm

from .lab import Lab, differences, missing

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
HELP = {
    "only": "notebooks whose names begin so, with commas between; all if left out",
    "exercises": "the students' notebooks instead, unsolved",
    "out": "the folder for the pictures",
}


def main(
    only: Annotated[str, tyro.conf.arg(help=HELP["only"])] = "",
    exercises: Annotated[bool, tyro.conf.arg(help=HELP["exercises"])] = False,
    out: Annotated[Path, tyro.conf.arg(help=HELP["out"])] = Path("pictures"),
) -> None:
    """Runs notebooks in JupyterLab and takes pictures; ends with 1 if one shows something else."""
    if lacking := missing():
        raise SystemExit(f"cannot open a browser: {lacking}")
    folder = NOTEBOOKS / "exercises" if exercises else NOTEBOOKS
    names = tuple(filter(None, only.split(",")))
    chosen = [p for p in sorted(folder.glob("*.ipynb")) if not names or p.name.startswith(names)]
    if not chosen:
        raise SystemExit(f"no notebook in {folder} begins with {only!r}")
    out.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory() as home, Lab(chosen, Path(home)) as lab:
        for path in tqdm(chosen, unit="notebook"):
            shown = lab.run(path.name)
            lab.pictures(out / path.stem)
            committed = nbformat.read(path, as_version=4)
            problems = differences(shown, committed, compare=not exercises)
            found += [f"{path.name}: {problem}" for problem in problems]
    print("\n".join(found) or f"{len(chosen)} notebooks, all as committed")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    tyro.cli(main)
