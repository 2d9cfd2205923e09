"""What no other test notices of some wrong versions of our functions (see tests/mutants)."""

import copy
import dataclasses

import pytest
import torch
from test_ppo import (
    CONFIG,
    PROMPTS,
    TOKENIZER,
    Recorder,
    models,
    moved_rollout,
    optimizer_of,
    rule,
    train,
)
from torch.distributions import Categorical, kl_divergence

from minippo.batching import batch_plan
from minippo.config import PPOConfig
from minippo.kl import adapt_kl_coef, kl_k1, kl_k3
from minippo.ppo import ppo_loss, ppo_update, train_ppo, update_progress
from minippo.rollout import Rollout, collect_rollout, rollout_metrics

# --- kl -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_stay_unbiased_for_policies_far_apart(estimator):
    # The last token's log-ratio is log(0.2 / 1e-9) = 19: beyond any clamp in use.
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ref = torch.tensor([0.6, 0.4 - 1e-9, 1e-9], dtype=torch.float64)
    expectation = (policy * estimator(policy.log(), ref.log())).sum()
    exact = kl_divergence(Categorical(probs=policy), Categorical(probs=ref))
    torch.testing.assert_close(expectation, exact)


def test_adapt_kl_coef_never_waits_for_the_device():
    # A meta tensor has no data: a comparison on the host raises.
    coef, kl = torch.tensor(0.1, device="meta"), torch.tensor(6.6, device="meta")
    assert adapt_kl_coef(coef, kl, 6.0, 1000, 64).device.type == "meta"


def test_the_controller_is_fed_the_kl_per_sequence():
    config = PPOConfig(target_kl=6.0, kl_horizon=1000, batch_size=64)
    progress = {"kl_coef": 0.1, "best_score": None, "best_step": 0}
    metrics = {"objective/kl_per_sequence": 6.6, "objective/kl_per_token": 0.6}
    update_progress(progress, metrics | {"objective/scores": 0.0}, 0, config)
    # 10% above the target: 0.1 * (1 + 0.1 * 64 / 1000)
    assert progress["kl_coef"] == pytest.approx(0.1 * 1.0064, rel=1e-12)


# --- metrics of a rollout -----------------------------------------------------------------------


def rollout_of(mask, response, **floats):
    """A rollout with this mask and response; what is not given is 0."""
    mask, response = torch.tensor(mask).bool(), torch.tensor(response)
    zeros = torch.zeros(mask.shape)
    tensors = dict.fromkeys((f.name for f in dataclasses.fields(Rollout)), zeros)
    tensors |= {"scores": zeros[:, 0], "raw_scores": zeros[:, 0]}
    given = {name: torch.tensor(value) for name, value in floats.items()}
    return Rollout(**tensors | {"mask": mask, "response": response} | given)


def test_a_hole_in_the_mask_is_not_the_end_of_an_answer():
    # EOS is 1: the first row ends, the second has a hole and does not, the third has its EOS there.
    rollout = rollout_of([[1, 1, 0], [1, 0, 1], [1, 0, 1]], [[5, 1, 0], [5, 6, 7], [5, 1, 7]])
    assert rollout_metrics(rollout, 1)["objective/eos_rate"].item() == pytest.approx(1 / 3)


def test_explained_variance_of_small_returns_by_hand():
    # Returns 0, 0.1, 0.2, 0.3: mean 0.15, variance 0.0125. Errors 0.02, -0.02, 0.02, -0.02: mean 0,
    # variance 0.0004. 1 - 0.0004 / 0.0125 = 0.968
    returns, errors = [[0.0, 0.1, 0.2, 0.3]], [0.02, -0.02, 0.02, -0.02]
    values = [[r - e for r, e in zip(returns[0], errors)]]
    rollout = rollout_of([[1, 1, 1, 1]], [[5, 6, 7, 8]], returns=returns, values=values)
    metrics = rollout_metrics(rollout, 1)
    assert metrics["value/explained_variance"].item() == pytest.approx(0.968, rel=1e-5)


def test_a_rollout_without_options_is_the_first_of_seed_0_on_raw_scores():
    given = (*models(), rule, PROMPTS, TOKENIZER, CONFIG)
    options = {"seed": 0, "step": 0, "score_stats": (0.0, 1.0), "kl_coef": CONFIG.kl_coef}
    options["rows"] = range(len(PROMPTS))
    plain, spelled = collect_rollout(*given), collect_rollout(*given, **options)
    for field in dataclasses.fields(Rollout):
        assert torch.equal(getattr(plain, field.name), getattr(spelled, field.name)), field.name


# --- train_ppo ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options, seed, score_stats", [
    ({}, 0, (0.0, 1.0)),
    ({"seed": 7, "score_stats": (0.5, 2.0)}, 7, (0.5, 2.0)),
])  # fmt: skip
def test_every_rollout_is_keyed_by_seed_step_and_rows(monkeypatch, options, seed, score_stats):
    given = []

    def spy(*args, **named):
        given.append((args[4], named))
        return collect_rollout(*args, **named)

    monkeypatch.setattr("minippo.ppo.collect_rollout", spy)
    config = dataclasses.replace(
        CONFIG, steps=3, batch_size=4, minibatch_size=4, micro_batch_size=4
    )
    train_ppo(*models(), rule, PROMPTS, TOKENIZER, config, **options)
    plan = batch_plan([len(p) for p in PROMPTS], 4, 3, seed)
    assert [prompts for prompts, _ in given] == [[PROMPTS[i] for i in rows] for rows in plan]
    for step, (_, named) in enumerate(given):
        expected = {"seed": seed, "step": step, "rows": plan[step], "score_stats": score_stats}
        assert {name: named[name] for name in expected} == expected


def test_the_statistics_of_an_update_are_norms_before_clipping_and_carry_no_graph():
    config = dataclasses.replace(CONFIG, ppo_epochs=1, max_grad_norm=1e-3, kl_loss_coef=0.5)
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    ppo_loss(policy, ref_policy, value_model, rollout, config)[0].backward()
    pair = {"policy": policy, "value": value_model}
    squares = {name: sum(p.grad.square().sum() for p in m.parameters()) for name, m in pair.items()}
    policy.zero_grad(), value_model.zero_grad()
    given = (policy, ref_policy, value_model, optimizer_of(policy, value_model), rollout, config)
    stats = ppo_update(*given, torch.Generator().manual_seed(0))
    for name, total in squares.items():
        assert float(stats[f"grad_norm/{name}"]) == pytest.approx(float(total) ** 0.5, rel=1e-4)
    assert not any(value.requires_grad for value in stats.values() if torch.is_tensor(value))


class Beginning(Recorder):
    """A recorder that keeps a copy of the progress as it was handed over."""

    def start(self, stage, total, state):
        self.begun = copy.deepcopy(state["progress"])
        return super().start(stage, total, state)


def test_all_that_a_resumed_run_needs_is_handed_to_the_hooks_under_its_name():
    hooks = Beginning()
    train(hooks=hooks)
    assert set(hooks.state) == {"policy", "value", "optimizer", "progress"}
    begun = {"kl_coef": CONFIG.kl_coef, "best_score": None, "best_step": 0, "stopped": False}
    assert hooks.begun == begun
    assert set(hooks.states[-1]["progress"]) == set(begun)


def test_training_stops_beyond_the_limit_of_the_kl_and_not_at_it():
    config = dataclasses.replace(CONFIG, stop_kl=2.5)
    for kl, stops in [(2.5, False), (2.5001, True)]:
        progress = {"kl_coef": 0.1, "best_score": None, "best_step": 0}
        metrics = {"objective/kl_per_sequence": kl, "objective/scores": 0.0}
        assert update_progress(progress, metrics, 0, config) == stops


def test_messages_of_train_ppo_say_what_to_do():
    policy, _, value_model = models()
    message = r"^ref_policy is the policy itself: KL stays 0; pass frozen_copy\(policy\)$"
    with pytest.raises(ValueError, match=message):
        train(trio=(policy, policy, value_model))
    with pytest.raises(ValueError, match=r"^ppo, step 0: objective/"):
        train(score_fn=lambda tokens, *_: torch.full((len(tokens),), torch.nan))
    with pytest.raises(ValueError, match="^there are no rows"):
        train(prompts=[])
