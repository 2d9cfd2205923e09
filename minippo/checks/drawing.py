"""Small random inputs, made so that every one of them is legal."""

import torch
from torch import Generator, Tensor


def normal(generator: Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator)


def integers(generator: Generator, high: int, *shape: int) -> Tensor:
    """Integers from 0 to high - 1."""
    return torch.randint(high, shape, generator=generator)


def mask_of(generator: Generator, rows: int, width: int, holes: bool = False) -> Tensor:
    """True up to a random place of each row, at least two; with holes also False inside."""
    lengths = torch.randint(2, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width) < lengths
    keep = torch.rand(rows, width, generator=generator) < 0.6
    keep[:, 0] = True
    return mask & keep if holes else mask


def logprobs_of(generator: Generator, *shape: int) -> Tensor:
    """Log-probabilities: log-softmaxed over the last axis."""
    return torch.log_softmax(normal(generator, *shape), dim=-1)
