"""Builds the notebooks of the course from their sources, and checks that they are not stale.

notebooks/src/NN_name.py (jupytext percent format) is what people edit. From it come

    notebooks/NN_name.ipynb            every cell run, outputs kept
    notebooks/exercises/NN_name.ipynb  what a student gets: solutions taken out, no outputs

The second exists only where the source has solution regions:

    ### BEGIN SOLUTION
    return (x * mask).sum() / mask.sum()
    ### END SOLUTION

A region becomes one line that raises NotImplementedError; a cell tagged `solution` is left out.
Ids and metadata follow from the source alone, so two builds of one source give the same bytes.

    python notebooks/build.py              build all
    python notebooks/build.py --only 03    build notebook 03
    python notebooks/build.py --check      run nothing; say which files are stale
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = 'raise NotImplementedError("write this, then run the next cell")'
SKIP = "nbval-skip"  # the tag by which nbval, and so this script, leaves a cell unrun
CELL_SECONDS = 900  # the limit of `make notebooks` too
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


# --- from a source to its two notebooks -----------------------------------------------------


def read_source(path: Path) -> NotebookNode:
    """The notebook that a source describes: no outputs, ids and metadata from the source alone."""
    return with_ids(canonical(jupytext.read(path, fmt="py:percent")))


def read_pair(source: Path) -> tuple[NotebookNode, NotebookNode | None]:
    """What `read_source` and `exercise` make of a source; a mistake in it names the file."""
    notebook = read_source(source)
    try:
        return notebook, exercise(notebook)
    except ValueError as error:
        raise ValueError(f"src/{source.name}: {error}") from None


def with_ids(notebook: NotebookNode) -> NotebookNode:
    """Gives each cell eight digits of the hash of its type and source; twins differ by order."""
    seen: set[str] = set()
    for cell in notebook.cells:
        text, twin = f"{cell.cell_type}\n{cell.source}", 0
        while (digest := hashlib.sha1(f"{text}\n{twin}".encode()).hexdigest()[:8]) in seen:
            twin += 1
        cell.id = digest
        seen.add(digest)
    return notebook


def canonical(notebook: NotebookNode) -> NotebookNode:
    """The same notebook without what differs from machine to machine or from run to run."""
    notebook.metadata = NotebookNode(
        kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python")
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        for key in ("execution", "collapsed", "scrolled", "lines_to_next_cell"):
            cell.metadata.pop(key, None)
    return notebook


def exercise(notebook: NotebookNode) -> NotebookNode | None:
    """The student's copy, or None where the notebook has no solution region to take out."""
    copy = nbformat.from_dict(notebook)
    if not any(BEGIN in cell.source or END in cell.source for cell in code_cells(copy)):
        return None
    copy.cells = [cell for cell in copy.cells if "solution" not in tags(cell)]
    for cell in code_cells(copy):
        cell.source = without_solutions(cell.source)
        cell.outputs, cell.execution_count = [], None
    return with_ids(copy)


def without_solutions(source: str) -> str:
    """The source of a cell with each solution region replaced by the stub, at its indentation."""
    kept, inside = [], False
    for line in source.split("\n"):
        marker, indent = line.strip(), line[: len(line) - len(line.lstrip())]
        if marker not in (BEGIN, END):
            kept += [] if inside else [line]
            continue
        if inside == (marker == BEGIN):
            raise ValueError(f"'{marker}' does not pair up: a region is one BEGIN, then one END")
        if marker == BEGIN and not indent:
            raise ValueError(f"'{BEGIN}' must stand inside a function: a copy runs unsolved")
        kept += [indent + STUB] if marker == BEGIN else []
        inside = not inside
    if inside:
        raise ValueError(f"'{BEGIN}' without '{END}'")
    return "\n".join(kept)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def runs(cell: NotebookNode) -> bool:
    """Whether building a notebook runs this cell."""
    return cell.cell_type == "code" and bool(cell.source.strip()) and SKIP not in tags(cell)


# --- building ---------------------------------------------------------------------------------


def build(source: Path, folder: Path) -> None:
    """Runs one source and writes its notebooks; a cell that fails leaves the files as they were."""
    notebook, copy = read_pair(source)
    write(execute(notebook, folder, source.stem), folder / f"{source.stem}.ipynb")
    target = folder / "exercises" / f"{source.stem}.ipynb"
    if copy is None:
        target.unlink(missing_ok=True)
    else:
        target.parent.mkdir(exist_ok=True)
        write(copy, target)


def execute(notebook: NotebookNode, folder: Path, name: str) -> NotebookNode:
    """Runs every cell in a fresh kernel whose working directory is the notebook's folder."""
    # Without this a kernel "python3" of the user's would win over that of this environment.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ["MINIPPO_MINE"] = "off"  # outputs must not depend on what a student has written
    total = sum(runs(cell) for cell in notebook.cells)
    with tqdm(total=total, desc=name, unit="cell", file=sys.stderr) as bar:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],  # of the kernel's own log, not of the cells
            skip_cells_with_tag=SKIP,
            resources={"metadata": {"path": str(folder)}},
            on_cell_executed=lambda **_: bar.update(),
        )
        return canonical(client.execute())


def write(notebook: NotebookNode, path: Path) -> None:
    """Writes a valid notebook, whole or not at all."""
    nbformat.validate(notebook)
    part = path.with_suffix(".part")
    part.write_text(text_of(notebook), encoding="utf-8")
    part.replace(path)


def text_of(notebook: NotebookNode) -> str:
    """The text of a notebook file."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


# --- checking ---------------------------------------------------------------------------------


def stale(source: Path, folder: Path) -> list[str]:
    """What is out of date in the two notebooks of a source: one line each, none where all is well.

    Outputs are not looked at: comparing them needs a run, and nbval does that.
    """
    notebook, copy = read_pair(source)
    found = []
    built = folder / f"{source.stem}.ipynb"
    reason = cells_differ(notebook, built) if built.exists() else "was never built"
    if reason:
        found.append(f"{built.name} {reason}")
    target = folder / "exercises" / f"{source.stem}.ipynb"
    committed = target.read_text(encoding="utf-8") if target.exists() else ""
    if committed != (text_of(copy) if copy else ""):
        found.append(f"exercises/{target.name} is not what the source gives")
    return found


def cells_differ(notebook: NotebookNode, built: Path) -> str:
    """How the cells of a built notebook differ from those of its source; empty if they do not."""
    try:
        cells = nbformat.read(built, as_version=4).cells
    except ValueError as error:  # JSON and validation errors alike
        return f"is not a notebook: {error}"
    if len(cells) != len(notebook.cells):
        return f"has {len(cells)} cells, its source {len(notebook.cells)}"
    for number, (wanted, cell) in enumerate(zip(notebook.cells, cells, strict=True)):
        if identity(wanted) != identity(cell):
            return f"differs from its source in cell {number}"
        if runs(wanted) and cell.execution_count is None:
            return f"has a cell that was never run: cell {number}"
    return ""


def identity(cell: NotebookNode) -> tuple:
    """What a built cell has in common with its source."""
    return cell.cell_type, cell.source, tags(cell), cell.get("id")


def orphans(folder: Path) -> list[str]:
    """Notebooks that no source describes."""
    files = [*folder.glob("*.ipynb"), *folder.glob("exercises/*.ipynb")]
    missing = [file for file in files if not (folder / "src" / f"{file.stem}.py").exists()]
    return [str(file.relative_to(folder)) for file in sorted(missing)]


def check(sources: list[Path], folder: Path) -> int:
    """Prints every stale file and what mends it; returns the exit status."""
    failed = False
    for source in sources:
        for line in problems(source, folder):
            failed = True
            print(f"stale: {line}\n  mend it with: python notebooks/build.py --only {source.stem}")
    for name in orphans(folder):
        failed = True
        print(f"stale: {name} has no source in src/\n  mend it with: git rm notebooks/{name}")
    print(f"{len(sources)} sources checked: " + ("STALE" if failed else "all up to date"))
    return int(failed)


def problems(source: Path, folder: Path) -> list[str]:
    """What `stale` finds, or the mistake in the source that keeps it from being read."""
    try:
        return stale(source, folder)
    except ValueError as error:
        return [str(error)]


# --- the command line -------------------------------------------------------------------------


def select(folder: Path, only: str | None) -> list[Path]:
    """The sources whose name is, or begins with, `only`; all of them where it is None."""
    sources = sorted((folder / "src").glob("*.py"))
    if only is None:
        return sources
    chosen = [source for source in sources if source.stem.startswith(Path(only).stem)]
    if not chosen:
        names = ", ".join(source.stem for source in sources) or "none"
        raise ValueError(f"no source begins with '{only}'; there are: {names}")
    return chosen


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
    """Builds or checks the notebooks of a folder; returns the exit status."""
    parser = argparse.ArgumentParser(description="Builds the notebooks from notebooks/src.")
    parser.add_argument("--check", action="store_true", help="run nothing, say what is stale")
    parser.add_argument("--only", metavar="NN", help="only the notebook whose name begins so")
    options = parser.parse_args(arguments)
    try:
        sources = select(folder, options.only)
        if options.check:
            return check(sources, folder)
        for source in sources:
            build(source, folder)
    except (ValueError, CellExecutionError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
