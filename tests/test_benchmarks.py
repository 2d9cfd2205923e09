"""The benchmark's own arithmetic: the floor, the medians, the turns, and that both sides do PPO.

Nothing here measures a time. What needs trl is skipped where it is missing.
"""

import contextlib
import dataclasses
import importlib
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package tests.benchmarks

from tests.benchmarks import profile, tables
from tests.benchmarks.__main__ import benchmark, page_text
from tests.benchmarks.changes import CHANGES
from tests.benchmarks.command import TRL_VERSION, CannotRun, check_sides, installed, run
from tests.benchmarks.equal_time import equal_time
from tests.benchmarks.floor import (
    Shape,
    policy_flops,
    score_flops,
    step_flops,
    trunk_flops,
    value_flops,
)
from tests.benchmarks.measure import MODULES, PARTS
from tests.benchmarks.ours import Trainer
from tests.benchmarks.turns import Pace, Turns, take_turns
from tests.benchmarks.workloads import (
    WORKLOADS,
    Workload,
    build,
    lr_factor,
    pairs_of,
    shape_of,
    shipped_world,
)

pytestmark = pytest.mark.integration

HAS_TRL = installed("trl") == TRL_VERSION
needs_trl = pytest.mark.skipif(
    not HAS_TRL, reason=f"needs trl=={TRL_VERSION}: pip install 'minippo[bench]'"
)
MINIATURE = Workload("4 prompts of 3 tokens, answers of 5", 4, 5, (1, 8, 2, 11), 3)


# --- the floor --------------------------------------------------------------------------------


def test_the_floor_of_a_row_by_hand():
    shape = Shape(n_layer=1, n_embd=2, vocab_size=3)
    # 3 tokens: 24 * 2^2 * 3 = 288 in matrices; they attend to 1 + 2 + 3 tokens, 4 * 2 * 6 = 48.
    assert trunk_flops(shape, 3) == 288 + 48
    # 2 tokens of query, 2 of response: 3 are read, and 2 go through 2 x 3 weights.
    assert policy_flops(shape, 2, 2) == 336 + 24
    assert value_flops(shape, 2, 2) == 336 + 8
    # The reward model reads all 4: 24 * 4 * 4 + 4 * 2 * (1 + 2 + 3 + 4), and one head.
    assert score_flops(shape, 2, 2) == 384 + 80 + 4


def test_the_floor_of_a_step_by_hand():
    shape = Shape(n_layer=1, n_embd=2, vocab_size=3)
    acting, learning = 2 * 360 + 344 + 468, 3 * (360 + 344)
    assert step_flops(shape, [(2, 2)], ppo_epochs=1) == acting + learning
    assert step_flops(shape, [(2, 2), (2, 2)], ppo_epochs=4) == 2 * (acting + 4 * learning)


def test_the_floor_counts_what_torch_counts_but_attention_to_later_tokens():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from minippo.models import tiny_gpt2

    n_layer, n_embd, vocab_size, tokens, response = 3, 8, 11, 7, 4
    model = tiny_gpt2(vocab_size, n_layer, n_embd, n_head=2)
    model.set_attn_implementation("eager")  # the fused kernel computes its forward pass twice
    with FlopCounterMode(display=False) as counter:
        output = model(torch.randint(0, vocab_size, (1, tokens)), logits_to_keep=response)
        forward = counter.get_total_flops()
        output.logits.sum().backward()
    later = sum(tokens - i for i in range(1, tokens + 1))  # keys after the query, masked out
    wasted = n_layer * 4 * n_embd * later
    ours = policy_flops(Shape(n_layer, n_embd, vocab_size), tokens + 1 - response, response)
    assert ours == forward - wasted
    assert 3 * ours == counter.get_total_flops() - 3 * wasted


def test_shapes_are_those_of_the_models():
    assert shape_of(WORKLOADS["tiny"]) == (2, 128, 512)
    policy = build(WORKLOADS["natural"]).policy
    sizes = (policy.config.n_layer, policy.config.n_embd, policy.get_input_embeddings().weight)
    assert shape_of(WORKLOADS["natural"]) == (*sizes[:2], len(sizes[2]))


# --- turns ------------------------------------------------------------------------------------


class Recorder:
    """A connection whose turn it always is."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)

    def recv(self):
        return "begin"


def counting(turns, start, count):
    """A side for the test below: sends `start` and the numbers after it."""
    turns.ready()
    for number in range(start, start + count):
        turns.begin()
        turns.end(number=number)


def failing(turns, count):
    """A side that cannot be loaded."""
    sys.stderr.close()  # its traceback is no concern of the test's reader
    raise KeyError("nothing")


def test_sides_take_turns_and_the_warm_up_is_left_out():
    order = []
    sides = {name: ("test_benchmarks:counting", n) for name, n in (("a", 10), ("b", 20))}
    sent = take_turns(sides, rounds=2, threads=1, on_turn=order.append)
    assert [turn["number"] for turn in sent["a"]] == [11, 12]
    assert [turn["number"] for turn in sent["b"]] == [21, 22]
    assert order == [f"{s}, {n}" for n in ("warm-up", "1 of 2", "2 of 2") for s in "ab"]
    assert all(0 < turn["start_mb"] <= turn["peak_mb"] for turn in sent["a"])


def test_a_side_that_dies_is_named():
    with pytest.raises(RuntimeError, match="the process of broken ended early, with exit status 1"):
        take_turns({"broken": ("test_benchmarks:failing",)}, 1, 1, print)


def test_a_training_is_cut_into_turns():
    recorder = Recorder()
    pace = Pace(Turns(recorder), per_turn=2, count=2, facts=lambda: {"work": 7})
    pace.start()
    for done in range(1, 5):
        pace.step(done)
    assert [message.get("work") for message in recorder.sent] == [None, 7, 7]


@pytest.mark.parametrize("part", list(PARTS))
def test_the_sides_of_a_part_are_functions_that_take_these_arguments(part):
    for name, *arguments in PARTS[part][1].values():
        module, function = name.split(":")
        found = getattr(importlib.import_module(module), function)
        bound = inspect.signature(found).bind(Turns(Recorder()), *arguments, 2)
        assert bound.arguments["count"] == 2  # and no argument too many or too few


@pytest.mark.parametrize("side", list(MODULES))
def test_both_sides_have_the_steps_and_the_training(side):
    module = importlib.import_module(MODULES[side])
    steps = inspect.signature(module.ppo_steps).bind(Turns(Recorder()), "tiny", 6)
    training = inspect.signature(module.train_for).bind(Turns(Recorder()), 120.0, 0, 512, 1)
    assert (steps.arguments["workload"], steps.arguments["count"]) == ("tiny", 6)
    assert (training.arguments["seconds"], training.arguments["count"]) == (120.0, 1)


# --- what is timed is PPO ---------------------------------------------------------------------


def test_our_timed_steps_are_those_of_train_ppo():
    import torch

    from minippo.models import frozen_copy
    from minippo.ppo import train_ppo
    from tests.benchmarks.ours import Trainer

    timed, world, config = build(MINIATURE), build(MINIATURE), MINIATURE.config(steps=2)
    trainer = Trainer(timed, config)
    history = [trainer.step((step + 1) / (config.warmup_steps + 1))[1] for step in range(2)]
    models = (world.policy, frozen_copy(world.policy), world.value_model, world.reward_model)
    data = (world.prompts, world.tokenizer)
    expected = train_ppo(*models, *data, config, score_stats=world.stats)
    assert [{**h, "objective/kl_coef": config.kl_coef} for h in history] == expected
    for ours, theirs in zip(timed.policy.parameters(), world.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_head_given_to_trl_returns_standardised_scores():
    import torch

    from tests.benchmarks.peer import standardised_head

    reward_model = build(MINIATURE).reward_model
    tokens, mask = torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool)
    classifier = standardised_head(reward_model, mean=2.0, std=4.0)
    hidden = classifier.base_model(tokens).last_hidden_state
    expected = (reward_model(tokens, mask) - 2.0) / 4.0
    torch.testing.assert_close(classifier.score(hidden)[:, -1, 0], expected)


def test_rankings_become_all_their_pairs():
    from minippo.batching import Encoded

    pairs = pairs_of([Encoded(0, [5], [[1], [2], [3]])])
    assert [row.responses for row in pairs] == [[[1], [2]], [[1], [3]], [[2], [3]]]


def test_the_learning_rate_rises_over_the_warm_up_and_falls_with_the_time():
    assert [lr_factor(1.0, step, warmup_steps=1) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert lr_factor(0.25, 100, warmup_steps=1) == 0.25 and lr_factor(-0.1, 100, 1) == 0.0


@needs_trl
def test_a_step_of_trl_is_four_epochs_of_two_minibatches(monkeypatch):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from tests.benchmarks import peer

    monkeypatch.setitem(WORKLOADS, "miniature", MINIATURE)
    recorder, steps = Recorder(), []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        peer.ppo_steps(Turns(recorder), "miniature", 2)
    assert len(steps) == 2 * 4 * 2
    assert [message.get("lengths") for message in recorder.sent] == [None, *[[(3, 5)] * 4] * 2]


@needs_trl
def test_trls_lines_for_gae_give_what_ours_gives_on_full_answers():
    import torch

    from minippo.advantages import gae
    from minippo.config import PPOConfig
    from tests.benchmarks.peer import advantage_lines

    rewards, values = torch.randn(2, 3, 5)
    names = {"torch": torch, "rewards": rewards, "values": values, "responses": rewards}
    names["args"] = PPOConfig()
    exec(advantage_lines(), names)
    advantages, returns = gae(rewards, values, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(names["advantages"], advantages)
    torch.testing.assert_close(names["returns"], returns)


# --- tables and commands ----------------------------------------------------------------------

MEASURED = {
    "ours": {
        "seconds": [1.0, 4.0, 2.0], "tokens": [100, 100, 100], "flops": [10**9] * 3,
        "start_mb": 100.0, "peak_mb": 1500.0,
    },
    "trl": {
        "seconds": [3.0, 5.0, 4.0], "tokens": [120, 120, 120], "flops": [2 * 10**9] * 3,
        "start_mb": 200.0, "peak_mb": 3000.0,
    },
}  # fmt: skip


def test_a_summary_takes_medians():
    summary = tables.step_summary(MEASURED["ours"], gflops=2.0)
    assert summary["seconds"] == 2.0 and (summary["fastest"], summary["slowest"]) == (1.0, 4.0)
    assert summary["tokens"] == 50.0  # of 100, 25 and 50
    assert summary["floor"] == 0.5  # a billion operations at two billion a second
    assert summary["floor_share"] == 0.25  # of 1/2, 1/8 and 1/4


def test_the_table_of_steps():
    lines = tables.step_table({"tiny": MEASURED}, 2.0).splitlines()
    ours = "| tiny | minippo | 2.00 (1.00 to 4.00) | 50.0 | 1,500 | 100 | 0.50 | 25% |  |"
    theirs = "| tiny | TRL | 4.00 (3.00 to 5.00) | 30.0 | 3,000 | 200 | 1.00 | 25% | 2.00 |"
    assert lines[2:] == [ours, theirs]
    assert len({line.count("|") for line in lines}) == 1


def test_a_table_of_one_side_has_no_ratio():
    alone = {"tiny": {"ours": MEASURED["ours"]}}
    assert tables.step_table(alone, 2.0).splitlines()[2:] == [
        "| tiny | minippo | 2.00 (1.00 to 4.00) | 50.0 | 1,500 | 100 | 0.50 | 25% |  |"
    ]
    part = {"GAE": {"unit": "calls", "ours": [10.0, 30.0, 20.0]}}
    assert tables.part_table(part).splitlines()[2:] == ["| GAE | calls | 20.0 |  |  |"]


def test_the_table_of_parts():
    part = {
        "GAE": {"unit": "calls", "ours": [1000.0, 3000.0, 2000.0], "trl": [500.0, 800.0, 900.0]}
    }
    assert tables.part_table(part).splitlines()[2:] == ["| GAE | calls | 2,000 | 800 | 2.50 |"]


def test_the_table_at_equal_time():
    def result(gold, steps):
        return {"gold": gold, "kl_per_sequence": 3.0, "steps": steps}

    runs = [{"seed": s, "ours": result(4 + s, 90), "trl": result(2, 40)} for s in (0, 1, 2)]
    rows = tables.equal_time_table(runs, {**result(0.9, 0), "kl_per_sequence": 0.0}).splitlines()
    assert rows[2] == "| 0 | 4.00 | 3.00 | 90 | 2.00 | 3.00 | 40 |"
    assert rows[5] == "| mean | 5.00 | 3.00 | 90 | 2.00 | 3.00 | 40 |"
    assert rows[6] == "| spread | 1.00 | 0.00 | 0 | 0.00 | 0.00 | 0 |"  # of 4, 5 and 6
    assert rows[7] == "| SFT, before | 0.90 | 0.00 | 0 | 0.90 | 0.00 | 0 |"


def test_the_page_names_machine_and_versions():
    machine = {"repeats": 5, "threads": 2, "gflops": 71.6, "versions": {"torch": "2.13.0"}}
    text = page_text({"machine": machine, "steps": {"tiny": MEASURED}, "parts": {}})
    assert text.startswith("torch 2.13.0, 2 threads; 72 GFLOP/s in large float32 products; medians")


def test_a_block_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        tables.write_block(page, "bench", "new\n")
        expected = "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter\n"
        assert page.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("text", ["", "<!-- bench -->", "<!-- /bench --> <!-- bench -->"])
def test_a_page_without_the_place_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="page.md must have one <!-- bench -->"):
        tables.write_block(page, "bench", "new")
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["bench", "equal", "changes"])
def test_the_page_has_each_place_once(name):
    text = tables.PAGE.read_text(encoding="utf-8")
    assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1
    block = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    assert "| --- |" in block or block.strip() == "Not measured yet."


@pytest.mark.parametrize("command", [benchmark, equal_time])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "bench", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    names = inspect.signature(command).parameters
    assert all(f"--{name.replace('_', '-')}" in text for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "ours,nobody"], "--only knows ours and trl, not nobody"),
        (["--only", "ours", "--repeats", "0"], "must be at least 1"),
        (["--only", "ours", "--write"], "--write replaces all tables; it needs --workload all"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments, message, capsys):
    assert run(benchmark, "bench", arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(HAS_TRL, reason="trl is installed")
def test_without_trl_the_command_says_what_to_do():
    with pytest.raises(CannotRun, match="trl 1.12.0 is needed.*minippo\\[bench\\].*--only ours"):
        check_sides("ours,trl")
    assert check_sides("ours") == ["ours"]


# --- changes taken back -----------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_taken_back_changes_no_result(change):
    """Else more than time would be compared: same answers, same metrics up to rounding."""
    found = []
    for back in (lambda _: contextlib.nullcontext(), CHANGES[change][1]):
        world = shipped_world(8)
        if back is CHANGES["GELU in one kernel"][1]:
            assert type(world.policy.transformer.h[0].mlp.act).__name__ == "GELUTanh"
        config = dataclasses.replace(
            WORKLOADS["natural"].config(1), batch_size=8, minibatch_size=4, micro_batch_size=2
        )
        with back(world):
            found.append(Trainer(world, config).step())
    (rollout, metrics), (other, others) = found
    assert torch.equal(rollout.response, other.response)
    assert others == pytest.approx(metrics, rel=1e-3, abs=1e-4)


def test_a_profile_adds_up_and_leaves_nothing_out():
    ours = {"aten::mm": 2.0, "aten::addmm": 1.0, "aten::gelu": 0.5, "aten::new_operation": 0.25}
    kinds = profile.by_kind(ours)
    assert kinds["products with weights"] == 3.0 and kinds["everything else"] == 0.25
    assert kinds["together"] == 3.75
    table = profile.profile_table({"ours": ours, "trl": {"aten::_fused_adamw_": 7.0}})
    assert "| seconds in | minippo | TRL |" in table and "| AdamW | 0.0 | 7.0 |" in table
    line = profile.processor_line({"ours": (50.2, 0.54), "trl": (61.0, 6.0)})
    assert line.endswith("minippo 50 (0.5), TRL 61 (6.0).")


def test_only_the_last_turn_is_profiled(monkeypatch):
    readings = iter([(10.0, 1.0, 0, 0, 0), (13.0, 1.5, 0, 0, 0)])  # user, system, ...
    monkeypatch.setattr(profile.os, "times", lambda: os.times_result(next(readings)))

    class Seen:
        began = 0

        def begin(self):
            self.began += 1

        def end(self, **facts):
            self.facts = facts

    turns = Seen()
    profiled = profile.Profiled(turns, 2)
    for operations in (set(), {"aten::mm"}):
        profiled.begin()
        torch.ones(4, 4) @ torch.ones(4, 4)
        profiled.end(lengths=[])
        assert set(turns.facts) == {"operations", "processor"}
        assert operations <= set(turns.facts["operations"])
        assert bool(turns.facts["operations"]) == bool(operations)
        assert turns.facts["processor"] == ((3.5, 0.5) if operations else (0.0, 0.0))
    assert turns.began == 2
