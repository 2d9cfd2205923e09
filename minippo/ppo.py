"""PPO: a rollout, then a few passes over it with the clipped losses."""

import torch
from torch import nn

from minippo.batching import batch_plan, check_context
from minippo.config import PPOConfig
from minippo.distributed import sum_metrics, world
from minippo.kl import KL_ESTIMATORS, adapt_kl_coef
from minippo.logprobs import gather_logprobs
from minippo.losses import policy_loss, ppo_objective, value_loss
from minippo.masking import masked_mean
from minippo.models import counted_logits, counted_values
from minippo.optim import Hooks, adamw, finite_metrics, optimizer_step, set_learning_rate
from minippo.rollout import collect_rollout, rollout_metrics


def ppo_loss(policy, ref_policy, value_model, batch, config: PPOConfig):
    """L_policy + c1 L_value + c2 L_KL on rows of a rollout; returns the loss and its statistics."""
    packed, mask, clip = batch.packed, batch.mask, config.clip_range
    # The backward pass begins with what was computed last: tied embeddings need two tensors of the
    # vocabulary's size at once, best while the critic has no gradients yet.
    values = packed.spread(counted_values(value_model, packed))
    logits = counted_logits(policy, packed)
    logprobs = packed.spread(gather_logprobs(logits, packed.targets, config.temperature))
    pg_loss, pg_stats = policy_loss(logprobs, batch.logprobs, batch.advantages, mask, clip)
    clip = config.value_clip_range
    vf_loss, vf_stats = value_loss(values, batch.values, batch.returns, mask, clip)
    kl_loss = 0.0
    if config.kl_loss_coef:
        kl_loss = kl_penalty_loss(logits, logprobs, ref_policy, batch, config)
    loss = ppo_objective(pg_loss, vf_loss, kl_loss, config.vf_coef, config.kl_loss_coef)
    stats = {"loss/policy": pg_loss, "loss/value": vf_loss, "loss/kl": kl_loss, "loss/total": loss}
    stats |= {f"policy/{name}": value for name, value in pg_stats.items()}
    return loss, stats | {f"value/{name}": value for name, value in vf_stats.items()}


def ppo_update(policy, ref_policy, value_model, optimizer, rollout, config: PPOConfig, generator):
    """`ppo_epochs` passes over a rollout; returns the statistics' means over optimizer steps."""
    sums, norms, count = {}, {}, 0
    for _ in range(config.ppo_epochs):
        for minibatch in rollout.minibatches(config.minibatch_size, generator):
            for batch, share in minibatch.micro_batches(config.micro_batch_size):
                loss, stats = ppo_loss(policy, ref_policy, value_model, batch, config)
                (loss * share).backward()  # shares of the tokens: adds up to the minibatch's mean
                _add(sums, stats, share)
            _add(norms, optimizer_step(optimizer, config.max_grad_norm), 1)
            count += 1
    return {name: total / count for name, total in (sum_metrics(sums) | norms).items()}


def train_ppo(
    policy, ref_policy, value_model, score_fn, prompts, tokenizer, config: PPOConfig,
    score_stats=(0.0, 1.0), seed=0, hooks=None,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains policy and critic in place on tokenised prompts; returns the metrics of each step.

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
    first = hooks.start("ppo", config.steps, state)
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
        acted = finite_metrics("ppo", step, rollout_metrics(rollout, tokenizer.eos_token_id))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        stats = ppo_update(policy, ref_policy, value_model, optimizer, rollout, config, generator)
        acted["objective/kl_coef"] = progress["kl_coef"]
        history.append(acted | finite_metrics("ppo", step, stats, optimizer))
        progress["stopped"] = update_progress(progress, history[-1], step, config)
        hooks.step("ppo", step, history[-1])
    return history


def _prepare(policy, ref_policy, value_model, score_fn, prompts, config: PPOConfig) -> None:
    """Refuses what cannot work before anything is done; turns dropout off in all four models."""
    if ref_policy is policy:
        raise ValueError("ref_policy is the policy itself: KL stays 0; pass frozen_copy(policy)")
    if not all(prompts):
        raise ValueError("a prompt has no token: nothing would predict its answer's first; drop it")
    rows = min(len(prompts), config.batch_size) % config.minibatch_size or config.minibatch_size
    if rows < world():
        message = f"the last minibatch has {rows} rows, too few for {world()} processes"
        raise ValueError(f"{message}; choose sizes that divide each other, or fewer processes")
    longest = max(map(len, prompts), default=0)
    for model in (policy, ref_policy, value_model, score_fn):
        check_context(model, longest, config.max_response_tokens)
        if isinstance(model, nn.Module):  # a rule is none
            model.eval()


def kl_penalty_loss(logits, logprobs, ref_policy, batch, config: PPOConfig):
    """L_KL, the KL as a term of the loss: the token mean of the chosen estimator.

    logits: (N, V) of the tokens that count
    logprobs: (B, R)
    returns: ()
    """
    estimate = KL_ESTIMATORS[config.kl_loss_estimator]
    if config.kl_loss_estimator != "full":
        return masked_mean(estimate(logprobs, batch.ref_logprobs), batch.mask)
    with torch.no_grad():
        ref_logits = counted_logits(ref_policy, batch.packed)
    pair = (torch.log_softmax(x / config.temperature, -1) for x in (logits, ref_logits))
    return estimate(*pair).mean()


def update_progress(progress: dict, metrics: dict, step: int, config: PPOConfig) -> bool:
    """Adapts kl_coef if a target is set, remembers the best score; True if it is time to stop."""
    kl, score = metrics["objective/kl_per_sequence"], metrics["objective/scores"]
    if config.target_kl is not None:
        controller = (config.target_kl, config.kl_horizon, config.batch_size)
        progress["kl_coef"] = adapt_kl_coef(progress["kl_coef"], kl, *controller)
    if progress["best_score"] is None or score > progress["best_score"]:
        progress.update(best_score=score, best_step=step)
    too_far = config.stop_kl is not None and kl > config.stop_kl
    patience = config.stop_patience
    return too_far or (patience is not None and step - progress["best_step"] >= patience)


def _add(sums: dict, values: dict, weight) -> None:
    for name, value in values.items():
        value = value.detach() if torch.is_tensor(value) else value
        sums[name] = sums.get(name, 0.0) + value * weight
