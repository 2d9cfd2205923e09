"""Small random inputs, made so that every one of them is legal."""

import torch
from torch import Generator, Tensor


def normal(generator: Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator)


def integers(generator: Generator, high: int, *shape: int) -> Tensor:
    """Integers from 0 to high - 1."""
    return torch.randint(high, shape, generator=generator)


def mask_of(generator: Generator, rows: int, width: int) -> Tensor:
    """True up to a random place of each row, at least the second."""
    return torch.arange(width) < torch.randint(2, width + 1, (rows, 1), generator=generator)


def logprobs_of(generator: Generator, *shape: int) -> Tensor:
    """Log-probabilities: log-softmaxed over the last axis."""
    return torch.log_softmax(normal(generator, *shape), dim=-1)
