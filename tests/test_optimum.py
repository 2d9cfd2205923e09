"""train_ppo from samples against the exact optimum: one seed and one coefficient of each kind.

All seeds and coefficients: `python docs/oracle_runs.py`, whose results stand in
docs/oracle_results.md.
"""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minippo.plots import probability_bars

pytestmark = pytest.mark.integration

DOCS = Path(__file__).resolve().parents[1] / "docs"
if not (DOCS / "oracle_runs.py").is_file():
    pytest.skip("docs/ is not here: these tests need a checkout", allow_module_level=True)
sys.path.append(str(DOCS))  # where oracle_runs finds make_results, as it does as a script
spec = importlib.util.spec_from_file_location("oracle_runs", DOCS / "oracle_runs.py")
oracle_runs = importlib.util.module_from_spec(spec)
sys.modules["oracle_runs"] = oracle_runs  # dataclasses look their module up
spec.loader.exec_module(oracle_runs)

SHORT = {"steps": 150, "ppo_epochs": 4, "lr": 0.05}  # shorter than a graded run, same bound


@pytest.fixture(scope="module")
def in_the_reward():
    return oracle_runs.train("table", "scattered", "reward", 0.5, 0, **SHORT)


@pytest.fixture(scope="module")
def in_the_loss():
    return oracle_runs.train("table", "feelings", "loss", 0.5, 0, **SHORT)


def test_with_the_kl_in_the_reward_training_ends_at_the_optimum(in_the_reward):
    run, world, (ref, policy, goal) = in_the_reward
    assert run.goal_to_best == 0 and 0.5 <= run.started <= 5
    assert run.ended <= 0.01 * run.started
    # The same said without pi*: almost nothing of the objective is missing.
    best = float(world.objective(goal, ref, 0.5))
    missing = best - float(world.objective(policy, ref, 0.5))
    assert missing == pytest.approx(0.5 * run.ended)  # J* - J = beta KL(policy, pi*)
    assert best - float(world.objective(ref, ref, 0.5)) == pytest.approx(0.5 * run.started)
    assert 0 < missing < 0.01 * (best - float(world.objective(ref, ref, 0.5)))


def test_with_the_kl_in_the_loss_training_ends_at_the_fixed_point_of_that_loss(in_the_loss):
    run, world, (ref, policy, _) = in_the_loss
    assert run.ended <= 0.01 * run.started
    assert run.goal_to_best > 0.2  # nats: that is not pi*
    best, _ = world.optimum(ref, 0.5)
    assert float(world.kl(policy, best)) == pytest.approx(run.goal_to_best, rel=0.2)


def test_with_another_estimator_in_the_reward_training_ends_elsewhere():
    # `full` is the same whatever the token, so it holds none back: one answer gets nearly all.
    case = "table", "scattered", "reward", 0.5, 0
    run, world, (_, policy, goal) = oracle_runs.train(*case, **SHORT, kl_estimator="full")
    assert run.share > 0.3
    likeliest = [float(world.response_logprobs(x).exp().max()) for x in (policy, goal)]
    assert likeliest[0] > 0.9 and likeliest[1] < 0.3


# --- the longer command -----------------------------------------------------------------------


def test_every_graded_world_has_its_optimum_at_a_fair_distance():
    low, high = oracle_runs.NATS
    for name, betas in oracle_runs.BETAS.items():
        world, ref = oracle_runs.WORLDS[name]()
        assert (len(world.words), world.length, len(betas)) == (5, 3, 3)
        assert low <= distance_of_gpt2(world, betas[1]) <= high
        for beta in betas:
            assert low <= float(world.kl(ref, world.optimum(ref, beta)[0])) <= high


def distance_of_gpt2(world, beta):
    policy, _ = oracle_runs.make_models("gpt2", world, None)
    ref = world.logprobs_all(policy).detach()
    return float(world.kl(ref, world.optimum(ref, beta)[0]))


def test_eight_seeds_of_each_are_planned():
    plan = oracle_runs.plan(8)
    assert len(plan) == len(set(plan)) == 2 * 2 * (3 + 1) * 8


def test_a_run_that_misses_is_listed_and_one_that_is_slow_too(in_the_reward):
    good = in_the_reward[0]
    far, slow = replace(good, seed=3, ended=good.started), replace(good, seed=4, seconds=61.0)
    assert good.passed and not far.passed and not slow.passed
    lines = oracle_runs.failures([good, far, slow]).splitlines()
    assert len(lines) == 2
    assert "seed 3: 100.00% of" in lines[0] and "in 61 s" in lines[1]
    assert oracle_runs.failures([good]) == "None of 1."
    table = oracle_runs.runs_table([good, far, slow]).splitlines()
    assert len(table) == 3 and "**100.00%**" in table[2] and table[2].endswith("| 61 |")


def test_the_committed_results_list_every_run_and_each_miss_with_what_is_missing():
    text = (DOCS / "oracle_results.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- runs -->\n(.*?)<!-- /runs -->", text, re.DOTALL)[1]
    rows = [line for line in block.splitlines() if line.startswith(("| table", "| gpt2"))]
    left = [(row, float(x)) for row in rows for x in re.findall(r" (\d+\.\d\d)% ", row)]
    shares = [share for _, share in left]
    assert len(shares) == len(oracle_runs.plan(8))
    with_tables = [share for row, share in left if row.startswith("| table")]
    assert len(with_tables) == 96 and max(with_tables) <= 1
    listed = re.search(r"<!-- failures -->\n(.*?)<!-- /failures -->", text, re.DOTALL)[1]
    misses = re.findall(r"^- .*: (\d+\.\d\d)% of .*responses are missing", listed, re.MULTILINE)
    assert sorted(map(float, misses)) == sorted(share for share in shares if share > 1)
    assert len(misses) <= len(shares) / 20


def test_what_is_missing_is_named_with_the_steps_in_which_it_is_hardly_sampled():
    world, _ = oracle_runs.feelings_world(length=1)  # "." and four responses that do not end
    there = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    path = [[0.2, 0.2, 0.2, 0.2, 0.2], [0.5, 0.005, 0.295, 0.2, 0], [0.6, 0.02, 0.28, 0.1, 0]]
    path += [[0.7, 0.004, 0.196, 0.1, 0], [0.7, 0.001, 0.199, 0.1, 0]]
    text = oracle_runs.missing(world, torch.tensor(path), there, batch_size=100)
    assert text.startswith("1 responses are missing that the goal gives 30.0% ('good' 30.0%")
    assert "at first 20.00%, here 0.1000%" in text and "from step 3 of 4 on" in text
    path[1:3] = path[3:4] * 2
    path[0] = path[3]
    assert "in all 4 steps" in oracle_runs.missing(world, torch.tensor(path), there, batch_size=100)
    same = there.repeat(2, 1)
    assert oracle_runs.missing(world, same, there, 100) == "no response is missing"


# --- the figure -------------------------------------------------------------------------------


def test_probability_bars_are_ordered_by_the_last_policy_and_sum_up_the_rest():
    groups = {"ref": [0.1, 0.2, 0.3, 0.4], "pi*": [0.2, 0.5, 0.1, 0.2]}
    (axes,) = probability_bars(["a", "b", "c", "d"], groups, most=2).axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights[0] == pytest.approx([0.2, 0.1, 0.7])
    assert heights[1] == pytest.approx([0.5, 0.2, 0.3])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["b", "a", "the other 2"]
    centres = [[bar.get_center()[0] for bar in bars] for bars in axes.containers]
    assert [x < i < y for i, (x, y) in enumerate(zip(*centres))] == [True] * 3  # side by side


def test_probability_bars_refuse_a_policy_of_another_size():
    with pytest.raises(ValueError, match="2 labels.*'short'"):
        probability_bars(["a", "b"], {"ref": [0.5, 0.5], "short": [1.0]})
