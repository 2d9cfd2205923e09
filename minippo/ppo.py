"""PPO: a rollout, then a few passes over it with the clipped losses.

KL(policy, ref) stands in three places: in the reward (kl_coef, kl_estimator; rollout.py), in the
loss (kl_loss_coef, kl_loss_estimator), and, always as k1, in what adapts kl_coef and stops the run.
"""

import torch
from torch import Tensor, nn

from minippo.batching import batch_plan, check_context
from minippo.config import PPOConfig
from minippo.engine.gradients import accumulate, check_shares, optimizer_step
from minippo.engine.look import response_logprobs, response_logprobs_and_kl, response_values
from minippo.kl import KL_ESTIMATORS, adapt_kl_coef
from minippo.losses import policy_loss, ppo_objective, value_loss
from minippo.masking import masked_mean
from minippo.optim import Hooks, adamw, finite_metrics, set_learning_rate
from minippo.rollout import Rollout, collect_rollout, rollout_metrics


def ppo_loss(policy, ref_policy, value_model, batch: Rollout, config: PPOConfig):
    """L_policy + vf_coef L_value + kl_loss_coef L_KL on rows of a rollout; loss and statistics.

    There is no entropy bonus. Each loss is a mean over the tokens that count. What batch.* holds
    is the old policy's and the old critic's.
    """
    mask, clip, value_clip = batch.mask, config.clip_range, config.value_clip_range
    # The policy last: the backward pass begins with it, and frees its large logits first.
    values = response_values(value_model, batch)  # (B, R)
    logprobs, kl = logprobs_and_kl(policy, ref_policy, batch, config)  # (B, R)
    pg_loss, pg_stats = policy_loss(logprobs, batch.logprobs, batch.advantages, mask, clip)
    vf_loss, vf_stats = value_loss(values, batch.values, batch.returns, mask, value_clip)
    kl_loss = masked_mean(kl, mask)
    loss = ppo_objective(pg_loss, vf_loss, kl_loss, config.vf_coef, config.kl_loss_coef)
    stats = {"loss/policy": pg_loss, "loss/value": vf_loss, "loss/kl": kl_loss, "loss/total": loss}
    stats |= {f"policy/{name}": value for name, value in pg_stats.items()}
    return loss, stats | {f"value/{name}": value for name, value in vf_stats.items()}


def logprobs_and_kl(policy, ref_policy, batch: Rollout, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """log pi as it is now, and the KL for the loss by the configured estimator; both (B, R).

    With kl_loss_coef = 0 the loss has no KL in it: nothing is computed, and 0 is logged.
    """
    temperature = config.temperature
    if config.kl_loss_coef and config.kl_loss_estimator == "full":
        return response_logprobs_and_kl(policy, ref_policy, batch, temperature)  # ref: no gradient
    logprobs = response_logprobs(policy, batch, temperature)
    if not config.kl_loss_coef:
        return logprobs, torch.zeros_like(logprobs)
    return logprobs, KL_ESTIMATORS[config.kl_loss_estimator](logprobs, batch.ref_logprobs)


def ppo_update(
    policy, ref_policy, value_model, optimizer, rollout: Rollout, config: PPOConfig, generator
) -> dict[str, Tensor]:
    """`ppo_epochs` passes over a rollout; returns the statistics' means over optimizer steps."""

    def loss_of(batch):
        return ppo_loss(policy, ref_policy, value_model, batch, config)

    found = []
    for _ in range(config.ppo_epochs):
        for minibatch in rollout.minibatches(config.minibatch_size, generator):
            # Backward, a few rows at a time, each weighted by its share of the tokens: together
            # the gradient of the token mean over the minibatch.
            stats = accumulate(loss_of, minibatch, config.micro_batch_size)
            # Clips each model's gradients on their own, moves the weights, clears the gradients.
            norms = optimizer_step(optimizer, config.max_grad_norm)
            found.append(stats | norms)
    return {name: sum(stats[name] for stats in found) / len(found) for name in found[0]}


def train_ppo(
    policy, ref_policy, value_model, score_fn, prompts, tokenizer, config: PPOConfig,
    *, score_stats=(0.0, 1.0), seed=0, hooks=None,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains policy and critic in place on tokenised prompts; returns the metrics of each step run.

    score_fn: (tokens (B, T), attention_mask (B, T), query_length) -> scores (B,); a model or a rule
    score_stats: mean and std of its scores on reference samples
    Raises ValueError if a context is too short, ref_policy is the policy itself or score_fn does
    not return (B,), and NonFiniteError when a metric or a weight is NaN or infinite.
    """
    _prepare(policy, ref_policy, value_model, score_fn, prompts, config)
    hooks, history = hooks or Hooks(), []
    models = {"policy": policy, "value": value_model}
    optimizer = adamw(models, {"policy": config.lr, "value": config.value_lr})
    progress = {"kl_coef": config.kl_coef, "best_score": None, "best_step": 0, "stopped": False}
    plan = batch_plan([len(p) for p in prompts], config.batch_size, config.steps, seed)
    state = {**models, "optimizer": optimizer, "progress": progress}
    first = hooks.start("ppo", config.steps, state)  # 0; a resumed run restores the state
    for step in range(first, config.steps):
        if progress["stopped"]:
            break
        set_learning_rate(optimizer, step, config.steps, config.warmup_steps)
        rollout = collect_rollout(
            policy, ref_policy, value_model, score_fn, [prompts[i] for i in plan[step]], tokenizer,
            config, kl_coef=progress["kl_coef"], score_stats=score_stats, seed=seed, step=step,
            rows=plan[step],
        )  # fmt: skip
        # Looked at before the update: a broken score must not reach a weight.
        metrics = finite_metrics("ppo", step, rollout_metrics(rollout, tokenizer.eos_token_id))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        stats = ppo_update(policy, ref_policy, value_model, optimizer, rollout, config, generator)
        metrics["objective/kl_coef"] = progress["kl_coef"]
        history.append(metrics | finite_metrics("ppo", step, stats, optimizer))  # weights as well
        progress["stopped"] = update_progress(progress, history[-1], step, config)
        hooks.step("ppo", step, history[-1])
    return history


def _prepare(policy, ref_policy, value_model, score_fn, prompts, config: PPOConfig) -> None:
    """Refuses what cannot work before anything is done; turns dropout off in all four models."""
    if ref_policy is policy:
        raise ValueError("ref_policy is the policy itself: KL stays 0; pass frozen_copy(policy)")
    if not all(prompts):
        raise ValueError("a prompt has no token: nothing would predict its answer's first; drop it")
    last = min(len(prompts), config.batch_size) % config.minibatch_size
    check_shares(last or config.minibatch_size)  # each process needs a row of each minibatch
    longest = max(map(len, prompts), default=0)
    for model in (policy, ref_policy, value_model, score_fn):
        check_context(model, longest, config.max_response_tokens)
        if isinstance(model, nn.Module):  # a rule is none
            model.eval()


def update_progress(progress: dict, metrics: dict, step: int, config: PPOConfig) -> bool:
    """Adapts kl_coef for the next step, remembers the best score; True if it is time to stop.

    The KL is that of the answers just sampled: k1 summed over an answer, before the update.
    """
    kl, score = metrics["objective/kl_per_sequence"], metrics["objective/scores"]
    if config.target_kl is not None:
        controller = (config.target_kl, config.kl_horizon, config.batch_size)
        progress["kl_coef"] = adapt_kl_coef(progress["kl_coef"], kl, *controller)
    if progress["best_score"] is None or score > progress["best_score"]:
        progress.update(best_score=score, best_step=step)
    too_far = config.stop_kl is not None and kl > config.stop_kl
    patience = config.stop_patience
    return too_far or (patience is not None and step - progress["best_step"] >= patience)
