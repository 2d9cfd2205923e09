"""The committed notebooks are clean: valid, run once from top to bottom, free of their machine.

Nothing is run here; nbval compares the outputs (`make notebooks`).
"""

import re
import statistics
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
BUILT = sorted(FOLDER.glob("*.ipynb"))
EXERCISES = sorted(FOLDER.glob("exercises/*.ipynb"))
MAX_BYTES = 1_500_000
MAX_CELL_LINES = 20

# What differs from machine to machine or from run to run has no place in a stored output.
MACHINE = re.compile(
    r"/home/\w|/Users/\w|/root/|[A-Z]:\\Users|site-packages|/tmp/|\b0x[0-9a-f]{6,}|it/s\]|s/it\]"
)

built = pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
exercises = pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
every = pytest.mark.parametrize(
    "path", BUILT + EXERCISES, ids=lambda path: str(path.relative_to(FOLDER))
)


def read(path):
    """The notebook in a file."""
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    """The code cells with something in them."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def tags(cell):
    """The tags of a cell, as a set."""
    return set(cell.metadata.get("tags", []))


def texts(cell):
    """Every text that a cell's outputs show."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (
            data for kind, data in output.get("data", {}).items() if kind.startswith("text/")
        )


@every
def test_notebook_is_valid_small_and_has_unique_ids(path):
    notebook = read(path)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    assert path.stat().st_size < MAX_BYTES


@every
def test_notebook_metadata_tells_nothing_of_the_machine(path):
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata.language_info) == {"name"}
    assert not [cell.id for cell in notebook.cells if "execution" in cell.metadata]


@every
def test_code_cells_can_be_taken_in_at_a_glance(path):
    lengths = {cell.id: cell.source.count("\n") + 1 for cell in code_cells(read(path))}
    assert not {cell: lines for cell, lines in lengths.items() if lines > MAX_CELL_LINES}


@built
def test_built_notebook_ran_once_from_top_to_bottom(path):
    cells = [cell for cell in code_cells(read(path)) if "nbval-skip" not in tags(cell)]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@built
def test_only_cells_that_say_so_may_end_in_an_error(path):
    failed = [
        cell.id
        for cell in code_cells(read(path))
        if any(output.output_type == "error" for output in cell.outputs)
        and not tags(cell) & {"raises-exception", "nbval-raises-exception"}
    ]
    assert not failed


@built
def test_outputs_hold_nothing_of_the_machine_or_the_moment(path):
    found = [
        f"cell {cell.id}: {match[0]}"
        for cell in code_cells(read(path))
        for text in texts(cell)
        if (match := MACHINE.search(text))
    ]
    assert not found


def lines_of_code(cell) -> int:
    """Lines of a cell that hold code: no comment, no blank."""
    return sum(bool(x.strip()) and not x.strip().startswith("#") for x in cell.source.split("\n"))


@built
def test_most_cells_are_compared_by_nbval_and_most_of_those_print(path):
    """A comparison of nothing passes always: cells that ignore their output, or have none."""
    cells = code_cells(read(path))
    compared = [cell for cell in cells if not tags(cell) & {"nbval-ignore-output", "nbval-skip"}]
    printing = [cell for cell in compared if any(text.strip() for text in texts(cell))]
    assert len(compared) >= 0.85 * len(cells), f"{len(compared)} of {len(cells)}"
    assert len(printing) >= 0.6 * len(cells), f"{len(printing)} of {len(cells)}"
    assert statistics.median(map(lines_of_code, cells)) <= 9


@exercises
def test_exercise_is_unsolved_and_unrun(path):
    cells = code_cells(read(path))
    assert not [cell.id for cell in cells if cell.outputs or cell.execution_count is not None]
    assert not [cell.id for cell in cells if "BEGIN SOLUTION" in cell.source]
    assert any("raise NotImplementedError" in cell.source for cell in cells)
