"""Calling a function on a copy of its input, and writing down everything that can be seen of it.

What is seen: the outputs by name, the gradient of the first one, which later outputs still carry a
gradient, which arguments were changed, or the exception. Two functions that look the same on all
trials of a check are the same to it; that is how a known mistake is recognised.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What one call of a function showed."""

    outputs: dict[str, object] = field(default_factory=dict)  # {} if it raised
    gradient: dict[str, Tensor | None] = field(default_factory=dict)  # None: none arrives
    attached: tuple[str, ...] = ()  # later outputs that carry a gradient
    mutated: tuple[str, ...] = ()  # arguments that the call changed
    raised: Exception | None = None


@dataclass(frozen=True)
class Trial:
    """An input, and what the right function shows on it."""

    kind: str  # one of KINDS of checking.py
    arguments: dict[str, object]  # in the order of the signature
    expected: Observation
    differentiable: tuple[str, ...] = ()  # arguments whose gradient is looked at
    rtol: float = 1e-4
    atol: float = 1e-6


def observe(
    fn: Callable,
    arguments: dict[str, object],
    outputs: tuple[str, ...],
    differentiable: tuple[str, ...] = (),
) -> Observation:
    """Calls fn on a copy of the arguments; what it raises is part of what is seen."""
    given = {name: copied(value) for name, value in arguments.items()}
    for name in differentiable:
        given[name].requires_grad_()
    try:
        with torch.enable_grad():
            found = named_outputs(fn(*given.values()), outputs)
            gradient = _gradient(found, {name: given[name] for name in differentiable})
    except Exception as error:  # whatever a student's code raises is what there is to report
        return Observation(raised=error)
    after = {name: _detached(value) for name, value in given.items()}
    changed = [name for name in after if not same(after[name], arguments[name], 0, 0)]
    attached = [name for name, value in list(found.items())[1:] if _has_gradient(value)]
    seen = {name: _detached(value) for name, value in found.items()}
    return Observation(seen, gradient, tuple(attached), tuple(changed))


def named_outputs(result: object, names: tuple[str, ...]) -> dict[str, object]:
    """A result taken apart: {"loss": ..., "stats['ratio']": ...}; a dict by its keys."""
    parts = result if isinstance(result, tuple) and len(names) > 1 else (result,)
    names = (*names, *(f"output {n}" for n in range(len(names) + 1, len(parts) + 1)))
    found = {}
    for name, part in zip(names, parts, strict=False):
        inner = part if isinstance(part, dict) else None
        found |= {name: part} if inner is None else {f"{name}[{k!r}]": v for k, v in inner.items()}
    return found


def same(a: object, b: object, rtol: float, atol: float) -> bool:
    """Whether two values are equal: type, shape, dtype, and numbers up to rounding; NaN is NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or torch.allclose(a, b, rtol, atol, equal_nan=True)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (a != a and b != b)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def same_sight(a: Observation, b: Observation, trial: Trial) -> bool:
    """Whether two functions showed the same on a trial."""
    if a.raised is not None or b.raised is not None:
        return same_error(a.raised, b.raised)
    if (a.attached, a.mutated, a.outputs.keys()) != (b.attached, b.mutated, b.outputs.keys()):
        return False
    pairs = [(a.outputs[name], b.outputs[name]) for name in a.outputs]
    pairs += [(a.gradient[name], b.gradient[name]) for name in a.gradient]
    return all(same(x, y, trial.rtol, trial.atol) for x, y in pairs)


def whole(seen: Observation) -> Observation:
    """All of what was seen."""
    return seen


def first_only(seen: Observation) -> Observation:
    """What was seen of the first output alone: (loss, stats) -> loss."""
    kept = next(iter(seen.outputs), "").partition("[")[0]
    first = {name: x for name, x in seen.outputs.items() if name.partition("[")[0] == kept}
    return Observation(first, raised=seen.raised)


def same_error(a: Exception | None, b: Exception | None) -> bool:
    """Whether two exceptions are of one class, and of one reason if they carry one."""
    return type(a) is type(b) and getattr(a, "reason", None) == getattr(b, "reason", None)


def copied(value: object) -> object:
    """A copy that may be changed."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def as_tensor(value: object) -> object:
    """A list of numbers as a tensor; anything else as it is."""
    return torch.tensor(value) if isinstance(value, list) else value


def as_float64(value: object) -> object:
    """A tensor of floats in double precision; anything else as it is."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _gradient(found: dict[str, object], leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    first = next(iter(found.values()), None)
    if not leaves or not _has_gradient(first):
        return dict.fromkeys(leaves)
    grads = torch.autograd.grad(first.sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, grads, strict=True))


def _has_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
