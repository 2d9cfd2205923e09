"""The student's own file, and how a check looks in a notebook."""

import importlib.util
import os
import re
import sys

import pytest
import torch
from torch.nn import functional as F

from minippo import checks
from minippo.checks import CHECKS, CheckFailed, check_gae, check_kl_k1, check_kl_k2
from minippo.checks.checking import RESULTS
from minippo.checks.own import EXERCISES
from minippo.checks.saving import sections

GAMMA_IS = 1.0
TAG = re.compile(r"\s+", re.IGNORECASE)
FAR_TOO_LARGE = torch.ones(3)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The student's file, in an empty folder; no result of another test is left."""
    monkeypatch.delenv("MINIPPO_MINE", raising=False)
    monkeypatch.chdir(tmp_path)
    RESULTS.clear()
    return tmp_path / "my_minippo.py"


def difference(a, b):
    return F.relu(a - b) - F.relu(b - a)


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Mine."""
    assert TAG.match(" ") and FAR is False
    return GAMMA_IS * difference(logprobs, ref_logprobs)


FAR = False


def kl_k2(logprobs, ref_logprobs):
    return kl_k1(logprobs, ref_logprobs) ** 2 / 2


def my_kl_k2(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).square() / 2


def use_of_a_tensor(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs) * FAR_TOO_LARGE[0]


def import_file(path):
    """The student's file as a module, as `import my_minippo` gives it."""
    spec = importlib.util.spec_from_file_location("my_minippo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


X, Y = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -1.0]])


def test_a_right_function_is_saved_with_what_it_needs(file, capsys):
    check_kl_k1(kl_k1)
    assert capsys.readouterr().out == "kl_k1 is right. Saved to my_minippo.py.\n"
    text = file.read_text()
    assert "def difference(a, b):" in text and "import torch.nn.functional as F" in text
    assert "GAMMA_IS = 1.0" in text and "import re\n" in text and "Mine." in text
    assert import_file(file).kl_k1(X, Y).tolist() == [[1.0, -2.0]]


def test_mine_gives_the_saved_function_and_minippos_where_there_is_none(capsys):
    check_kl_k1(kl_k1)
    found = checks.mine("kl_k1")
    assert found.__doc__ == "Mine." and found(X, Y).tolist() == [[1.0, -2.0]]
    assert checks.mine("gae") is CHECKS["gae"].reference
    with pytest.raises(ValueError, match="no check of 'nothing'; there is one of masked_mean"):
        checks.mine("nothing")


def test_what_mine_gives_can_be_checked_and_saved_again(file):
    check_kl_k1(kl_k1)
    before = file.read_text()
    check_kl_k1(checks.mine("kl_k1"))
    assert sections()["kl_k1"].count("def difference") == 1
    assert set(before.split()) == set(file.read_text().split())


def test_sections_stand_side_by_side_and_are_replaced(file):
    check_kl_k1(kl_k1)
    check_kl_k2(kl_k2)  # it uses kl_k1, which comes along
    check_kl_k2(my_kl_k2)
    assert list(sections()) == ["kl_k1", "kl_k2"]
    assert "kl_k2 = my_kl_k2" in sections()["kl_k2"] and "def kl_k1" not in sections()["kl_k2"]
    assert import_file(file).kl_k2(X, Y).tolist() == [[0.5, 2.0]]


def test_a_function_brings_the_other_functions_of_the_notebook_along():
    check_kl_k2(kl_k2)
    assert checks.mine("kl_k2")(X, Y).tolist() == [[0.5, 2.0]]
    assert "def kl_k1" in sections()["kl_k2"] and "def difference" in sections()["kl_k2"]


def outer(factor):
    def kl_k1(logprobs, ref_logprobs):
        return factor * (logprobs - ref_logprobs)

    return kl_k1


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda logprobs, ref_logprobs: logprobs - ref_logprobs, "it has no source of its own"),
        (outer(1.0), "it uses factor of the function around it"),
        (use_of_a_tensor, "it uses FAR_TOO_LARGE (Tensor) of the notebook"),
    ],
    ids=["lambda", "closure", "tensor"],
)
def test_what_cannot_stand_alone_is_right_but_not_saved(fn, why, file, capsys):
    assert check_kl_k1(fn) is fn
    assert f"kl_k1 is right. Not saved: {why}" in capsys.readouterr().out
    assert not file.exists()


def test_the_file_can_be_switched_off_and_moved(file, tmp_path, monkeypatch, capsys):
    check_kl_k1(kl_k1)
    monkeypatch.setenv("MINIPPO_MINE", "off")
    assert checks.mine("kl_k1") is CHECKS["kl_k1"].reference
    check_kl_k2(kl_k2)
    assert capsys.readouterr().out.endswith("kl_k2 is right.\n")
    assert "kl_k2" not in file.read_text()
    monkeypatch.setenv("MINIPPO_MINE", str(tmp_path / "deeper" / "own.py"))
    check_kl_k2(kl_k2)
    assert list(sections()) == ["kl_k2"]


def test_a_section_that_was_spoilt_is_not_used_and_takes_no_other_down(file, capsys):
    check_kl_k1(kl_k1)
    check_kl_k2(my_kl_k2)
    file.write_text(file.read_text().replace("GAMMA_IS = 1.0", "GAMMA_IS = -1.0"))
    assert checks.mine("kl_k1") is CHECKS["kl_k1"].reference
    assert "minippo's own is used. The one in my_minippo.py is not right" in capsys.readouterr().out
    file.write_text(file.read_text().replace("GAMMA_IS = -1.0", "GAMMA_IS = = 1"))
    assert checks.mine("kl_k1") is CHECKS["kl_k1"].reference
    assert "raises SyntaxError" in capsys.readouterr().out
    assert checks.mine("kl_k2") is not CHECKS["kl_k2"].reference


def test_whose_and_scored_tell_how_far_one_is(capsys):
    check_kl_k1(kl_k1)
    check_kl_k2(CHECKS["kl_k2"].reference)
    with pytest.raises(CheckFailed):
        check_gae(lambda rewards, values, mask, gamma=1.0, lam=0.95: (rewards, values))
    capsys.readouterr()
    checks.scored()
    assert capsys.readouterr().out.splitlines() == [
        "solved 1 of 3",
        "  kl_k2: not written yet",
        "  gae: not right yet",
    ]
    checks.whose()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(EXERCISES)
    assert [line.split() for line in lines if "yours" in line] == [["kl_k1", "yours"]]


def test_a_file_that_is_no_text_is_reported_and_kept(file, capsys):
    file.write_bytes(b"\xff\xfe\xff")
    check_kl_k1(kl_k1)
    assert "Not saved: my_minippo.py cannot be read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="move it away"):
        checks.mine("kl_k1")
    assert file.read_bytes() == b"\xff\xfe\xff"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_does_not_fail_the_check(file, capsys):
    file.parent.chmod(0o500)
    assert check_kl_k1(kl_k1) is kl_k1
    file.parent.chmod(0o700)
    assert "Not saved: cannot write my_minippo.py" in capsys.readouterr().out


# --- in a notebook ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell():
    """IPython, as a kernel runs it, in this process."""
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactive.InteractiveShell()
    yield shell
    sys.displayhook = sys.__displayhook__


def test_in_a_notebook_a_wrong_answer_shows_its_text_and_no_frames(shell, capsys):
    shell.run_cell("from minippo.checks import check_kl_k1")
    shell.run_cell("def kl_k1(logprobs, ref_logprobs):\n    return ref_logprobs - logprobs")
    result = shell.run_cell("kl_k1 = check_kl_k1(kl_k1)")
    said = capsys.readouterr().out
    assert isinstance(result.error_in_exec, CheckFailed)
    assert "It looks like the policy and the reference are the wrong way round" in said
    assert "Traceback" not in said and "checking.py" not in said


def test_in_a_notebook_the_source_of_cells_is_saved(shell, capsys):
    shell.run_cell("import torch\nfrom torch import Tensor\nEPS = 0.0")
    shell.run_cell("def gap(a: Tensor, b):\n    return torch.sub(a, b) + EPS")
    shell.run_cell("def kl_k1(logprobs, ref_logprobs):\n    return gap(logprobs, ref_logprobs)")
    shell.run_cell("from minippo.checks import check_kl_k1\nkl_k1 = check_kl_k1(kl_k1)")
    assert "kl_k1 is right. Saved to my_minippo.py." in capsys.readouterr().out
    assert checks.mine("kl_k1")(X, Y).tolist() == [[1.0, -2.0]]
    assert "from torch import Tensor" in sections()["kl_k1"]


def test_in_a_notebook_an_error_is_told_with_the_line_of_the_cell(shell, capsys):
    shell.run_cell("from minippo.checks import check_kl_k1")
    shell.run_cell("# mine\ndef kl_k1(logprobs, ref_logprobs):\n    return logprobs.nothing")
    shell.run_cell("check_kl_k1(kl_k1)")
    assert "in its line 2, `return logprobs.nothing`" in capsys.readouterr().out
