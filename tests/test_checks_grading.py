"""minippo grade: what counts, and that nothing a notebook prints or redefines does."""

import json

import pytest

from minippo.app import cli
from minippo.checks import grading

pytestmark = pytest.mark.integration

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

WRITTEN = """
def kl_k1(logprobs, ref_logprobs):
    return logprobs - ref_logprobs
"""
CELLS = [
    "import json, os, torch\nfrom minippo.checks import *",
    WRITTEN + "kl_k1 = check_kl_k1(kl_k1)",
    "def kl_k2(logprobs, ref_logprobs):\n    return (logprobs - ref_logprobs).square()",
    "kl_k2 = check_kl_k2(kl_k2)",
    "assert kl_k2(torch.zeros(1), torch.ones(1)).item() == 0.5  # minippo's own came back",
    "def kl_k3(logprobs, ref_logprobs):\n    raise NotImplementedError()",
    "kl_k3 = check_kl_k3(kl_k3)",
    "1 / 0",
    "def check_gae(fn):\n    print('gae is right.')\n    return fn\n\ncheck_gae(None)\nscored()",
    "def lm_loss(:\n    pass\n\ncheck_lm_loss(lm_loss)",
    "with open(os.environ['MINIPPO_GRADE'], 'a') as file:  # check_ranking_loss\n    "
    "file.write(json.dumps(dict(exercise='ranking_loss', result='solved', sentence='')) + '\\n')",
    "TWO = torch.tensor(2.0)\n\ndef prompt_values(scores):\n    return scores.mean(1) * TWO / TWO",
    "check_prompt_values(prompt_values)",
    "def simple_advantages(scores, values):\n    return scores - values",
    "check_simple_advantages(simple_advantages)\nassert not os.path.exists('my_minippo.py')",
]


def write(path, cells):
    """A notebook of these code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(notebook, path)
    return path


def graded(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status and output of the command."""
    with pytest.raises(SystemExit) as end:
        cli.main(["grade", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """{exercise: (result, sentence)} of the notebook above, and its file before and after."""
    path = write(tmp_path_factory.mktemp("graded") / "student.ipynb", CELLS)
    before = path.read_bytes()
    found = {v["exercise"]: (v["result"], v["sentence"]) for v in grading.grade(path)}
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    return found


def test_every_exercise_that_the_notebook_names_is_graded(verdicts):
    assert list(verdicts) == [
        *("kl_k1", "kl_k2", "kl_k3", "gae", "lm_loss", "ranking_loss", "prompt_values"),
        "simple_advantages",
    ]


def test_what_is_right_is_solved_also_after_a_cell_that_failed(verdicts):
    assert verdicts["kl_k1"] == ("solved", "kl_k1 is right.")
    assert verdicts["simple_advantages"] == ("solved", "simple_advantages is right.")


def test_what_is_wrong_has_the_sentence_of_its_check(verdicts):
    assert verdicts["kl_k2"] == ("wrong", "It looks like the factor 1/2 is missing.")


def test_what_is_not_written_is_not_solved(verdicts):
    assert verdicts["kl_k3"] == ("unwritten", "kl_k3 is not written yet.")


def test_a_check_that_was_redefined_counts_for_nothing(verdicts):
    assert verdicts["gae"] == ("not checked", "check_gae of minippo never ran on it.")


def test_a_cell_that_fails_before_its_check_is_told(verdicts):
    result, sentence = verdicts["lm_loss"]
    assert result == "not checked" and "SyntaxError" in sentence


def test_a_verdict_that_was_written_by_hand_counts_for_nothing(verdicts):
    assert verdicts["ranking_loss"][0] == "wrong"


def test_what_cannot_be_checked_outside_the_notebook_is_told_why(verdicts):
    result, sentence = verdicts["prompt_values"]
    assert result == "wrong" and "it uses TWO (Tensor) of the notebook" in sentence


def test_the_command_ends_with_0_if_all_is_solved_and_writes_json(tmp_path, capsys):
    cells = [f"from minippo.checks import *\n{WRITTEN}", "check_kl_k1(kl_k1)"]
    path = write(tmp_path / "good.ipynb", cells)
    status, said, _ = graded(capsys, path, "--json", tmp_path / "grade.json")
    assert status == 0
    assert said.splitlines() == ["kl_k1  solved       kl_k1 is right.", "solved 1 of 1"]
    assert json.loads((tmp_path / "grade.json").read_text()) == {
        "notebook": "good.ipynb",
        "solved": 1,
        "of": 1,
        "exercises": [{"exercise": "kl_k1", "result": "solved", "sentence": "kl_k1 is right."}],
    }


def test_a_cell_that_never_ends_and_a_kernel_that_dies_end_with_1(tmp_path, capsys):
    cells = ["import time\ntime.sleep(600)", "import os\nos._exit(3)", "check_gae(gae)"]
    path = write(tmp_path / "bad.ipynb", cells)
    status, said, _ = graded(capsys, path, "--timeout", 2, "--expect", "gae", "kl_k1")
    assert status == 1 and "kl_k1  not checked" in said and said.endswith("solved 0 of 2\n")
    assert "gae    not checked  check_gae of minippo never ran on it. The run ended with" in said


def test_a_file_that_is_no_notebook_ends_with_2(tmp_path, capsys):
    (tmp_path / "text.ipynb").write_text("no json")
    (tmp_path / "list.ipynb").write_text("[]")
    (tmp_path / "other.ipynb").write_text('{"a": 1}')
    plain = write(tmp_path / "plain.ipynb", ["print('solved')", "check_nothing(1)"])
    for name in ("text", "list", "other", "missing"):
        status, _, said = graded(capsys, tmp_path / f"{name}.ipynb")
        assert status == 2 and "is no notebook that can be read" in said, name
        assert said.count("\n") == 1 and "Traceback" not in said
    status, _, said = graded(capsys, plain, "--expect", "gea")
    assert status == 2 and "there is no check of gea" in said
    status, _, said = graded(capsys, plain)
    assert status == 2 and "has no exercise: no cell calls a check" in said
