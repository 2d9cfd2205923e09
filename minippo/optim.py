"""What all trainings share: AdamW as PPO wants it, the schedule, the loop and its hooks."""

import math

import torch
from torch import nn

from minippo.batching import batch_plan, check_context
from minippo.engine.gradients import as_floats, optimizer_step, weight_norms


class NonFiniteError(ValueError):
    """A loss, reward, gradient or weight became NaN or infinite."""


class Hooks:
    """What a training calls; the default does nothing: library calls are silent, leave no files.

    `app/run.py` has the ones that draw progress bars, write metrics and checkpoints, and resume.
    """

    def start(self, stage: str, total: int, state: dict) -> int:
        """Called once with all that must be saved; restores it, returns the step to begin at."""
        return 0

    def step(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Called after each finished step with its metrics, which are finite."""


def adamw(models: dict[str, nn.Module], lrs: dict[str, float]) -> torch.optim.AdamW:
    """One AdamW with a parameter group per model, fused: one pass over memory, no copies of it.

    eps is 1e-5 as in PPO's reference code ("37 implementation details").
    """
    groups = []
    for name, model in models.items():
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups.append({"params": parameters, "lr": lrs[name], "peak_lr": lrs[name], "name": name})
    return torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)


def learning_rate_factor(step: int, total: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then linear decay that reaches 0 after the last step."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (total - step) / max(1, total - warmup_steps)


def set_learning_rate(optimizer, step: int, total: int, warmup_steps: int) -> None:
    """Sets every group's learning rate for this step."""
    factor = learning_rate_factor(step, total, warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def finite_metrics(stage: str, step: int, metrics: dict, optimizer=None) -> dict[str, float]:
    """Metrics as floats; NonFiniteError names what is not finite.

    Means over minibatches are enough to see it: one NaN makes the mean NaN.
    optimizer: its weights must be finite as well; a step can break them where the loss is finite
    """
    floats = as_floats(metrics | (weight_norms(optimizer) if optimizer else {}))
    broken = [name for name, value in floats.items() if not math.isfinite(value)]
    if broken:
        message = f"{stage}, step {step}: {', '.join(broken)} became NaN or infinite"
        remedy = "start the stage again with --overwrite and a lower --lr"
        remedy += ", or look at the scores that score_fn returns" if stage == "ppo" else ""
        raise NonFiniteError(f"{message}; {remedy}")
    return {name: floats[name] for name in metrics}


def training_loop(
    stage: str, models: dict, lengths: list[int], gradients, config, *, seed: int, hooks=None
) -> list[dict[str, float]]:
    """The loop that all trainings but PPO share; returns the metrics of each step.

    models: {name: the model that is trained}; without dropout, gradients flow all the same
    lengths: the tokens of each row
    gradients: (indices) -> metrics; leaves the gradients of that batch in the models
    config: its batch_size, steps or epochs, lr, warmup_steps and max_grad_norm are used
    Raises ValueError if a row exceeds the model's context, and NonFiniteError when a metric or a
    weight is NaN or infinite.
    """
    per_epoch = max(1, len(lengths) // config.batch_size)
    total = config.steps if hasattr(config, "steps") else config.epochs * per_epoch
    plan = batch_plan(lengths, config.batch_size, total, seed)
    for model in models.values():
        check_context(model, max(lengths))
        model.eval()
    hooks, history = hooks or Hooks(), []
    optimizer = adamw(models, dict.fromkeys(models, config.lr))
    first = hooks.start(stage, total, {**models, "optimizer": optimizer})
    for step in range(first, total):
        set_learning_rate(optimizer, step, total, config.warmup_steps)
        metrics = gradients(plan[step])
        norms = optimizer_step(optimizer, config.max_grad_norm)
        history.append(finite_metrics(stage, step, metrics | norms, optimizer))
        hooks.step(stage, step, history[-1])
    return history
