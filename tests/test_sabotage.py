"""The edits still fit the code, and the command would say so if one went unnoticed.

`make sabotage` runs the notebooks; here a toy stands for them.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package tests.sabotage

from tests.sabotage import __main__ as sabotage
from tests.sabotage.edits import EDITS, Edit

ROOT = Path(__file__).resolve().parents[1]
BUILT = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.notebook}-{edit.file}")
def test_an_edit_fits_the_code_once_and_leaves_python(edit):
    source = (ROOT / "minippo" / edit.file).read_text(encoding="utf-8")
    spoilt = sabotage.edited(source, edit)
    assert ast.dump(ast.parse(spoilt)) != ast.dump(ast.parse(source))


def test_every_notebook_has_three_edits():
    for path in BUILT:
        edits = [edit for edit in EDITS if edit.notebook == path.stem[:2]]
        assert len(edits) == len({(edit.file, edit.new) for edit in edits}) >= 3, path.stem
    assert {edit.notebook for edit in EDITS} <= {path.stem[:2] for path in BUILT}


def test_what_does_not_fit_has_no_verdict():
    for source in ("x = 1\n", "x = 2\nx = 2\n"):
        with pytest.raises(sabotage.NoVerdict, match="stands [02] times in a.py"):
            sabotage.edited(source, Edit("00", "a.py", "x = 2", "x = 3", "a sign"))


# --- the command, on a toy --------------------------------------------------------------------

TOY = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
SIGN = Edit("00", "toy.py", "2 * x", "-2 * x", "sign")
UNSEEN = Edit("00", "toy.py", "x / 2", "x / 3", "never called")
AWAY = Edit("00", "away.py", "x = 1", "x = 2", "never imported")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A package of three files and a notebook that has run."""
    nbformat, root = pytest.importorskip("nbformat"), tmp_path_factory.mktemp("toy")
    pytest.importorskip("nbval")
    for folder in ("minippo", "data", "notebooks"):
        (root / folder).mkdir()
    (root / "minippo" / "__init__.py").write_text("")
    (root / "minippo" / "away.py").write_text("x = 1\n")
    (root / "minippo" / "toy.py").write_text(TOY)
    cell = nbformat.v4.new_code_cell("from minippo.toy import double\nprint(double(2))")
    cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="4\n")], 1
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), root / "notebooks" / "00_toy.ipynb")
    return root


@pytest.mark.integration
def test_an_edit_that_the_outputs_show_is_noticed(toy, capsys):
    assert sabotage.main(sabotage.Settings(jobs=2), toy, (SIGN,)) == 0
    said = capsys.readouterr().out
    assert "1 of 1 edits noticed" in said
    assert re.search(r"00 +nothing is edited: has to pass +passes", said)
    assert re.search(r"00  toy.py +sign +Cell 0, another output", said)


@pytest.mark.integration
def test_a_copy_that_no_kernel_imported_has_no_verdict(toy, monkeypatch, capsys):
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *given, **named: done)
    assert sabotage.main(sabotage.Settings(), toy, (AWAY,)) == 1
    said = capsys.readouterr().out
    assert "0 of 1 edits noticed" in said
    assert "away.py, never imported: no verdict: no kernel imported away.py of the copy" in said


def test_the_reason_is_the_name_of_what_was_raised_or_another_output():
    raised = "Traceback:\n\x1b[31mNameError\x1b[39m: name 'y' is not defined\n\n"
    assert sabotage.reason_of(raised) == sabotage.reason_of(raised.replace("\x1b", "#x1B"))
    assert sabotage.reason_of(raised) == "NameError"
    assert sabotage.reason_of("CheckFailed: gae is not right yet. The sign.") == "CheckFailed"
    assert sabotage.reason_of("Cell outputs differ\n4 != -4") == "another output"
    broken = sabotage.problem_of(SIGN, sabotage.Run("Cell 0", "NameError", 1.0))
    assert broken == "nobody ever had such code: NameError"


@pytest.mark.integration
def test_where_the_notebook_fails_by_itself_nothing_is_noticed(toy, monkeypatch, capsys):
    monkeypatch.setattr(sabotage, "run", lambda *given: sabotage.Run("Cell 0", "ValueError", 1.0))
    assert sabotage.main(sabotage.Settings(), toy, (SIGN,)) == 1
    said = capsys.readouterr().out
    assert "0 of 1 edits noticed" in said and "Cell 0 fails without any edit" in said


@pytest.mark.integration
def test_all_noticed_ends_with_0_and_an_unknown_notebook_with_2(toy, monkeypatch, capsys):
    passes, fails = sabotage.Run("", "", 1.0), sabotage.Run("Cell 0", "ValueError", 1.0)
    found = {None: passes, SIGN: fails, UNSEEN: passes}
    monkeypatch.setattr(sabotage, "run", lambda notebook, edit: found[edit])
    assert sabotage.main(sabotage.Settings(), toy, (SIGN, UNSEEN)) == 1
    assert "toy.py, never called: unnoticed" in capsys.readouterr().out
    assert sabotage.main(sabotage.Settings(only=("00",)), toy, (SIGN,)) == 0
    assert "1 of 1 edits noticed" in capsys.readouterr().out
    assert sabotage.main(sabotage.Settings(only=("07",)), toy, (SIGN,)) == 2
    assert "no edit is for notebook 07" in capsys.readouterr().err
