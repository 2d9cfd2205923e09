"""Checks of the loop: a rollout, its loss and its updates, beside minippo's own.

What these functions do shows only with models and a batch. So there are no cases on paper: both
answer sixteen questions with the shipped checkpoints and the same random numbers, and everything
that comes out has to agree.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minippo.checks.checking import Exercise, Verdict
from minippo.checks.observing import Observation
from minippo.checks.source import is_stub
from minippo.config import PPOConfig
from minippo.optim import adamw

CONFIG = PPOConfig(batch_size=16, minibatch_size=8, micro_batch_size=8)
TOLERANCE = 1e-4


class Differs(Exception):
    """What a function gives is not what minippo's gives; the text says what and by how much."""


@dataclass(frozen=True, eq=False)
class LoopCheck(Exercise):
    """The check of a function of the loop: `ppo_loss = check_ppo_loss(ppo_loss)`."""

    compare: Callable[[Callable, Callable], None]  # yours and minippo's; raises Differs

    def judge(self, fn: Callable) -> Verdict:
        """What is to be said about a function; nothing is printed, saved or raised."""
        if verdict := self.prejudge(fn):
            return verdict
        try:
            self.compare(fn, self.reference)
        except Differs as difference:
            return self._wrong(str(difference))
        except Exception as error:  # whatever a student's function raises
            if is_stub(fn, Observation(raised=error)):
                return Verdict("unwritten", f"{self.name} is not written yet.")
            return self._wrong(f"it raises {type(error).__name__}: {error}")
        return Verdict("solved", f"{self.name} is right.")


def agree(name: str, found: object, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises Differs unless a tensor (or a number) is the wanted one, to rounding."""
    if not isinstance(found, Tensor | float | int):
        raise Differs(f"{name} has to be a tensor, yours is {type(found).__name__}")
    found = torch.as_tensor(found).detach()
    if found.shape != wanted.shape:
        raise Differs(f"{name} has the shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    far = ~torch.isclose(found.double(), wanted.double(), atol=tolerance, rtol=tolerance)
    if far.any():
        place = tuple(far.nonzero()[0].tolist())
        pair = f"{float(found[place]):.4f} instead of {float(wanted[place]):.4f}"
        where = f" at {list(place)}" if place else ""
        count = f", {int(far.sum())} of {far.numel()} numbers differ" if place else ""
        raise Differs(f"{name} differs from minippo's: {pair}{where}{count}")


def agree_all(name: str, found: object, wanted: dict[str, Tensor]) -> None:
    """Raises Differs unless all entries of a dict are there and agree; it may have others."""
    if not isinstance(found, dict):
        raise Differs(f"{name} has to be a dict, yours is {type(found).__name__}")
    if missing := wanted.keys() - found.keys():
        raise Differs(f"{name} has no {min(missing)}")
    for key, value in wanted.items():
        agree(f"{key!r} of {name}", found[key], torch.as_tensor(value).detach())


@functools.cache
def _shipped() -> dict:
    """What the functions work with, read once: nobody gets these, only copies."""
    # Not above: whoever wants the checks of formulas alone does not wait for the models.
    from minippo.batching import encode_prompt
    from minippo.models import RewardModel, ValueModel, frozen_copy, load_policy, load_tokenizer
    from minippo.tinyhh.rows import prompt_rows

    tokenizer, rows = load_tokenizer("sft"), prompt_rows("ppo", CONFIG.batch_size)
    prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
    reward_model, sft = frozen_copy(RewardModel.load("reward")), load_policy("sft")
    models = {"policy": load_policy("ppo"), "ref_policy": frozen_copy(sft), "sft": sft}
    models |= {"value_model": ValueModel.load("value"), "reward_model": reward_model}
    return models | {"tokenizer": tokenizer, "prompts": prompts}


def _acting(collect: Callable):
    """A rollout of PPO's policy on sixteen questions."""
    given = copy.deepcopy(_shipped())
    names = "policy", "ref_policy", "value_model", "reward_model", "prompts", "tokenizer"
    stats = given["reward_model"].mean, given["reward_model"].std
    return collect(*(given[name] for name in names), CONFIG, score_stats=stats, seed=3)


@functools.cache
def _wanted():
    return _acting(check_collect_rollout.reference)


def compare_rollouts(collect: Callable, own: Callable) -> None:
    """Every field of the two rollouts."""
    wanted, found = _acting(own), _acting(collect)
    if not isinstance(found, type(wanted)):
        raise Differs(f"it has to return a Rollout, yours is {type(found).__name__}")
    for field in fields(wanted):
        agree(field.name, getattr(found, field.name), getattr(wanted, field.name))


def compare_losses(loss_fn: Callable, own: Callable) -> None:
    """Loss, statistics and gradients, for a policy that is not the one of the rollout any more."""

    def parts(loss_fn):
        models, batch = copy.deepcopy(_shipped()), copy.deepcopy(_wanted())
        policy, value_model = models["sft"], models["value_model"]
        parameters = [*policy.parameters(), *value_model.parameters()]
        result = loss_fn(policy, models["ref_policy"], value_model, batch, CONFIG)
        if not isinstance(result, tuple) or len(result) != 2:
            raise Differs("it has to return two things, the loss and a dict")
        loss, stats = result
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise Differs("the loss has no gradient")
        return loss, stats, torch.autograd.grad(loss, parameters, allow_unused=True)

    wanted, found = parts(own), parts(loss_fn)
    agree("the loss", found[0], wanted[0].detach())
    names = ("loss/policy", "loss/value", "policy/approx_kl", "policy/clip_frac", "policy/ratio")
    names += ("value/clip_frac", "value/error")
    agree_all("the stats", found[1], {name: wanted[1][name] for name in names})
    for yours, right in zip(found[2], wanted[2], strict=True):
        yours = torch.zeros_like(right) if yours is None else yours
        agree("a gradient", yours, right, TOLERANCE / 10)


def compare_updates(update: Callable, own: Callable) -> None:
    """The weights of policy and critic after the updates on one rollout, and the statistics."""

    def after(update):
        models, shuffle = copy.deepcopy(_shipped()), torch.Generator().manual_seed(0)
        trained = {"policy": models["policy"], "value": models["value_model"]}
        optimizer = adamw(trained, dict.fromkeys(trained, 1e-4))
        views = trained["policy"], models["ref_policy"], trained["value"]
        stats = update(*views, optimizer, copy.deepcopy(_wanted()), CONFIG, shuffle)
        return {kind: model.state_dict() for kind, model in trained.items()}, stats

    (wanted, wanted_stats), (found, stats) = after(own), after(update)
    for kind, weights in wanted.items():
        for name, right in weights.items():
            agree(f"{name} of the {kind} model after the updates", found[kind][name], right, 1e-5)
    names = ("loss/policy", "loss/value", "grad_norm/policy", "grad_norm/value")
    agree_all("what it returns", stats, {name: wanted_stats[name] for name in names})


check_collect_rollout = LoopCheck("collect_rollout", "rollout", compare_rollouts)
check_ppo_loss = LoopCheck("ppo_loss", "ppo", compare_losses)
check_ppo_update = LoopCheck("ppo_update", "ppo", compare_updates)
