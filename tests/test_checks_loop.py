"""The checks of the loop: minippo's own functions changed in one place are rejected, and say where.

That the solutions of notebook 08 pass, the notebook itself shows.
"""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minippo import ppo, rollout
from minippo.checks import (
    check_collect_rollout,
    check_ppo_loss,
    check_ppo_update,
    grading,
    loop,
    own,
)
from minippo.checks.loop import Differs, agree, agree_all

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
UNSOLVED = sorted((NOTEBOOKS / "exercises").glob("*.ipynb"))
# By another name: a check rejects what hands its work to minippo's function of the same name.
OWN = {"acts": rollout.collect_rollout, "loses": ppo.ppo_loss, "moves": ppo.ppo_update}


@pytest.fixture(autouse=True, scope="module", params=[torch.float32, torch.float64], ids=str)
def default_dtype(request):
    """Commands compute in float32, lessons in float64: a check says the same in both."""
    for made in (loop._shipped, loop._wanted, loop._wanted_loss_parts, loop._wanted_after):
        made.cache_clear()
    torch.set_default_dtype(request.param)
    yield
    assert torch.get_default_dtype() == request.param  # no check has left its own behind
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def no_file(monkeypatch):
    """Nothing is saved."""
    monkeypatch.setenv("MINIPPO_MINE", "off")


def said(check, fn) -> str:
    """What a check says of a function that is wrong."""
    verdict = check.judge(fn)
    assert verdict.status == "wrong"
    return verdict.sentence


def test_what_does_the_same_is_right():
    for check, key in ((check_ppo_loss, "loses"), (check_ppo_update, "moves")):
        assert check.judge(lambda *given, key=key: OWN[key](*given)).status == "solved"


def test_a_rollout_is_compared_field_by_field():
    def collected(change):
        return lambda *given, **named: change(OWN["acts"](*given, **named))

    same = collected(lambda found: replace(found))
    assert check_collect_rollout.judge(same).status == "solved"
    late = collected(lambda r: replace(r, returns=r.advantages + r.values * r.mask))
    assert said(check_collect_rollout, late).startswith("Returns differs from minippo's: ")
    short = collected(lambda r: replace(r, values=r.values[:, :-1]))
    assert said(check_collect_rollout, short).startswith("Values has the shape (16, ")
    assert "yours is Tensor" in said(check_collect_rollout, collected(lambda r: r.values))
    assert "a return may be missing" in said(check_collect_rollout, collected(lambda r: None))


def test_a_rollout_that_forgets_a_setting_or_gives_a_wrong_one_is_told_the_rule():
    def acting(change):
        def collect(*models_and_data, **named):
            *models, score_fn, prompts, tokenizer, config = models_and_data
            score_fn, config = change(score_fn, config, named["score_stats"][1])
            return OWN["acts"](*models, score_fn, prompts, tokenizer, config, **named)

        return said(check_collect_rollout, collect)

    def fine(std):
        return lambda score_fn, c, _: (score_fn, replace(c, missing_eos_penalty=std))

    forgotten = acting(fine(0.0))
    assert "Scores differs" in forgotten and "a missing EOS costs its penalty" in forgotten
    first = acting(lambda f, c, std: fine(c.missing_eos_penalty / std)(f, c, std))
    assert "raw scores are standardised first" in first
    length = acting(lambda f, c, _: (lambda x, m, n: f(x, m, c.max_response_tokens), c))
    assert "Raw_scores differs" in length and "the length of the query" in length
    whitened = acting(lambda f, c, _: (f, replace(c, whiten_advantages=True)))
    assert "Advantages differs" in whitened and "config.whiten_advantages" in whitened


def test_a_loss_is_compared_with_its_stats_and_gradients():
    def lost(change):
        return lambda *given: change(*OWN["loses"](*given))

    assert "The loss differs" in said(check_ppo_loss, lost(lambda loss, stats: (2 * loss, stats)))
    bare = lost(lambda loss, stats: (loss, {}))
    assert "to have 'loss/policy'; yours has nothing" in said(check_ppo_loss, bare)
    assert "no gradient" in said(check_ppo_loss, lost(lambda loss, stats: (loss.detach(), stats)))
    # The right number, with the gradient of something else.
    turned = lost(lambda loss, stats: (2 * loss.detach() - loss, stats))
    assert said(check_ppo_loss, turned).startswith("A gradient of the policy differs from")
    assert "two things" in said(check_ppo_loss, lost(lambda loss, stats: loss))
    assert "a return may be missing" in said(check_ppo_loss, lost(lambda loss, stats: None))


@pytest.mark.parametrize(
    "setting", [{"vf_coef": 1.0}, {"clip_range": 0.2}, {"value_clip_range": 0.15}]
)
def test_no_setting_of_the_loss_may_be_a_default_or_that_of_the_other_loss(setting):
    def lost(*given):
        return OWN["loses"](*given[:-1], replace(given[-1], **setting))

    assert said(check_ppo_loss, lost).startswith("The loss differs")


def test_a_loss_that_asks_the_policy_without_gradient_is_told_so():
    def lost(policy, *given):
        return OWN["loses"](policy.requires_grad_(False), *given)

    assert said(check_ppo_loss, lost).startswith("No gradient reaches the policy")


def test_updates_are_compared_by_what_they_leave_in_the_weights():
    def once(*given):
        *rest, config, generator = given
        return OWN["moves"](*rest, replace(config, ppo_epochs=1), generator)

    assert "of the policy after the updates differs" in said(check_ppo_update, once)
    assert "The policy did not move" in said(check_ppo_update, lambda *given: {"loss/policy": 0.0})


def test_updates_have_to_return_means():
    def returned(change):
        return lambda *given: change(OWN["moves"](*given))

    assert "a return may be missing" in said(check_ppo_update, returned(lambda stats: None))
    sums = returned(lambda stats: {name: 6 * value for name, value in stats.items()})
    assert said(check_ppo_update, sums).startswith("'loss/policy' of what it returns differs")


def test_what_is_unwritten_borrowed_or_raises_is_said_to_be_so():
    def ppo_loss(policy, ref_policy, value_model, batch, config):
        raise NotImplementedError("write this, then run the next cell")

    def handed_on(*given):
        return ppo.ppo_loss(*given)

    assert check_ppo_loss.judge(ppo_loss).status == "unwritten"
    assert check_ppo_loss.judge(ppo.ppo_loss).status == "unwritten"
    assert "calls minippo's own" in said(check_ppo_loss, handed_on)
    assert "raises ZeroDivisionError in its line 1" in said(check_ppo_loss, lambda *given: 1 / 0)


def test_numbers_agree_to_rounding_and_their_place_is_told():
    wanted = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    agree("x", wanted + 1e-6, wanted)
    text = r"x differs from minippo's: 5.0000 instead of 4.0000 at \[1, 1\], 1 of 4 numbers differ"
    with pytest.raises(Differs, match=text):
        agree("x", torch.tensor([[1.0, 2.0], [3.0, 5.0]]), wanted)
    with pytest.raises(Differs, match="x has to be a tensor, yours is list"):
        agree("x", [1.0], wanted)
    with pytest.raises(Differs, match="x has to be a dict, yours is Tensor"):
        agree_all("x", wanted, {"a": wanted})
    with pytest.raises(Differs, match="'a' of x differs"):
        agree_all("x", {"a": float("nan")}, {"a": torch.tensor(0.0)})


# --- every exercise is graded -----------------------------------------------------------------


def code(path) -> list[str]:
    """The sources of a notebook's code cells."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def functions(cells) -> dict[str, str]:
    """{name: source} of the functions at the top of some cells."""
    plain = ["\n".join(x for x in cell.split("\n") if not x.startswith("%")) for cell in cells]
    found = ((step, cell) for cell in plain for step in ast.parse(cell).body)
    return {s.name: ast.unparse(s) for s, _ in found if isinstance(s, ast.FunctionDef)}


@pytest.mark.parametrize("path", UNSOLVED, ids=lambda path: path.stem)
def test_every_function_that_a_student_writes_is_graded_or_called_by_one_that_is(path):
    written = [name for name, text in functions(code(path)).items() if "write this, then" in text]
    graded, solved = grading.exercises(code(path)), functions(code(NOTEBOOKS / path.name))
    assert written and set(graded) <= set(written) and set(graded) <= set(own.EXERCISES)
    for name in set(written) - set(graded):
        assert any(f"{name}(" in solved[other] for other in graded), f"{name} is not graded"


def test_grading_checks_a_saved_piece_of_the_loop_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPPO_MINE", str(tmp_path / "mine.py"))
    solution = functions(code(NOTEBOOKS / "08_the_full_loop.ipynb"))["ppo_update"]
    imports = "from minippo.optim import optimizer_step\nfrom minippo.ppo import ppo_loss\n"
    text = f"# --- ppo_update {'-' * 60}\n{imports}{solution}\n"
    (tmp_path / "mine.py").write_text(text)
    assert grading._doubts(["ppo_update", "ppo_loss"]) == {
        "ppo_update": "",
        "ppo_loss": "It could not be checked again outside the notebook.",
    }
    (tmp_path / "mine.py").write_text(text.replace("loss.backward()", "(-loss).backward()"))
    assert "after the updates differs" in grading._doubts(["ppo_update"])["ppo_update"]
