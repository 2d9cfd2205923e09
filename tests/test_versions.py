"""`make portable` says when it would show nothing, `make minimums` what fails and what differs."""

import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import versions

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "Makefile").is_file():
    pytest.skip("the Makefile is not here: these tests need a checkout", allow_module_level=True)

# What pytest writes of four cells under nbval: right, another output, an exception, a time-out.
REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest">
<testcase classname="notebooks.06.ipynb" name="Cell 5" />
<testcase classname="notebooks.06.ipynb" name="Cell 6"><failure message="x">Notebook cell execution
failed Cell 6: Cell outputs differ Input: print(1)</failure></testcase>
<testcase classname="notebooks.06.ipynb" name="Cell 7"><failure message="x">Notebook cell execution
failed Cell 7: Cell execution caused an exception Input: assert 1 == 2</failure></testcase>
<testcase classname="notebooks.07.ipynb" name="Cell 9"><error message="x">Cell 9: Timeout of 300
seconds exceeded while executing cell.</error></testcase>
</testsuite></testsuites>"""


def test_without_other_kernels_the_probe_says_so_and_exits_with_2():
    plain = {name: value for name, value in os.environ.items() if name not in kernels.VARIABLES}
    command = [sys.executable, "-m", "tests.kernels"]
    ran = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    assert ran.returncode == 2 and "would show nothing" in ran.stdout


@pytest.mark.parametrize("same", ["float32 product", "float64 exponential"])
def test_all_of_them_have_to_differ(monkeypatch, capsys, same):
    plain = kernels.bits()
    other = {name: digest[::-1] for name, digest in plain.items()}
    monkeypatch.setattr(sys, "argv", ["kernels"])
    monkeypatch.setattr(kernels, "bits_without", lambda: other)
    assert kernels.main() == 0 and "other kernels are in force" in capsys.readouterr().out
    monkeypatch.setattr(kernels, "bits_without", lambda: other | {same: plain[same]})
    assert kernels.main() == 2 and f"{same}: the same bits" in capsys.readouterr().out


def test_the_makefile_sets_the_variables_that_the_probe_looks_at():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = [line for line in makefile.splitlines() if line.startswith("OTHER_KERNELS :=")]
    assert [part.split("=")[0] for part in line.split()[2:]] == list(kernels.VARIABLES)


def test_a_cell_that_prints_something_else_is_told_from_one_that_does_not_run(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT, encoding="utf-8")
    differ, fail = versions.cells_of(report)
    assert differ == ["notebooks.06.ipynb: Cell 6"]
    assert fail == ["notebooks.06.ipynb: Cell 7", "notebooks.07.ipynb: Cell 9"]


def test_that_is_what_nbval_says(tmp_path):
    """Three cells: one prints what is stored, one something else, one does not run."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbval")
    cells = [nbformat.v4.new_code_cell(code) for code in ("print(1)", "print(2)", "assert 1 == 2")]
    for number, (cell, text) in enumerate(zip(cells, ("1\n", "3\n", "4\n")), 1):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("stream", text=text)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "three.ipynb")
    report = tmp_path / "report.xml"
    options = ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", "-q", *options, "three.ipynb"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1
    differ, fail = versions.cells_of(report)
    assert [name[-6:] for name in differ] == ["Cell 1"] and [x[-6:] for x in fail] == ["Cell 2"]


def test_what_is_installed_is_told_of_all_that_minippo_asks_for():
    found = versions.installed(Path(sys.executable))
    assert {"torch", "numpy", "jupyterlab", "nbval"} <= found.keys() and "trl" not in found
