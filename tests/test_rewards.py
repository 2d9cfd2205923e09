"""Scores and KL to per-token rewards, against rows worked by hand and loops over floats."""

import statistics

import pytest
import torch

from minippo.rewards import (
    penalize_missing_eos,
    per_token_rewards,
    prompt_values,
    standardize_scores,
)

EOS = 9
NAN = float("nan")
# A prefix, a single token, the full width, and two rows with holes.
MASK = torch.tensor([
    [1, 1, 1, 0, 0],
    [1, 0, 0, 0, 0],
    [1, 1, 1, 1, 1],
    [1, 0, 1, 0, 0],
    [0, 1, 0, 0, 1],
], dtype=torch.bool)
LAST = [2, 0, 4, 2, 4]


def random_case():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, generator=generator, dtype=torch.float64)
    return scores, torch.randn(5, 5, generator=generator, dtype=torch.float64)


def test_per_token_rewards_worked_by_hand():
    kl = torch.tensor([[1.0, -2.0, 50.0], [4.0, 50.0, 50.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = per_token_rewards(torch.tensor([10.0, 20.0]), kl, mask, 0.5)
    # -0.5 * 1; 10 - 0.5 * -2; masked | 20 - 0.5 * 4; masked; masked
    assert rewards.tolist() == [[-0.5, 11.0, 0.0], [18.0, 0.0, 0.0]]


def test_per_token_rewards_equals_a_loop_also_with_holes():
    scores, kl = random_case()
    got = per_token_rewards(scores, kl, MASK, 0.3)
    for b in range(5):
        for t in range(5):
            expected = -0.3 * kl[b, t].item() if MASK[b, t] else 0.0
            expected += scores[b].item() if t == LAST[b] else 0.0
            assert got[b, t].item() == pytest.approx(expected, rel=1e-12)


def test_rewards_sum_to_score_minus_penalised_kl_per_sequence():
    scores, kl = random_case()
    kl_per_sequence = torch.stack([kl[b][MASK[b]].sum() for b in range(5)])
    total = per_token_rewards(scores, kl, MASK, 0.3).sum(1)
    torch.testing.assert_close(total, scores - 0.3 * kl_per_sequence)


def test_more_kl_is_less_reward():
    scores, kl = random_case()
    less = per_token_rewards(scores, kl, MASK, 0.3) - per_token_rewards(scores, kl + 1, MASK, 0.3)
    torch.testing.assert_close(less, 0.3 * MASK.double())


def test_without_kl_only_the_last_token_is_rewarded():
    scores, kl = random_case()
    rewards = per_token_rewards(scores, kl, MASK, 0.0)
    assert (rewards != 0).sum() == 5
    assert torch.equal(rewards[torch.arange(5), torch.tensor(LAST)], scores)


def test_the_coefficient_may_be_a_tensor():
    scores, kl = random_case()
    coefficient = torch.tensor(0.25, dtype=torch.float64)
    assert torch.equal(per_token_rewards(scores, kl, MASK, coefficient),
                       per_token_rewards(scores, kl, MASK, 0.25))


def test_nan_at_masked_positions_reaches_neither_rewards_nor_gradient():
    scores, kl = random_case()
    dirty = kl.masked_fill(~MASK, NAN).requires_grad_()
    rewards = per_token_rewards(scores, dirty, MASK, 0.3)
    torch.testing.assert_close(rewards.detach(), per_token_rewards(scores, kl, MASK, 0.3))
    rewards.square().sum().backward()
    assert dirty.grad.isfinite().all() and (dirty.grad[~MASK] == 0).all()


def test_inputs_stay_as_they_are():
    scores, kl = random_case()
    before = scores.clone(), kl.clone()
    per_token_rewards(scores, kl, MASK, 0.3)
    penalize_missing_eos(scores, MASK, torch.zeros(5, 5, dtype=torch.long), EOS, 1.0)
    assert torch.equal(scores, before[0]) and torch.equal(kl, before[1])


@pytest.mark.parametrize("eos_id", [EOS, torch.tensor(EOS)])
def test_missing_eos_is_penalised_at_the_last_token_that_counts(eos_id):
    response = torch.tensor([
        [5, 6, EOS, 7, 7],    # ends in EOS
        [5, EOS, 7, 7, 7],    # EOS stands behind the mask: does not count
        [5, EOS, 7, 7, 5],    # EOS before the end: cut at the limit
        [5, 0, EOS, 7, 7],    # holes, ends in EOS
        [EOS, 5, EOS, 7, 6],  # holes, does not end in EOS
    ])
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    got = penalize_missing_eos(scores, MASK, response, eos_id, 1.5)
    assert got.tolist() == [1.0, 0.5, 1.5, 4.0, 3.5]


def test_penalty_is_subtracted_and_keeps_the_order_of_the_scores():
    scores = torch.tensor([-3.0, 0.0, 2.0])
    mask, response = torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.long)
    assert penalize_missing_eos(scores, mask, response, EOS, 1.0).tolist() == [-4.0, -1.0, 1.0]


def test_standardised_reference_scores_have_mean_0_and_deviation_1():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1000, generator=generator, dtype=torch.float64) * 4 + 7
    mean, std = statistics.fmean(scores.tolist()), statistics.stdev(scores.tolist())
    got = standardize_scores(scores, mean, std).tolist()
    assert statistics.fmean(got) == pytest.approx(0, abs=1e-12)
    assert statistics.stdev(got) == pytest.approx(1, rel=1e-12)
    assert standardize_scores(torch.tensor([3.0, 11.0]), 7.0, 4.0).tolist() == [-1.0, 1.0]


def test_prompt_values_is_the_mean_over_the_answers():
    assert prompt_values(torch.tensor([[1.0, 2.0, 6.0], [0.0, -3.0, 0.0]])).tolist() == [3.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    scores, kl = (x.to(dtype) for x in random_case())
    response = torch.zeros(5, 5, dtype=torch.long)
    results = [
        per_token_rewards(scores, kl, MASK, 0.3),
        penalize_missing_eos(scores, MASK, response, EOS, 1.0),
        standardize_scores(scores, 0.5, 2.0),
        prompt_values(kl),
    ]
    assert [result.dtype for result in results] == [dtype] * 4


def test_rewards_pass_gradcheck():
    scores, kl = random_case()
    inputs = scores.requires_grad_(), kl.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, k: per_token_rewards(s, k, MASK, 0.3), inputs)
