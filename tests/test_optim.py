"""The schedule by hand, clipping per model, one AdamW step by hand, and broken metrics."""

import math

import pytest
import torch
from torch import nn

from minippo.engine.gradients import optimizer_step
from minippo.optim import (
    Hooks,
    NonFiniteError,
    adamw,
    finite_metrics,
    learning_rate_factor,
    set_learning_rate,
)


def linear(width: int, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, 1, bias=False)


def two_models():
    return {"policy": linear(3, 1), "value": linear(5, 2)}


# --- schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, warmup, factors",
    [
        (4, 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        (6, 2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        (3, 5, [1 / 6, 2 / 6, 3 / 6]),
        (1, 0, [1]),
    ],
)
def test_the_learning_rate_warms_up_and_falls_by_hand(total, warmup, factors):
    got = [learning_rate_factor(step, total, warmup) for step in range(total)]
    assert got == pytest.approx(factors, rel=1e-12)


def test_the_learning_rate_would_be_zero_right_after_the_last_step():
    assert learning_rate_factor(10, 10, 3) == 0


def test_each_group_follows_the_schedule_from_its_own_peak():
    optimizer = adamw(two_models(), {"policy": 0.4, "value": 0.8})
    for step, factor in enumerate([1 / 2, 1, 2 / 3, 1 / 3]):
        set_learning_rate(optimizer, step, 4, 1)
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs == pytest.approx([0.4 * factor, 0.8 * factor], rel=1e-12)


# --- AdamW ------------------------------------------------------------------------------------


def test_there_is_one_group_per_model_with_the_eps_of_ppo_and_no_decay():
    models = two_models()
    groups = adamw(models, {"policy": 0.1, "value": 0.2}).param_groups
    assert [g["name"] for g in groups] == ["policy", "value"]
    assert all(g["eps"] == 1e-5 and g["weight_decay"] == 0 for g in groups)
    for group, model in zip(groups, models.values(), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(linear(3, 1), linear(1, 2))
    model[0].requires_grad_(False)
    (group,) = adamw({"policy": model}, {"policy": 0.1}).param_groups
    assert [id(p) for p in group["params"]] == [id(model[1].weight)]


def test_one_step_is_adam_by_hand_on_the_clipped_gradient():
    model = linear(3, 1)
    before, gradient = model.weight.detach().clone(), torch.tensor([[3.0, -4.0, 0.0]])
    optimizer = adamw({"policy": model}, {"policy": 0.1})
    model.weight.grad = gradient.clone()
    optimizer_step(optimizer, 1.0)
    clipped = gradient / 5  # its norm is 5
    # After bias correction the first moments are g and g^2, whatever the betas.
    expected = before - 0.1 * clipped / (clipped.abs() + 1e-5)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-4, atol=1e-6)


# --- clipping ---------------------------------------------------------------------------------


def test_each_models_gradient_is_clipped_on_its_own(monkeypatch):
    models = two_models()
    models["policy"].weight.grad = torch.tensor([[3.0, 4.0, 0.0]])  # norm 5
    models["value"].weight.grad = torch.tensor([[0.1, 0.2, 0.2, 0.0, 0.0]])  # norm 0.3
    optimizer, seen = adamw(models, {"policy": 0.1, "value": 0.1}), {}
    monkeypatch.setattr(
        optimizer,
        "step",
        lambda: seen.update({name: m.weight.grad.clone() for name, m in models.items()}),
    )
    norms = optimizer_step(optimizer, 1.0)
    assert float(norms["grad_norm/policy"]) == pytest.approx(5, rel=1e-6)
    assert float(norms["grad_norm/value"]) == pytest.approx(0.3, rel=1e-6)
    torch.testing.assert_close(seen["policy"], torch.tensor([[0.6, 0.8, 0.0]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen["value"], torch.tensor([[0.1, 0.2, 0.2, 0, 0]]))


def test_gradients_are_cleared_after_a_step():
    models = two_models()
    for model in models.values():
        model.weight.grad = torch.ones_like(model.weight)
    optimizer_step(adamw(models, {"policy": 0.1, "value": 0.1}), 1.0)
    assert all(model.weight.grad is None for model in models.values())


# --- metrics ----------------------------------------------------------------------------------


def test_finite_metrics_returns_floats_under_the_same_keys_in_the_same_order():
    metrics = {"a": torch.tensor(1.5), "b": 2, "c": torch.tensor(0.25, requires_grad=True)}
    floats = finite_metrics("ppo", 3, metrics)
    assert list(floats.items()) == [("a", 1.5), ("b", 2.0), ("c", 0.25)]
    assert all(type(value) is float for value in floats.values())


def test_finite_metrics_takes_plain_numbers_alone():
    assert finite_metrics("sft", 0, {"a": 1, "b": 0.5}) == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_broken_metric_stops_the_training_and_names_stage_step_and_key(broken, kind):
    metrics = {"loss/policy": torch.tensor(1.0), "loss/value": kind(broken)}
    with pytest.raises(NonFiniteError) as error:
        finite_metrics("ppo", 17, metrics)
    message = str(error.value)
    assert "ppo" in message and "17" in message and "loss/value" in message
    assert "loss/policy" not in message


def test_every_broken_metric_is_named():
    metrics = {"x/one": math.nan, "x/two": 1.0, "x/three": math.inf}
    with pytest.raises(NonFiniteError, match="x/one.*x/three"):
        finite_metrics("sft", 0, metrics)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])  # the norm of 1e30 overflows
def test_a_broken_weight_stops_the_training_though_every_metric_is_finite(broken):
    models = two_models()
    optimizer = adamw(models, {"policy": 0.1, "value": 0.1})
    assert finite_metrics("ppo", 3, {"a": 1.0}, optimizer) == {"a": 1.0}  # no metric of its own
    with torch.no_grad():
        models["value"].weight[0, 3] = broken
    with pytest.raises(NonFiniteError, match="ppo, step 3: weights/value became"):
        finite_metrics("ppo", 3, {"a": 1.0}, optimizer)


@pytest.mark.parametrize("stage, scored", [("sft", False), ("ppo", True)])
def test_the_remedy_for_a_broken_metric_is_one_that_the_command_line_takes(stage, scored):
    with pytest.raises(NonFiniteError, match="--overwrite and a lower --lr") as error:
        finite_metrics(stage, 0, {"a": math.nan})
    assert ("score_fn" in str(error.value)) == scored


def test_a_non_finite_error_is_a_value_error():
    assert issubclass(NonFiniteError, ValueError)


# --- hooks ------------------------------------------------------------------------------------


def test_default_hooks_begin_at_step_zero_and_do_nothing():
    hooks, state = Hooks(), {"policy": linear(2, 0)}
    before = state["policy"].weight.detach().clone()
    assert hooks.start("sft", 5, state) == 0
    assert hooks.step("sft", 0, {"loss/lm": 1.0}) is None
    torch.testing.assert_close(state["policy"].weight.detach(), before, rtol=0, atol=0)
