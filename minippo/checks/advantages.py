"""Checks of the advantages."""

import torch

from minippo.checks.checking import Case, Check, Mistake, spoil_masked
from minippo.checks.drawing import mask_of, normal

T, F = True, False

check_simple_advantages = Check(
    name="simple_advantages",
    module="advantages",
    cases=(
        Case(dict(scores=[3.0], values=[1.0]), [2.0]),
        Case(dict(scores=[1.0, -1.0], values=[2.0, -4.0]), [-1.0, 3.0]),
    ),
    draw=lambda g: dict(scores=normal(g, 3), values=normal(g, 3)),
    outputs=("advantages",),
    mistakes=(
        Mistake(
            "the sign is turned: an answer better than expected has a positive advantage",
            lambda scores, values: values - scores,
        ),
        Mistake(
            "the mean score of the batch was subtracted and not each prompt's own value",
            lambda scores, values: scores - scores.mean(),
        ),
        Mistake(
            "the mean value of the batch was subtracted and not each prompt's own",
            lambda scores, values: scores - values.mean(),
        ),
        Mistake("the scores were divided by the values", lambda scores, values: scores / values),
        Mistake("values were added", lambda scores, values: scores + values),
        Mistake(
            "the distance was taken: an answer may be worse than expected too",
            lambda scores, values: (scores - values).abs(),
        ),
    ),
)


def _gae(
    rewards,
    values,
    mask,
    gamma=1.0,
    lam=0.95,
    delta=lambda reward, value, ahead, gamma: reward + gamma * ahead - value,
    carry=lambda gamma, lam, delta, advantage: gamma * lam * advantage,
    after=lambda values: torch.zeros_like(values[:, 0]),
    step=(True, True),
    times=reversed,
    order=reversed,
):
    """GAE with its parts to be got wrong: the TD error, what is carried back from the next token,
    the value after the end, whether (advantage, value) step over holes, the order of the loop, and
    in which order its columns are put together."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    ahead, advantage, columns = after(values), torch.zeros_like(values[:, 0]), []
    for t in times(range(values.shape[1])):
        error = delta(rewards[:, t], values[:, t], ahead, gamma)
        here = mask[:, t] if step[0] else torch.ones_like(mask[:, t])
        advantage = torch.where(here, error + carry(gamma, lam, error, advantage), advantage)
        here = mask[:, t] if step[1] else torch.ones_like(mask[:, t])
        ahead = torch.where(here, values[:, t], ahead)
        columns.append(advantage)
    advantages = torch.stack(list(order(columns)), dim=1).masked_fill(~mask, 0)
    return advantages, advantages + values


def _one_too_early(rewards, values, mask, gamma=1.0, lam=0.95):
    """A loop from the last but one column, so that there is always a next one."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1] - 1)):
        delta = rewards[:, t] + gamma * values[:, t + 1] - values[:, t]
        advantages[:, t] = delta + gamma * lam * advantages[:, t + 1]
    advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


def _unfilled_values(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages, _ = _gae(rewards, values, mask, gamma, lam)
    return advantages, advantages + values


def _rewards_to_go(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages, _ = _gae(rewards, values, mask, gamma, lam)
    return advantages, _gae(rewards, values, mask, gamma, 1.0)[1]


def _from_the_left(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages, _ = _gae(rewards, values, mask, gamma, 0.0)
    advantage, columns = torch.zeros_like(values[:, 0]), []
    for t in range(values.shape[1]):
        advantage = advantages[:, t] + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns, dim=1).masked_fill(~mask, 0)
    return advantages, advantages + values.masked_fill(~mask, 0)


def _unmasked(rewards, values, mask, gamma=1.0, lam=0.95):
    return _gae(rewards, values, torch.ones_like(mask), gamma, lam)


def _filled_but_not_skipped(rewards, values, mask, gamma=1.0, lam=0.95):
    return _unmasked(rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0), mask, gamma, lam)


def _masked_at_the_end(rewards, values, mask, gamma=1.0, lam=0.95):
    found = _unmasked(rewards, values, mask, gamma, lam)
    return tuple(x.masked_fill(~mask, 0) for x in found)


def _targets(make):
    """GAE with right advantages and other returns."""

    def wrong(rewards, values, mask, gamma=1.0, lam=0.95):
        advantages, returns = _gae(rewards, values, mask, gamma, lam)
        return advantages, make(rewards.masked_fill(~mask, 0), advantages, returns, mask)

    return wrong


def _whitened_first(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages, returns = _gae(rewards, values, mask, gamma, lam)
    counted = advantages[mask]
    scale = (counted.var(unbiased=counted.numel() > 1) + 1e-8).sqrt()
    white = ((advantages - counted.mean()) / scale).masked_fill(~mask, 0)
    return white, white + returns - advantages


def _part(**wrong):
    """GAE with one part exchanged."""
    return lambda *args: _gae(*args, **wrong)


check_gae = Check(
    name="gae",
    module="advantages",
    cases=(
        Case(
            dict(rewards=[[1.0]], values=[[0.25]], mask=[[T]], gamma=1.0, lam=0.5),
            ([[0.75]], [[1.0]]),
        ),
        Case(  # the TD errors are 0 + 0.25 - 0.5 and 1 - 0.25
            dict(rewards=[[0.0, 1.0]], values=[[0.5, 0.25]], mask=[[T, T]], gamma=1.0, lam=0.5),
            ([[-0.25 + 0.5 * 0.75, 0.75]], [[0.625, 1.0]]),
        ),
        Case(  # gamma and lambda as they are by default
            dict(rewards=[[0.0, 1.0]], values=[[0.0, 0.0]], mask=[[T, T]]),
            ([[0.95, 1.0]], [[0.95, 1.0]]),
        ),
        Case(  # TD errors 0 + 0.5 * 0.5 - 1 and 2 - 0.5, the pad steps in nowhere
            dict(
                rewards=[[0.0, 2.0, 9.0]],
                values=[[1.0, 0.5, 7.0]],
                mask=[[T, T, F]],
                gamma=0.5,
                lam=0.5,
            ),
            ([[-0.75 + 0.25 * 1.5, 1.5, 0.0]], [[0.625, 2.0, 0.0]]),
        ),
        Case(  # a hole is stepped over: TD errors 1 + 1 - 0.5 and 2 - 1
            dict(
                rewards=[[1.0, 9.0, 2.0]],
                values=[[0.5, 7.0, 1.0]],
                mask=[[T, F, T]],
                gamma=1.0,
                lam=0.5,
            ),
            ([[2.0, 0.0, 1.0]], [[2.5, 0.0, 2.0]]),
            edge=True,
        ),
        Case(  # two holes, and a row that ends in one; gamma lambda is 1/4
            dict(
                rewards=[[1.0, 8.0, 0.0, 8.0, 4.0], [2.0, 8.0, 1.0, 8.0, 8.0]],
                values=[[0.0, 8.0, 2.0, 8.0, 2.0], [1.0, 8.0, 1.0, 8.0, 8.0]],
                mask=[[T, F, T, F, T], [T, F, T, F, F]],
                gamma=0.5,
                lam=0.5,
            ),
            (  # TD errors 1 + 1 - 0, 0 + 1 - 2 and 4 - 2; 2 + 0.5 - 1 and 1 - 1
                [[1.875, 0.0, -0.5, 0.0, 2.0], [1.5, 0.0, 0.0, 0.0, 0.0]],
                [[1.875, 0.0, 1.5, 0.0, 4.0], [2.5, 0.0, 1.0, 0.0, 0.0]],
            ),
            edge=True,
        ),
        Case(  # rows do not touch each other
            dict(
                rewards=[[0.0, 1.0], [2.0, 5.0]],
                values=[[0.5, 0.25], [1.0, 3.0]],
                mask=[[T, T], [T, F]],
                gamma=1.0,
                lam=0.5,
            ),
            ([[0.125, 0.75], [1.0, 0.0]], [[0.625, 1.0], [2.0, 0.0]]),
        ),
    ),
    draw=lambda g: dict(
        rewards=normal(g, 2, 5),
        values=normal(g, 2, 5),
        mask=mask_of(g, 2, 5),
        gamma=0.9,
        lam=0.8,
    ),
    outputs=("advantages", "returns"),
    spoil=spoil_masked("rewards", "values"),
    mistakes=(
        Mistake(
            "the value of the next state was taken at t instead of t + 1",
            _part(delta=lambda reward, value, ahead, gamma: reward + gamma * value - value),
        ),
        Mistake(
            "gamma is missing in the TD error: the next value is discounted",
            _part(delta=lambda reward, value, ahead, gamma: reward + ahead - value),
        ),
        Mistake(
            "the next value is missing in the TD error",
            _part(delta=lambda reward, value, ahead, gamma: reward - value),
        ),
        Mistake(
            "the TD error has its sign turned",
            _part(delta=lambda reward, value, ahead, gamma: value - reward - gamma * ahead),
        ),
        Mistake(
            "the value was added to the TD error and not subtracted",
            _part(delta=lambda reward, value, ahead, gamma: reward + gamma * ahead + value),
        ),
        Mistake(
            "lambda is missing in the recursion: these are returns minus values",
            _part(carry=lambda gamma, lam, delta, advantage: gamma * advantage),
        ),
        Mistake(
            "gamma is missing in the recursion: what comes later fades by gamma times lambda",
            _part(carry=lambda gamma, lam, delta, advantage: lam * advantage),
        ),
        Mistake(
            "the recursion carries nothing back: these are TD errors, lambda = 0",
            _part(carry=lambda gamma, lam, delta, advantage: 0 * advantage),
        ),
        Mistake(
            "the recursion adds the TD error of the same token and not the advantage of the next",
            _part(carry=lambda gamma, lam, delta, advantage: gamma * lam * delta),
        ),
        Mistake(
            "after the last token the value of the last column was used: nothing comes after the "
            "end, so it is 0 there",
            _part(after=lambda values: values[:, -1]),
        ),
        Mistake(
            "the recursion runs from left to right: each token needs the advantage of the next",
            _from_the_left,
        ),
        Mistake(
            "the loop runs from the first column to the last: each token needs the value and the "
            "advantage of the next",
            _part(times=iter, order=iter),
        ),
        Mistake(
            "the loop runs from the first column to the last, and its columns are turned round at "
            "the end: it has to run from the last to the first",
            _part(times=iter),
        ),
        Mistake(
            "the columns are in the order in which the loop made them, the last token first: turn "
            "them round before they are stacked",
            _part(order=iter),
        ),
        Mistake(
            "the loop begins at the last column but one: the last token has an advantage too, with "
            "a next value of 0",
            _one_too_early,
        ),
        Mistake(
            "a masked position inside a row is a step like any other: it is stepped over, as if "
            "it were absent",
            _part(step=(False, False)),
        ),
        Mistake(
            "a masked position inside a row is a step like any other and has an advantage of its "
            "own: it is stepped over, as if it were absent, and stays 0",
            _filled_but_not_skipped,
        ),
        Mistake(
            "the advantage steps over a hole, the next value does not: it is that of the next "
            "token that counts",
            _part(step=(True, False)),
        ),
        Mistake(
            "the next value steps over a hole, the advantage does not: it fades there for nothing",
            _part(step=(False, True)),
        ),
        Mistake("the mask is not used", _unmasked),
        Mistake(
            "rewards and values of masked positions got into the recursion: masking the result "
            "comes too late",
            _masked_at_the_end,
        ),
        Mistake(
            "the returns are the rewards: they are advantages plus values",
            _targets(lambda rewards, advantages, returns, mask: rewards),
        ),
        Mistake(
            "the rewards were added to the advantages to get the returns: the values are added",
            _targets(lambda rewards, advantages, returns, mask: advantages + rewards),
        ),
        Mistake(
            "the returns are the discounted sums of the rewards: here they are advantages plus "
            "values, and agree with that only for lambda = 1",
            _rewards_to_go,
        ),
        Mistake(
            "the returns are not 0 at masked positions: the values were not filled there",
            _unfilled_values,
        ),
        Mistake(
            "the returns are the advantages: the values have to be added",
            _targets(lambda rewards, advantages, returns, mask: advantages),
        ),
        Mistake(
            "the values were subtracted from the advantages to get the returns: they are added",
            _targets(lambda rewards, advantages, returns, mask: 2 * advantages - returns),
        ),
        Mistake(
            "the advantages were whitened before the returns were made: the critic then learns "
            "whitened numbers; whitening comes later, elsewhere",
            _whitened_first,
        ),
    ),
)
