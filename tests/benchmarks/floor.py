"""The floating-point operations that one PPO step cannot do without, for a GPT-2.

Counted are the matrix products, a multiply and an add being two operations, of real tokens only:
every token goes once through every layer of a forward pass, and the vocabulary projection is made
for response tokens alone. Not counted are softmax, norms, activations, sampling and AdamW, none of
which is a matrix product. So the time of these operations, at the rate of large products, is one
that no implementation of the algorithm goes below as long as it does them all.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What decides the operations of a GPT-2."""

    n_layer: int
    n_embd: int
    vocab_size: int


def trunk_flops(shape: Shape, tokens: int) -> int:
    """One forward pass of `tokens` tokens through the layers, without any head.

    A layer has 12 H^2 weights in its matrices, and token i attends to i tokens, which is 2 i H
    operations for the scores and as many for the weighted sum.
    """
    matrices = 24 * shape.n_embd**2 * tokens
    attention = 2 * shape.n_embd * tokens * (tokens + 1)
    return shape.n_layer * (matrices + attention)


def policy_flops(shape: Shape, query: int, response: int) -> int:
    """Logits of every response token; the last one predicts nothing and is not read.

    Sampling over a cache costs exactly the same.
    """
    projection = 2 * shape.n_embd * shape.vocab_size * response
    return trunk_flops(shape, query + response - 1) + projection


def value_flops(shape: Shape, query: int, response: int) -> int:
    """Values before every response token."""
    return trunk_flops(shape, query + response - 1) + 2 * shape.n_embd * response


def score_flops(shape: Shape, query: int, response: int) -> int:
    """The reward model's score at the last token."""
    return trunk_flops(shape, query + response) + 2 * shape.n_embd


def step_flops(shape: Shape, lengths: list[tuple[int, int]], ppo_epochs: int) -> int:
    """One PPO step on answers of the given (query, response) lengths.

    Acting: sampling, which gives the log-probabilities as well, the reference, the critic, the
    score. Learning: in every epoch a forward pass of policy and critic, and a backward pass, which
    is two products for each of the forward's.
    """
    total = 0
    for query, response in lengths:
        policy, value = policy_flops(shape, query, response), value_flops(shape, query, response)
        acting = 2 * policy + value + score_flops(shape, query, response)
        total += acting + 3 * ppo_epochs * (policy + value)
    return total
