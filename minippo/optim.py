"""What all trainings share: AdamW as PPO wants it, the schedule, clipping, and what happens after each step."""

import math

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """A loss, reward or gradient became NaN or infinite."""


class Hooks:
    """What a training calls; the default does nothing, so library calls are silent and leave no files.

    `run.py` has the one that draws progress bars, writes metrics and checkpoints, and resumes.
    """

    def start(self, stage: str, total: int, state: dict) -> int:
        """Called once with everything that must be saved; returns the step to begin at, restoring `state`."""
        return 0

    def step(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Called after each finished step with its metrics, which are finite."""


def adamw(models: dict[str, nn.Module], lrs: dict[str, float]) -> torch.optim.AdamW:
    """One AdamW with a parameter group per model; eps 1e-5 as in PPO's reference code (37 details), fused on CUDA."""
    groups = []
    for name, model in models.items():
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups.append({"params": parameters, "lr": lrs[name], "peak_lr": lrs[name], "name": name})
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=on_cuda)


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


def optimizer_step(optimizer, max_grad_norm: float) -> dict[str, Tensor]:
    """Clips each model's gradients, steps, clears them; returns the norms before clipping as grad_norm/NAME."""
    norms = {}
    for group in optimizer.param_groups:
        norms[f"grad_norm/{group['name']}"] = nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def finite_metrics(stage: str, step: int, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics as floats, moved off the device once a step; a NaN or an infinity anywhere stops the training here.

    A mean over minibatches is the flag: one that is not finite makes the mean not finite.
    """
    device = next((v.device for v in metrics.values() if isinstance(v, Tensor)), None)
    flat = [torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in metrics.values()]
    floats = dict(zip(metrics, torch.stack(flat).tolist(), strict=True))
    broken = [name for name, value in floats.items() if not math.isfinite(value)]
    if broken:
        raise NonFiniteError(
            f"{stage}, step {step}: {', '.join(broken)} became NaN or infinite; the last checkpoint is from before. "
            "Lower the learning rate, or look at the rewards with `minippo report`"
        )
    return floats
