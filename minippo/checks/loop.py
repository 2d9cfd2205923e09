"""Checks of the loop: a rollout, its loss and its updates, beside minippo's own.

What these functions do shows only with models and a batch. So there are no cases on paper: both
answer sixteen questions with the shipped checkpoints and the same random numbers, and everything
that comes out has to agree.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from minippo.checks.checking import Exercise, Verdict
from minippo.checks.observing import Observation
from minippo.checks.source import is_stub, own_line
from minippo.config import PPOConfig
from minippo.optim import adamw

# No setting is left at its default, nor equal to another one: what is forgotten or mixed up, shows.
# Thirty tokens are too few for some of the answers, so that the penalty for a missing EOS counts.
CONFIG = PPOConfig(
    batch_size=16, minibatch_size=8, micro_batch_size=8, max_response_tokens=30, gamma=0.98,
    lam=0.9, kl_coef=0.1, missing_eos_penalty=0.7, clip_range=0.15, value_clip_range=0.3,
    vf_coef=0.5, max_grad_norm=0.1, ppo_epochs=3,
)  # fmt: skip
TOLERANCE = 1e-4
RULES = {  # what is easily got wrong with a field of a rollout
    "values": "values are 0 where the mask is False",
    "raw_scores": "score_fn takes tokens, attention_mask and the length of the query",
    "scores": "raw scores are standardised first, then a missing EOS costs its penalty",
    "kl": "it is log pi minus log pi_ref, by kl_k1",
    "returns": "they are what gae gives, before anything is whitened",
    "advantages": "they are whitened if config.whiten_advantages is True, and only then",
}


class Differs(Exception):
    """What a function gives is not what minippo's gives; the text says what and by how much."""


@dataclass(frozen=True, eq=False)
class LoopCheck(Exercise):
    """The check of a function of the loop: `ppo_loss = check_ppo_loss(ppo_loss)`."""

    compare: Callable[[Callable], None]  # yours with minippo's; raises Differs

    def examine(self, fn: Callable) -> Verdict:
        """The verdict of the comparison."""
        try:
            self.compare(fn)
        except Differs as difference:
            return self._wrong(str(difference))
        except Exception as error:  # whatever a student's function raises
            if is_stub(fn, Observation(raised=error)):
                return Verdict("unwritten", f"{self.name} is not written yet.")
            where = own_line(fn, error)
            line = f" in its line {where[0]}, `{where[1]}`" if where else ""
            return self._wrong(f"it raises {type(error).__name__}{line}: {error}")
        return Verdict("solved", f"{self.name} is right.")


def agree(name: str, found: object, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises Differs unless a tensor (or a number) is the wanted one, to rounding."""
    if not isinstance(found, Tensor | float | int):
        raise Differs(f"{name} has to be a tensor, yours is {_kind(found)}")
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
        raise Differs(f"{name} has to be a dict, yours is {_kind(found)}")
    if missing := wanted.keys() - found.keys():
        has = ", ".join(map(str, found)) or "nothing"
        raise Differs(f"{name} has to have {min(missing)!r}; yours has {has}")
    for key, value in wanted.items():
        agree(f"{key!r} of {name}", found[key], torch.as_tensor(value).detach())


def _kind(found: object) -> str:
    return "None (a return may be missing)" if found is None else type(found).__name__


@functools.cache
def _shipped() -> dict:
    """What the functions work with, read once: nobody gets these, only copies."""
    # Not above: whoever wants the checks of formulas alone does not wait for the models.
    from minippo.batching import encode_prompt
    from minippo.models import Policy, RewardModel, ValueModel, frozen_copy, load_tokenizer
    from minippo.worlds.tinyhh.rows import prompt_rows

    tokenizer, rows = load_tokenizer("sft"), prompt_rows("ppo", CONFIG.batch_size)
    prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
    reward_model = frozen_copy(RewardModel.from_pretrained("reward"))
    sft = Policy.from_pretrained("sft")
    models = {"policy": Policy.from_pretrained("ppo"), "ref_policy": frozen_copy(sft), "sft": sft}
    models |= {"value_model": ValueModel.from_pretrained("value"), "reward_model": reward_model}
    return models | {"tokenizer": tokenizer, "prompts": prompts}


def _acting(collect: Callable, config: PPOConfig = CONFIG):
    """A rollout of PPO's policy on sixteen questions."""
    given = copy.deepcopy(_shipped())
    reward_model = given["reward_model"]

    def score_fn(tokens, attention_mask, query_length):
        first = tokens[:, query_length] % 2  # a taste in first words, to see the query's length
        return reward_model(tokens, attention_mask, query_length) + first

    models = given["policy"], given["ref_policy"], given["value_model"], score_fn
    stats = reward_model.mean, reward_model.std
    return collect(*models, given["prompts"], given["tokenizer"], config, score_stats=stats, seed=3)


@functools.cache
def _wanted(config: PPOConfig = CONFIG):
    return _acting(check_collect_rollout.reference, config)


def compare_rollouts(collect: Callable) -> None:
    """Every field of the two rollouts, with whitening and without."""
    for whiten in (True, False):
        config = replace(CONFIG, whiten_advantages=whiten)
        wanted, found = _wanted(config), _acting(collect, config)
        if not isinstance(found, type(wanted)):
            raise Differs(f"it has to return a Rollout, yours is {_kind(found)}")
        for name in (field.name for field in fields(wanted)):
            try:
                agree(name, getattr(found, name), getattr(wanted, name))
            except Differs as difference:
                rule = RULES.get(name)
                raise Differs(f"{difference}{f': {rule}' if rule else ''}") from None


def compare_losses(loss_fn: Callable) -> None:
    """Loss, statistics and gradients, for models that are not those of the rollout any more."""
    wanted, found = _wanted_loss_parts(), _loss_parts(loss_fn)
    agree("the loss", found[0], wanted[0].detach())
    names = ("loss/policy", "loss/value", "policy/approx_kl", "policy/clip_frac", "policy/ratio")
    names += ("value/clip_frac", "value/error")
    agree_all("the dict of stats", found[1], {name: wanted[1][name] for name in names})
    for kind, gradients in found[2].items():
        if not any(grad.any() for grad in gradients):
            raise Differs(f"no gradient reaches the {kind}: something detaches it on the way")
        for yours, right in zip(gradients, wanted[2][kind], strict=True):
            agree(f"a gradient of the {kind}", yours, right, TOLERANCE / 10)


def _loss_parts(loss_fn: Callable) -> tuple:
    """Loss, stats and {model: its gradients}."""
    models, batch = copy.deepcopy(_shipped()), copy.deepcopy(_wanted())
    trained = {"policy": models["sft"], "critic": models["value_model"]}
    with torch.no_grad():  # a critic that has moved, so that its clip acts
        trained["critic"].classifier.score.weight.mul_(2)
    given = trained["policy"], models["ref_policy"], trained["critic"], batch, CONFIG
    result = loss_fn(*given)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Differs(f"it has to return two things, the loss and a dict; yours is {_kind(result)}")
    loss, stats = result
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise Differs("the loss has no gradient")
    loss.backward()
    return loss, stats, {kind: _gradients(model) for kind, model in trained.items()}


@functools.cache
def _wanted_loss_parts() -> tuple:
    return _loss_parts(check_ppo_loss.reference)


def _gradients(model) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def compare_updates(update: Callable) -> None:
    """The weights of policy and critic after the updates on one rollout, and the statistics."""
    (wanted, wanted_stats), (found, stats) = _wanted_after(), _after(update)
    before = {"policy": _shipped()["policy"], "critic": _shipped()["value_model"]}
    for kind, weights in wanted.items():
        if all(torch.equal(found[kind][n], old) for n, old in before[kind].state_dict().items()):
            raise Differs(f"the {kind} did not move: call backward and optimizer_step each time")
        for name, right in weights.items():
            agree(f"{name} of the {kind} after the updates", found[kind][name], right, 1e-5)
    names = ("loss/policy", "loss/value", "grad_norm/policy", "grad_norm/value")
    agree_all("what it returns", stats, {name: wanted_stats[name] for name in names})


def _after(update: Callable) -> tuple:
    """{model: its weights} after the updates on one rollout, and what the function returned."""
    models, shuffle = copy.deepcopy(_shipped()), torch.Generator().manual_seed(0)
    optimizer = adamw(
        {"policy": models["policy"], "value": models["value_model"]},
        {"policy": 1e-4, "value": 1e-4},
    )
    given = models["policy"], models["ref_policy"], models["value_model"]
    stats = update(*given, optimizer, copy.deepcopy(_wanted()), CONFIG, shuffle)
    kinds = {"policy": "policy", "critic": "value_model"}
    return {kind: models[name].state_dict() for kind, name in kinds.items()}, stats


@functools.cache
def _wanted_after() -> tuple:
    return _after(check_ppo_update.reference)


check_collect_rollout = LoopCheck("collect_rollout", "rollout", compare_rollouts)
check_ppo_loss = LoopCheck("ppo_loss", "ppo", compare_losses)
check_ppo_update = LoopCheck("ppo_update", "ppo", compare_updates)
