"""Checks of the rewards: one score per answer becomes one reward per token."""

import torch

from minippo.checks.checking import Case, Check, Mistake, spoil_masked
from minippo.checks.drawing import mask_of, normal

T, F = True, False


def _last(mask):
    """True at the last True of each row."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def _rewards(scores, kl, mask, kl_coef, where=None):
    """Rewards with the score at the positions `where`, by default the right ones."""
    where = _last(mask) if where is None else where
    penalty = kl_coef * kl.masked_fill(~mask, 0)
    return torch.where(where, scores.unsqueeze(1), 0) - penalty


def _at(mask, column):
    """True in the given column of each row (an int, or (B, 1))."""
    return torch.arange(mask.shape[1]) == torch.as_tensor(column).expand(len(mask), 1)


def _at_first_pad(scores, kl, mask, kl_coef):
    return _rewards(scores, kl, mask, kl_coef, _at(mask, mask.sum(1, keepdim=True)))


def _at_first_pad_masked(scores, kl, mask, kl_coef):
    return _at_first_pad(scores, kl, mask, kl_coef).masked_fill(~mask, 0)


def _whole_kl_at_the_end(scores, kl, mask, kl_coef):
    total = kl.masked_fill(~mask, 0).sum(1)
    return torch.where(_last(mask), (scores - kl_coef * total).unsqueeze(1), 0)


check_per_token_rewards = Check(
    name="per_token_rewards",
    module="rewards",
    cases=(
        Case(dict(scores=[3.0], kl=[[0.5]], mask=[[T]], kl_coef=0.1), [[2.95]]),
        Case(
            dict(scores=[3.0], kl=[[0.5, 0.25, 9.0]], mask=[[T, T, F]], kl_coef=0.1),
            [[-0.05, 2.975, 0.0]],
        ),
        Case(  # a hole: the last token that counts is the third
            dict(scores=[2.0], kl=[[1.0, 1.0, 1.0, 1.0]], mask=[[T, F, T, F]], kl_coef=0.5),
            [[-0.5, 0.0, 1.5, 0.0]],
            edge=True,
        ),
        Case(
            dict(
                scores=[1.0, -2.0],
                kl=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
                mask=[[T, T, T], [T, F, F]],
                kl_coef=0.5,
            ),
            [[-0.05, -0.1, 0.85], [-2.2, 0.0, 0.0]],
        ),
    ),
    draw=lambda g: dict(
        scores=normal(g, 2), kl=normal(g, 2, 4), mask=mask_of(g, 2, 4), kl_coef=0.3
    ),
    outputs=("rewards",),
    spoil=spoil_masked("kl"),
    mistakes=(
        Mistake(
            "the score stands on the first pad, one position after the last token that counts",
            _at_first_pad,
        ),
        Mistake(
            "the score is nowhere: if it was put one position after the last token that counts, "
            "the mask took it away there",
            _at_first_pad_masked,
        ),
        Mistake(
            "the mask of the last token was rolled one to the right: the score stands on the first "
            "pad, and in a full row on the first token",
            lambda *args: _rewards(*args, _last(args[2]).roll(1, dims=1)),
        ),
        Mistake(
            "the score stands in the last column: the last token that counts may come earlier",
            lambda *args: _rewards(*args, _at(args[2], args[2].shape[1] - 1)),
        ),
        Mistake(
            "every token got the whole score: it is given once, at the last token that counts",
            lambda *args: _rewards(*args, args[2]),
        ),
        Mistake(
            "the score stands at the first token",
            lambda *args: _rewards(*args, _at(args[2], 0)),
        ),
        Mistake(
            "the tokens that count were counted to find the last one; where the mask has a hole "
            "it stands further to the right",
            lambda *args: _rewards(*args, _at(args[2], args[2].sum(1, keepdim=True) - 1)),
        ),
        Mistake(
            "the tokens that count were counted to find the last one; where the mask has a hole "
            "that is a place too early, and the mask may take the score away there",
            lambda *args: _rewards(*args, _at(args[2], args[2].sum(1, keepdim=True) - 1) & args[2]),
        ),
        Mistake(
            "the score stands also in a hole before the last token that counts: the count from "
            "the right is 1 there too",
            lambda *args: _rewards(*args, args[2].flip(1).cumsum(1).flip(1) == 1),
        ),
        Mistake(
            "the KL was added: it is a penalty, and is subtracted",
            lambda scores, kl, mask, kl_coef: _rewards(scores, kl, mask, -kl_coef),
        ),
        Mistake(
            "the score took the place of the last token's KL penalty: it is added to it",
            lambda scores, kl, mask, kl_coef: torch.where(
                _last(mask), scores.unsqueeze(1), _rewards(0 * scores, kl, mask, kl_coef)
            ),
        ),
        Mistake(
            "the penalty stands at masked positions too",
            lambda scores, kl, mask, kl_coef: (
                torch.where(_last(mask), scores.unsqueeze(1), 0) - kl_coef * kl
            ),
        ),
        Mistake(
            "the KL was exponentiated: the penalty is the log-ratio, not the ratio",
            lambda scores, kl, mask, kl_coef: (
                torch.where(_last(mask), scores.unsqueeze(1), 0)
                - kl_coef * kl.exp().masked_fill(~mask, 0)
            ),
        ),
        Mistake(
            "the KL of the whole answer was charged at its last token: each token pays its own",
            _whole_kl_at_the_end,
        ),
        Mistake(
            "the score was multiplied by the KL coefficient",
            lambda scores, kl, mask, kl_coef: _rewards(kl_coef * scores, kl, mask, kl_coef),
        ),
        Mistake(
            "the coefficient is missing: the KL counts in full",
            lambda scores, kl, mask, kl_coef: _rewards(scores, kl, mask, 1.0),
        ),
    ),
)

check_prompt_values = Check(
    name="prompt_values",
    module="rewards",
    cases=(
        Case(dict(scores=[[3.0]]), [3.0]),
        Case(dict(scores=[[1.0, 2.0, 6.0]]), [3.0]),
        Case(dict(scores=[[1.0, 3.0], [2.0, 6.0]]), [2.0, 4.0]),
    ),
    draw=lambda g: dict(scores=normal(g, 2, 3)),
    outputs=("values",),
    mistakes=(
        Mistake(
            "the mean runs over the prompts: it is over the K answers to one prompt",
            lambda scores: scores.mean(dim=0),
        ),
        Mistake(
            "everything was averaged to one number: each prompt has its own value",
            lambda scores: scores.mean(),
        ),
        Mistake("the scores were added up and not averaged", lambda scores: scores.sum(dim=1)),
        Mistake(
            "the best answer was taken: the value is what to expect of the policy, the mean",
            lambda scores: scores.amax(dim=1),
        ),
        Mistake("the median was taken and not the mean", lambda scores: scores.median(dim=1)[0]),
        Mistake("the axis of the answers was kept", lambda scores: scores.mean(1, keepdim=True)),
        Mistake("the first answer's score was taken for all", lambda scores: scores[:, 0]),
    ),
)
