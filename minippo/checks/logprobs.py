"""Checks of the shift, of log-probabilities and of positions."""

import math

import torch

from minippo.checks.checking import Case, Check, Mistake
from minippo.checks.drawing import integers, mask_of, normal

LOG_3 = math.log(3)
LOG_QUARTER, LOG_THREE_QUARTERS = math.log(1 / 4), math.log(3 / 4)

check_response_window = Check(
    name="response_window",
    module="logprobs",
    cases=(
        Case(  # Q = 3, R = 2: the token before the response, and its first token
            dict(x=[[10.0, 11.0, 12.0, 13.0, 14.0]], response_length=2),
            [[12.0, 13.0]],
            {"x": [[0.0, 0.0, 1.0, 1.0, 0.0]]},
        ),
        Case(dict(x=[[7.0, 8.0, 9.0]], response_length=1), [[8.0]]),
        Case(dict(x=[[7.0, 8.0, 9.0]], response_length=2), [[7.0, 8.0]], edge=True),  # Q = 1
        Case(  # a further axis: logits over two tokens; Q = 2, R = 3
            dict(
                x=[[[9.0, 0.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]],
                response_length=3,
            ),
            [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]],
        ),
    ),
    draw=lambda g: dict(x=normal(g, 2, 6, 3), response_length=2),
    mistakes=(
        Mistake(
            "the window stands over the response itself: the output that predicts a token is the "
            "one before it",
            lambda x, response_length: x[:, -response_length:],
        ),
        Mistake(
            "the shift was made twice: the window begins one position too early",
            lambda x, response_length: x[:, -response_length - 2 : -2],
        ),
        Mistake(
            "the last position is still in: it predicts a token that comes after the response",
            lambda x, response_length: x[:, -response_length - 1 :],
        ),
        Mistake(
            "the window stands at the beginning, over the query",
            lambda x, response_length: x[:, :response_length],
        ),
        Mistake(
            "the query is taken to be as long as the response: the window is found from the end",
            lambda x, response_length: x[:, response_length - 1 : -1],
        ),
        Mistake(
            "the last axis was cut and not the second one",
            lambda x, response_length: x[..., -response_length - 1 : -1],
        ),
    ),
)


def _gathered(scores, tokens):
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


check_gather_logprobs = Check(
    name="gather_logprobs",
    module="logprobs",
    cases=(
        Case(
            dict(logits=[[[0.0, 0.0]]], tokens=[[1]]),
            [[math.log(1 / 2)]],
            {"logits": [[[-0.5, 0.5]]]},
        ),
        Case(
            dict(logits=[[[LOG_3, 0.0]]], tokens=[[0]]),  # 3 : 1
            [[LOG_THREE_QUARTERS]],
            {"logits": [[[0.25, -0.25]]]},
        ),
        Case(dict(logits=[[[2 * LOG_3, 0.0]]], tokens=[[1]], temperature=2.0), [[LOG_QUARTER]]),
        Case(dict(logits=[[[0.0, 200.0]]], tokens=[[0]]), [[-200.0]], edge=True),  # exp is 0
        Case(
            dict(logits=[[[LOG_3, 0.0], [0.0, LOG_3]]], tokens=[[0, 0]]),
            [[LOG_THREE_QUARTERS, LOG_QUARTER]],
        ),
    ),
    draw=lambda g: dict(logits=normal(g, 2, 3, 4), tokens=integers(g, 4, 2, 3), temperature=0.7),
    differentiable=("logits",),
    mistakes=(
        Mistake(
            "the shift was made in here: logits and tokens come already one above the other",
            lambda logits, tokens, temperature=1.0: _gathered(
                (logits[:, :-1] / temperature).log_softmax(-1), tokens[:, 1:]
            ),
        ),
        Mistake(
            "the temperature is ignored: the logits are divided by it, as they were in sampling",
            lambda logits, tokens, temperature=1.0: _gathered(logits.log_softmax(-1), tokens),
        ),
        Mistake(
            "the logits were multiplied by the temperature instead of divided by it",
            lambda logits, tokens, temperature=1.0: _gathered(
                (logits * temperature).log_softmax(-1), tokens
            ),
        ),
        Mistake(
            "the log-probabilities were divided by the temperature, not the logits: the result "
            "is not normalised any more",
            lambda logits, tokens, temperature=1.0: _gathered(
                logits.log_softmax(-1) / temperature, tokens
            ),
        ),
        Mistake(
            "the logarithm was taken of the softmax: that is -inf where the probability is too "
            "small for a float; there is one function for both",
            lambda logits, tokens, temperature=1.0: _gathered(
                (logits / temperature).softmax(-1).log(), tokens
            ),
        ),
        Mistake(
            "these are probabilities and not their logarithms",
            lambda logits, tokens, temperature=1.0: _gathered(
                (logits / temperature).softmax(-1), tokens
            ),
        ),
        Mistake(
            "these are the logits of the tokens, not normalised over the vocabulary",
            lambda logits, tokens, temperature=1.0: _gathered(logits / temperature, tokens),
        ),
        Mistake(
            "the likeliest token was looked up and not the given one",
            lambda logits, tokens, temperature=1.0: (logits / temperature).log_softmax(-1).amax(-1),
        ),
        Mistake(
            "the softmax runs over the positions and not over the vocabulary, the last axis",
            lambda logits, tokens, temperature=1.0: _gathered(
                (logits / temperature).log_softmax(1), tokens
            ),
        ),
        Mistake(
            "the sign is turned: this is the negative log-likelihood",
            lambda logits, tokens, temperature=1.0: (
                -_gathered((logits / temperature).log_softmax(-1), tokens)
            ),
        ),
    ),
)


def _counted(attention_mask):
    return attention_mask.long().cumsum(-1)


def _filled_with_1(attention_mask):
    return (_counted(attention_mask) - 1).masked_fill(attention_mask == 0, 1)


check_position_ids = Check(
    name="position_ids",
    module="masking",
    cases=(
        Case(dict(attention_mask=[[True]]), [[0]]),
        Case(dict(attention_mask=[[0, 1, 1]]), [[0, 0, 1]]),
        Case(dict(attention_mask=[[True, True, False]]), [[0, 1, 1]]),
        Case(
            dict(attention_mask=[[False, False, True, True], [True, True, True, True]]),
            [[0, 0, 0, 1], [0, 1, 2, 3]],
        ),
    ),
    draw=lambda g: dict(attention_mask=mask_of(g, 2, 5).flip(1)),
    mistakes=(
        Mistake(
            "padding was counted: a token's position is the number of real tokens before it",
            lambda attention_mask: torch.arange(attention_mask.shape[1]).expand(
                attention_mask.shape
            ),
        ),
        Mistake(
            "the first real token has position 1: it begins at 0",
            lambda attention_mask: _counted(attention_mask),
        ),
        Mistake(
            "left padding has position -1: there is no such row in the table of positions",
            lambda attention_mask: _counted(attention_mask) - 1,
        ),
        Mistake(
            "the count runs over the batch and not along the row",
            lambda attention_mask: (attention_mask.long().cumsum(0) - 1).clamp(min=0),
        ),
        Mistake(
            "padding was given position 1: harmless, but here it keeps the count so far, at "
            "least 0",
            _filled_with_1,
        ),
        Mistake(
            "the real tokens before each position were counted: right at the real tokens, one "
            "too many at padding on the right",
            lambda attention_mask: _counted(attention_mask) - attention_mask.long(),
        ),
    ),
)
