"""Masked reductions against plain Python floats, torch.var and hand-made rows."""

import math
import statistics

import pytest
import torch

from minippo.masking import masked_mean, masked_var, masked_whiten, response_mask

MASK = torch.tensor([[True, True, False], [False, True, True]])
X = torch.tensor([[1.0, 2.0, 100.0], [-100.0, 4.0, 7.0]])
COUNTED = [1.0, 2.0, 4.0, 7.0]
NAN, INF, EOS = float("nan"), float("inf"), 9


def random_case(seed: int = 0, shape: tuple[int, int] = (4, 7)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 2
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[:, 0] = True
    return x, mask, [x[b, t].item() for b in range(shape[0]) for t in range(shape[1]) if mask[b, t]]


def test_masked_mean_worked_by_hand():
    # (1 + 2 + 4 + 7) / 4 = 3.5; rows (1 + 2) / 2 and (4 + 7) / 2; columns 1, (2 + 4) / 2, 7
    assert masked_mean(X, MASK).item() == 3.5
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 5.5]
    assert masked_mean(X, MASK, dim=0).tolist() == [1.0, 3.0, 7.0]


def test_masked_mean_is_the_mean_of_the_counted_floats():
    x, mask, counted = random_case()
    assert masked_mean(x, mask).item() == pytest.approx(statistics.fmean(counted), rel=1e-12)


@pytest.mark.parametrize(
    "unbiased, oracle", [(True, statistics.variance), (False, statistics.pvariance)]
)
def test_masked_var_is_the_variance_of_the_counted_floats(unbiased, oracle):
    x, mask, counted = random_case()
    assert masked_var(x, mask, unbiased).item() == pytest.approx(oracle(counted), rel=1e-12)
    assert masked_var(X, MASK, unbiased).item() == pytest.approx(oracle(COUNTED), rel=1e-6)


def test_masked_var_is_unbiased_by_default():
    x, mask, counted = random_case()
    assert masked_var(x, mask).item() == pytest.approx(statistics.variance(counted), rel=1e-12)


@pytest.mark.parametrize("unbiased, spread", [(True, statistics.stdev), (False, statistics.pstdev)])
def test_masked_whiten_equals_the_z_scores_of_the_counted_floats(unbiased, spread):
    x, mask, counted = random_case()
    mean, std = statistics.fmean(counted), math.sqrt(spread(counted) ** 2 + 1e-8)
    expected = torch.tensor([(value - mean) / std for value in counted], dtype=torch.float64)
    whitened = masked_whiten(x, mask, unbiased)
    torch.testing.assert_close(whitened[mask], expected, rtol=1e-12, atol=1e-12)
    assert (whitened[~mask] == 0).all()


def test_masked_whiten_gives_mean_0_and_variance_1():
    x, mask, _ = random_case(seed=3)
    counted = masked_whiten(x, mask)[mask].tolist()
    assert statistics.fmean(counted) == pytest.approx(0, abs=1e-12)
    assert statistics.variance(counted) == pytest.approx(1, rel=1e-7)


def test_masked_whiten_forgets_shift_and_scale():
    x, mask, _ = random_case()
    moved = masked_whiten(5 * x - 3, mask)
    torch.testing.assert_close(moved, masked_whiten(x, mask), rtol=1e-7, atol=0)


def test_the_epsilon_of_masked_whiten_is_1e_8():
    # values ±1e-4: variance 1e-8 (biased), so z = 1e-4 / sqrt(1e-8 + 1e-8) = 1 / sqrt(2)
    x, mask = torch.tensor([[1e-4, -1e-4]]).double(), torch.ones(1, 2, dtype=torch.bool)
    assert masked_whiten(x, mask, unbiased=False)[0, 0].item() == pytest.approx(2 ** -0.5, rel=1e-6)


def test_masked_whiten_of_equal_values_is_0_and_not_nan():
    assert (masked_whiten(torch.full((2, 3), 2.0), MASK) == 0).all()


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_garbage_at_masked_positions_reaches_neither_value_nor_gradient(function, garbage):
    x, mask, _ = random_case()
    weights = torch.linspace(1, 2, x.numel(), dtype=x.dtype).view_as(x)  # whitened sums to 0

    def value_and_gradient(fill):
        leaf = x.masked_fill(~mask, fill).requires_grad_()
        value = function(leaf, mask)
        (value * weights).sum().backward()
        return value.detach(), leaf.grad

    for clean, dirty in zip(value_and_gradient(0.0), value_and_gradient(garbage)):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert (value_and_gradient(garbage)[1][~mask] == 0).all()


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
def test_masked_reductions_pass_gradcheck(function):
    x, mask, _ = random_case(shape=(2, 4))
    assert torch.autograd.gradcheck(lambda x: function(x, mask), x.requires_grad_())


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masked_reductions_keep_the_dtype(function, dtype):
    got = function(X.to(dtype), MASK)
    assert got.dtype == dtype
    torch.testing.assert_close(got, function(X.double(), MASK).to(dtype))  # X is exact in all four


def test_masked_reductions_leave_their_inputs_alone():
    x, mask = X.clone(), MASK.clone()
    masked_mean(x, mask), masked_var(x, mask), masked_whiten(x, mask)
    assert torch.equal(x, X) and torch.equal(mask, MASK)


def test_multiplying_by_the_mask_would_not_do():
    dirty = X.masked_fill(~MASK, NAN)
    assert ((dirty * MASK).sum() / MASK.sum()).isnan()
    assert masked_mean(dirty, MASK).item() == 3.5


def test_an_empty_mask_gives_nan_and_not_a_silent_0():
    assert masked_mean(X, torch.zeros_like(MASK)).isnan()


@pytest.mark.parametrize("row, expected", [
    ([5, 6, EOS, 7, 8], [1, 1, 1, 0, 0]),
    ([EOS, 6, 7, 8, 5], [1, 0, 0, 0, 0]),
    ([5, 6, 7, 8, EOS], [1, 1, 1, 1, 1]),
    ([5, 6, 7, 8, 4], [1, 1, 1, 1, 1]),      # never stopped: every token counts
    ([5, EOS, EOS, EOS, EOS], [1, 1, 0, 0, 0]),  # pad is EOS: the first one counts
    ([EOS, EOS, 5, EOS, 6], [1, 0, 0, 0, 0]),
])
def test_response_mask_counts_up_to_and_with_the_first_eos(row, expected):
    for eos_id in (EOS, torch.tensor(EOS)):
        mask = response_mask(torch.tensor([row]), eos_id)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[bool(value) for value in expected]]


def test_response_mask_equals_a_loop_over_python_lists():
    response = torch.randint(0, 4, (50, 8), generator=torch.Generator().manual_seed(0))
    for row, mask in zip(response.tolist(), response_mask(response, 0).tolist()):
        length = row.index(0) + 1 if 0 in row else len(row)
        assert mask == [t < length for t in range(len(row))]
