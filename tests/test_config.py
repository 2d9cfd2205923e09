"""Every setting: wrong ones are refused by name, all are frozen, each is explained."""

import ast
import dataclasses
import inspect
import math
import re
import typing

import pytest

from minippo import config as config_module
from minippo.config import (
    EvalConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    ValueConfig,
)

STAGES = [PretrainConfig, SFTConfig, RewardConfig, ValueConfig, PPOConfig, EvalConfig, RunConfig]
NAN = float("nan")

# For each config: the fields that must be > 0, and those that must be >= 0.
POSITIVE = {
    PretrainConfig: "steps batch_size lr max_grad_norm vocab_size n_layer n_embd n_head n_positions"
    " save_every",
    SFTConfig: "steps batch_size micro_batch_size lr max_grad_norm max_prompt_tokens"
    " max_response_tokens save_every",
    RewardConfig: "prompts epochs batch_size micro_batch_size lr max_grad_norm held_out"
    " max_prompt_tokens max_response_tokens save_every",
    ValueConfig: "prompts candidates epochs batch_size lr max_grad_norm held_out save_every",
    PPOConfig: "steps batch_size minibatch_size micro_batch_size ppo_epochs lr value_lr"
    " max_grad_norm target_kl kl_horizon clip_range value_clip_range temperature stop_kl"
    " stop_patience max_prompt_tokens max_response_tokens save_every",
    EvalConfig: "prompts temperature max_prompt_tokens max_response_tokens",
    RunConfig: "limit",
}
NOT_NEGATIVE = {
    PretrainConfig: "warmup_steps",
    SFTConfig: "warmup_steps",
    RewardConfig: "warmup_steps",
    ValueConfig: "warmup_steps",
    PPOConfig: "warmup_steps kl_coef kl_loss_coef vf_coef missing_eos_penalty",
    EvalConfig: "best_of samples",
    RunConfig: "seed",
}


def cases(table, values):
    return [(c, name, v) for c, names in table.items() for name in names.split() for v in values]


def case_name(case):
    return getattr(case, "__name__", str(case))


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_accepted(stage):
    assert dataclasses.asdict(stage()) == dataclasses.asdict(stage())


@pytest.mark.parametrize("stage, field, value", cases(POSITIVE, [0, -1, NAN]), ids=case_name)
def test_a_setting_that_must_be_positive_is_refused_by_name(stage, field, value):
    with pytest.raises(ValueError, match=rf"{stage.__name__}\.{field}\b"):
        stage(**{field: value})


@pytest.mark.parametrize("stage, field, value", cases(NOT_NEGATIVE, [-1, NAN]), ids=case_name)
def test_a_negative_setting_is_refused_by_name(stage, field, value):
    with pytest.raises(ValueError, match=rf"{stage.__name__}\.{field}\b"):
        stage(**{field: value})


@pytest.mark.parametrize("stage, field, value", cases(NOT_NEGATIVE, [0]), ids=case_name)
def test_zero_is_allowed_where_it_turns_something_off(stage, field, value):
    assert getattr(stage(**{field: value}), field) == 0


@pytest.mark.parametrize("field", ["gamma", "lam"])
@pytest.mark.parametrize("value", [-0.01, 1.01, NAN])
def test_discounts_outside_zero_to_one_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"PPOConfig\.{field}\b"):
        PPOConfig(**{field: value})


@pytest.mark.parametrize("field", ["gamma", "lam"])
def test_discounts_of_zero_and_one_are_allowed(field):
    assert [getattr(PPOConfig(**{field: v}), field) for v in (0.0, 1.0)] == [0.0, 1.0]


@pytest.mark.parametrize(
    "stage, sizes",
    [
        (PretrainConfig, {"n_head": 3, "n_embd": 128}),
        (SFTConfig, {"micro_batch_size": 48, "batch_size": 64}),
        (SFTConfig, {"micro_batch_size": 128, "batch_size": 64}),
        (RewardConfig, {"micro_batch_size": 5, "batch_size": 16}),
        (PPOConfig, {"minibatch_size": 48, "batch_size": 64}),
        (PPOConfig, {"micro_batch_size": 24, "minibatch_size": 32}),
    ],
    ids=case_name,
)
def test_sizes_that_do_not_divide_are_refused_with_both_names(stage, sizes):
    with pytest.raises(ValueError) as error:
        stage(**sizes)
    assert all(name in str(error.value) for name in sizes)


def test_a_ranking_of_one_candidate_is_refused():
    with pytest.raises(ValueError, match="RewardConfig.candidates"):
        RewardConfig(candidates=1)


def test_an_empty_run_name_is_refused():
    with pytest.raises(ValueError, match="RunConfig.name"):
        RunConfig(name="")


@pytest.mark.parametrize("name, reason", [("kl", "zero"), ("abs", "no divergence")])
def test_kl_loss_estimators_that_optimise_nothing_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match="kl_loss_estimator") as error:
        PPOConfig(kl_loss_estimator=name)
    assert reason in str(error.value) and "full" in str(error.value)


@pytest.mark.parametrize("name", ["full", "mse", "k3"])
def test_kl_loss_estimators_that_follow_a_divergence_are_allowed(name):
    assert PPOConfig(kl_loss_estimator=name, kl_loss_coef=0.1).kl_loss_estimator == name


def literal_fields():
    for stage in STAGES:
        for name, hint in typing.get_type_hints(stage).items():
            if typing.get_origin(hint) is typing.Literal:
                yield stage, name


@pytest.mark.parametrize("stage, field", list(literal_fields()), ids=case_name)
def test_a_choice_outside_the_list_is_refused_by_name(stage, field):
    with pytest.raises(ValueError, match=field):
        stage(**{field: "something else"})


@pytest.mark.parametrize("stage", STAGES)
def test_configs_are_frozen(stage):
    config = stage()
    for field in dataclasses.fields(stage):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_says_what_it_means(stage):
    lines = inspect.getsource(config_module).split("\n")
    tree = ast.parse("\n".join(lines))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == stage.__name__)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    assert [n.target.id for n in fields] == [f.name for f in dataclasses.fields(stage)]
    silent = [n.target.id for n in fields if not explained(lines, n)]
    assert not silent


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_says_what_is_usual(stage):
    """A figure stands in the comment of each number that is no mere on and off."""
    lines = inspect.getsource(config_module).split("\n")
    tree = ast.parse("\n".join(lines))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == stage.__name__)
    numbers = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    numbers = [n for n in numbers if ast.unparse(n.annotation).startswith(("int", "float"))]
    said = {n.target.id: lines[n.end_lineno - 1].partition("#")[2] for n in numbers}
    silent = [name for name, comment in said.items() if not re.search(r"\d", comment)]
    assert silent == ([] if stage is not RunConfig else ["limit"])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("stage, field", [(SFTConfig, "lr"), (PPOConfig, "kl_coef")])
def test_a_number_that_is_not_finite_is_refused_by_name(stage, field, value):
    with pytest.raises(ValueError, match=f"{stage.__name__}.{field} is .*finite"):
        stage(**{field: value})


def test_a_margin_needs_given_pairs():
    with pytest.raises(ValueError, match="--source pairs"):
        RewardConfig(margin=True, source="candidates")
    assert RewardConfig(margin=True, source="pairs").margin


def test_a_variance_needs_two_held_out_prompts():
    with pytest.raises(ValueError, match="ValueConfig.held_out is 1"):
        ValueConfig(held_out=1)


def explained(lines, node):
    """Whether a comment of three letters or more stands behind a field or right above it."""
    behind, above = lines[node.end_lineno - 1].partition("#")[2], lines[node.lineno - 2].strip()
    return len(behind.strip()) > 2 or (above.startswith("#") and len(above) > 4)


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_in_the_defaults_is_finite(stage):
    numbers = [v for v in dataclasses.asdict(stage()).values() if isinstance(v, (int, float))]
    assert all(math.isfinite(v) for v in numbers)


def test_by_default_the_kl_is_charged_once_and_in_the_reward():
    config = PPOConfig()
    assert config.kl_coef > 0 and config.kl_loss_coef == 0 and config.kl_estimator == "kl"
    assert config.target_kl is None and config.advantage == "gae" and config.whiten_advantages
