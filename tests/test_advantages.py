"""GAE against double sums over plain floats, identities in lambda, and masks with holes."""

import pytest
import torch

from minippo.advantages import gae, simple_advantages

NAN = float("nan")
B, R = 4, 6
PREFIX = torch.arange(R) < torch.tensor([[6], [4], [1], [3]])
HOLES = torch.tensor([
    [1, 0, 1, 1, 0, 1],
    [0, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 0, 0],
    [1, 1, 0, 0, 1, 0],
], dtype=torch.bool)
MASKS = pytest.mark.parametrize("mask", [PREFIX, HOLES], ids=["prefix", "holes"])
GAMMA_LAM = pytest.mark.parametrize(
    "gamma, lam", [(1, 0.95), (0.9, 0.8), (1, 1), (0.9, 0), (0, 0.5)]
)


def random_case(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, R, generator=generator, dtype=torch.float64).unbind()


def gae_by_definition(rewards: list, values: list, gamma: float, lam: float) -> list:
    """The double sum Σ_l (γλ)^l δ_{t+l} over a row of floats without masked tokens."""
    following = values[1:] + [0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following)]
    return [
        sum((gamma * lam) ** (l - t) * deltas[l] for l in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@MASKS
@GAMMA_LAM
def test_gae_equals_the_double_sum_over_the_tokens_that_count(mask, gamma, lam):
    rewards, values = random_case()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(B):
        row_rewards, row_values = rewards[b][mask[b]].tolist(), values[b][mask[b]].tolist()
        expected = gae_by_definition(row_rewards, row_values, gamma, lam)
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        expected_returns = [a + v for a, v in zip(expected, row_values)]
        assert returns[b][mask[b]].tolist() == pytest.approx(expected_returns, rel=1e-10, abs=1e-12)


def test_gae_worked_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 99.0]])
    values = torch.tensor([[4.0, 3.0, 1.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    # deltas: 0 + 3 - 4 = -1;  1 + 1 - 3 = -1;  2 + 0 - 1 = 1
    # advantages, last first: 1;  -1 + 0.5 * 1 = -0.5;  -1 + 0.5 * -0.5 = -1.25
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[-1.25, -0.5, 1.0, 0.0]]
    assert returns.tolist() == [[2.75, 2.5, 2.0, 0.0]]


def test_the_defaults_are_gamma_1_and_lam_095():
    rewards, values = random_case()
    explicit = gae(rewards, values, PREFIX, gamma=1.0, lam=0.95)
    assert all(torch.equal(x, y) for x, y in zip(gae(rewards, values, PREFIX), explicit))


@MASKS
def test_gae_with_lam_1_is_discounted_return_minus_value(mask):
    rewards, values = random_case()
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for b in range(B):
        counted = rewards[b][mask[b]].tolist()
        to_go = [sum(0.9 ** (l - t) * counted[l] for l in range(t, len(counted)))
                 for t in range(len(counted))]
        assert returns[b][mask[b]].tolist() == pytest.approx(to_go, rel=1e-10)


@MASKS
def test_gae_with_lam_0_is_the_td_error(mask):
    rewards, values = random_case()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    for b in range(B):
        counted, after = rewards[b][mask[b]], values[b][mask[b]][1:]
        target = counted + 0.9 * torch.cat([after, after.new_zeros(1)])
        torch.testing.assert_close(returns[b][mask[b]], target)
        torch.testing.assert_close(advantages[b][mask[b]], target - values[b][mask[b]])


def test_gae_with_values_0_and_lam_1_is_the_reward_to_go():
    rewards, values = random_case()
    rewards = rewards.masked_fill(~PREFIX, 0)
    advantages, _ = gae(rewards, torch.zeros_like(values), PREFIX, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, to_go.masked_fill(~PREFIX, 0))


def test_gae_is_0_when_every_value_is_the_sum_of_rewards_to_come():
    rewards, _ = random_case()
    rewards = rewards.masked_fill(~PREFIX, 0)
    exact = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, exact, PREFIX, 1.0, 0.7)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, exact)


@GAMMA_LAM
def test_holes_equal_removing_the_tokens(gamma, lam):
    rewards, values = random_case()
    with_holes = gae(rewards, values, HOLES, gamma, lam)
    for b in range(B):
        kept = HOLES[b]
        full = torch.ones(1, int(kept.sum()), dtype=torch.bool)
        alone = gae(rewards[b : b + 1, kept], values[b : b + 1, kept], full, gamma, lam)
        for ours, theirs in zip(with_holes, alone):
            torch.testing.assert_close(ours[b, kept], theirs[0], rtol=0, atol=0)


def test_zeroing_the_holes_and_recursing_through_them_is_another_number():
    rewards, values = random_case()
    zeroed = rewards.masked_fill(~HOLES, 0), values.masked_fill(~HOLES, 0)
    naive, _ = gae(*zeroed, torch.ones_like(HOLES), 1.0, 0.95)
    assert (naive - gae(rewards, values, HOLES, 1.0, 0.95)[0])[HOLES].abs().max() > 0.1


def test_the_value_after_the_last_token_is_0():
    rewards, values = random_case()
    advantages, _ = gae(rewards, values, PREFIX)
    last = [5, 3, 0, 2]
    for b, t in enumerate(last):
        assert advantages[b, t].item() == pytest.approx((rewards - values)[b, t].item(), rel=1e-12)


@MASKS
def test_masked_positions_come_back_as_0(mask):
    for result in gae(*random_case(), mask):
        assert (result[~mask] == 0).all()


@MASKS
@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e30])
def test_garbage_at_masked_positions_reaches_neither_value_nor_gradient(mask, garbage):
    clean = random_case()
    dirty = [x.masked_fill(~mask, garbage).requires_grad_() for x in clean]
    got, expected = gae(*dirty, mask), gae(*clean, mask)
    for ours, theirs in zip(got, expected):
        assert torch.equal(ours, theirs)
    got[0].square().sum().backward()
    for x in dirty:
        assert x.grad.isfinite().all() and (x.grad[~mask] == 0).all()


def test_padding_on_either_side_changes_nothing():
    rewards, values = random_case()
    expected = gae(rewards, values, PREFIX)
    padded = [torch.nn.functional.pad(x, (2, 3)) for x in (rewards, values, PREFIX)]
    for ours, theirs in zip(gae(*padded), expected):
        torch.testing.assert_close(ours[:, 2:-3], theirs, rtol=0, atol=0)


def test_a_batch_equals_its_rows_alone():
    rewards, values = random_case()
    batch = gae(rewards, values, HOLES)
    for b in range(B):
        row = gae(rewards[b : b + 1], values[b : b + 1], HOLES[b : b + 1])
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(batch, row))


def test_an_empty_row_is_0_and_disturbs_no_other():
    rewards, values = random_case()
    mask = PREFIX.clone()
    mask[1] = False
    advantages, returns = gae(rewards, values, mask)
    assert (advantages[1] == 0).all() and (returns[1] == 0).all()
    assert torch.equal(advantages[0], gae(rewards, values, PREFIX)[0][0])


def test_inputs_stay_as_they_are():
    rewards, values = random_case()
    before = rewards.clone(), values.clone()
    gae(rewards, values, HOLES)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])


@MASKS
def test_gae_passes_gradcheck(mask):
    inputs = [x.requires_grad_() for x in random_case()]
    assert torch.autograd.gradcheck(lambda r, v: gae(r, v, mask, 0.9, 0.8), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    rewards, values = (x.to(dtype) for x in random_case())
    results = [*gae(rewards, values, HOLES), simple_advantages(rewards[:, 0], values[:, 0])]
    assert [result.dtype for result in results] == [dtype] * 3


def test_simple_advantages_is_score_minus_value():
    # the worked number of the course: R = 0.9, V = 0.75
    got = simple_advantages(torch.tensor([0.9, 0.5]), torch.tensor([0.75, 0.8]))
    torch.testing.assert_close(got, torch.tensor([0.15, -0.3]))


def test_simple_advantages_is_gae_of_the_first_token_at_gamma_and_lam_1():
    rewards, values = random_case()
    total = torch.stack([rewards[b][PREFIX[b]].sum() for b in range(B)])
    advantages, _ = gae(rewards, values, PREFIX, 1.0, 1.0)
    torch.testing.assert_close(simple_advantages(total, values[:, 0]), advantages[:, 0])
    assert (gae(rewards, values, PREFIX, 1.0, 0.5)[0][:2, 0] - advantages[:2, 0]).abs().min() > 0.01
