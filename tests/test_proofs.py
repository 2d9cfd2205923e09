"""What is claimed about the estimators of PPO, proved on a world where every expectation is a sum.

Proved here: the KL estimators as values (sums over whole responses, and by sampling) and as
gradients, in the reward and in the loss; GAE against exact advantages; the policy gradient against
the exact one; what the token mean does to small batches; temperature; the sampler against exact
probabilities; the first ratio; padding from end to end; ppo_loss by finite differences.

Proved elsewhere:
    test_kl.py          k1, k3, k2, abs and full for one token, values and gradients as a loss
    test_advantages.py  lam = 0 is the TD error, lam = 1 return minus value; holes in the mask; NaN
    test_losses.py      each loss by finite differences in float64; NaN where masked; clipping
    test_masking.py     NaN where masked, in value and gradient; finite differences
    test_ppo.py         micro-batches of unequal lengths give the gradient of the whole; NaN
    test_rollout.py     each row equals the row alone; the mask; the first ratio of GPT-2
    test_generation.py  the cache, and splitting or reordering a batch, change no sample
    test_models.py      left and right padding change no logit
    test_oracle.py      the oracle itself

Sampled claims state their z-score, |estimate - exact| / standard error, with fixed seeds.
"""

import dataclasses
import math

import pytest
import torch
from torch import nn

from minippo.advantages import gae
from minippo.config import PPOConfig
from minippo.kl import KL_ESTIMATORS, kl_k1, kl_k2, kl_k3
from minippo.losses import policy_loss
from minippo.masking import masked_mean
from minippo.models import ValueModel, frozen_copy, tiny_gpt2
from minippo.optim import adamw
from minippo.ppo import logprobs_and_kl, ppo_loss, ppo_update
from minippo.rewards import per_token_rewards
from minippo.rollout import Rollout, collect_rollout
from minippo.worlds.oracle import TabularPolicy, TabularValue, World

BETA = 0.6
EXACT = {"rtol": 1e-9, "atol": 1e-12}
LAMBDAS = pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
PPO = PPOConfig(
    batch_size=256, minibatch_size=256, micro_batch_size=256, kl_coef=BETA, lam=1.0,
    whiten_advantages=False, missing_eos_penalty=0.0, value_clip_range=1e6, vf_coef=0.0,
    max_response_tokens=3,
)  # fmt: skip


def uneven_score(words):
    """A score without structure: the letters' codes in a sine."""
    return math.sin(sum(7.0 ** (i + 1) * ord(word) for i, word in enumerate(words)))


def random_table(world, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shape = len(world.states), len(world.words)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


WORLD = World(".abc", 3, uneven_score)
REF, POLICY = random_table(WORLD, 1), random_table(WORLD, 2)
ONE_TOKEN = World(".abcde", 1, uneven_score)


def double(table, world=WORLD):
    """A policy with exactly this table, in float64."""
    model = TabularPolicy(world, table).double()
    model.logits.data.copy_(table)
    return model


def views(logprobs_all, ref=REF, world=WORLD):
    """Log-probabilities of every token of every response under policy and reference, (Y, R)."""
    return world.token_logprobs(logprobs_all), world.token_logprobs(ref)


def mean_of(per_response, logprobs_all, world=WORLD):
    """The exact expectation over responses of the policy: (Y, ...) -> (...)."""
    p = world.response_logprobs(logprobs_all).exp().detach()
    return torch.tensordot(p, per_response, 1)


def gradient(function, table):
    """d function(log-softmax of logits) / d logits, at these logits: (S, V)."""
    leaf = table.clone().requires_grad_()
    function(leaf.log_softmax(-1)).backward()
    return leaf.grad


# --- KL estimators as values ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl", "k3", "full"])
def test_summed_over_a_response_kl_k3_and_full_have_the_exact_kl_as_their_mean(name):
    if name == "full":
        each = KL_ESTIMATORS["full"](POLICY[WORLD.before], REF[WORLD.before])
    else:
        each = KL_ESTIMATORS[name](*views(POLICY))
    total = each.masked_fill(~WORLD.mask, 0).sum(1)
    torch.testing.assert_close(mean_of(total, POLICY), WORLD.kl(POLICY, REF), **EXACT)


@pytest.mark.parametrize("name", ["abs", "mse"])
def test_abs_and_mse_have_another_mean(name):
    total = KL_ESTIMATORS[name](*views(POLICY)).sum(1)
    exact = WORLD.kl(POLICY, REF)
    assert mean_of(total, POLICY) > 1.1 * exact


def test_k3_of_whole_responses_is_unbiased_too_and_another_estimator():
    whole = [x.sum(1) for x in views(POLICY)]
    torch.testing.assert_close(mean_of(kl_k3(*whole), POLICY), WORLD.kl(POLICY, REF), **EXACT)
    assert (kl_k3(*whole) - kl_k3(*views(POLICY)).sum(1)).abs().max() > 0.1


@pytest.mark.parametrize("of", ["responses", "tokens"])
def test_the_bias_of_k2_is_a_sixth_of_the_third_moment_less_a_24th_of_the_fourth(of):
    """E exp(-d) = 1 for d = log pi - log pi_ref; its series gives E[k2] - KL up to fifth order.

    So it is for d of whole responses, and, token by token and summed, for d of a token.
    """
    errors = []
    for distance in (0.2, 0.1, 0.05):
        policy = (REF + distance * random_table(WORLD, 3)).log_softmax(-1)
        pair = views(policy)
        pair = [x.sum(1, keepdim=True) for x in pair] if of == "responses" else pair
        d = kl_k1(*pair)
        bias = mean_of(kl_k2(*pair).sum(1), policy) - WORLD.kl(policy, REF)
        series = mean_of((d**3 / 6 - d**4 / 24).sum(1), policy)
        assert abs(series) > 10 * abs(bias - series)
        errors.append(float((bias - series).abs()))
    # What is left is of fifth order: halving the distance divides it by about 32.
    assert 15 < errors[0] / errors[1] < 50 and 15 < errors[1] / errors[2] < 50


def sampled(config=PPO, table=POLICY, ref=REF, value=None, seed=0, batches=1):
    """Rollouts from the real sampler, of float64 tables."""
    policy, ref_policy, critic = double(table), double(ref), TabularValue(WORLD).double()
    if value is not None:
        critic.values.data.copy_(value)
    prompts = WORLD.prompts(config.batch_size)
    for step in range(batches):
        yield (
            policy,
            ref_policy,
            critic,
            collect_rollout(
                policy,
                ref_policy,
                critic,
                WORLD.score_fn,
                prompts,
                WORLD,
                config,
                seed=seed,
                step=step,
            ),
        )


def z_score(samples, exact):
    """(N, ...) against (...): how many standard errors the mean is off."""
    error = samples.std(0) / len(samples) ** 0.5
    return ((samples.mean(0) - exact) / error.clamp(min=1e-12)).abs()


def test_sampled_kl_and_k3_are_unbiased_and_mse_is_not():
    """8,192 answers of seed 0: |z| < 3 for kl, k3 and full; above 10 for mse."""
    config = dataclasses.replace(PPO, batch_size=8192, minibatch_size=8192)
    exact, z = WORLD.kl(POLICY, REF), {}
    for name in ("kl", "k3", "full", "mse"):
        chosen = dataclasses.replace(config, kl_estimator=name)
        ((*_, rollout),) = sampled(chosen)
        z[name] = float(z_score(rollout.kl.sum(1), exact))
    assert max(z["kl"], z["k3"], z["full"]) < 3 and z["mse"] > 10, z


# --- the sampler ------------------------------------------------------------------------------


def gpt2(seed, width=16, words=4, scale=0.3):
    model = tiny_gpt2(words, n_layer=1, n_embd=width, n_head=2, n_positions=12, eos_id=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["table", "gpt2"])
def test_responses_are_sampled_with_their_exact_probabilities(kind, temperature):
    """8,192 answers of seed 1 through the KV cache, all 40 responses: |z| < 3.5 for each."""
    policy = double(POLICY) if kind == "table" else gpt2(1)
    config = dataclasses.replace(
        PPO, batch_size=8192, minibatch_size=8192, micro_batch_size=8192, temperature=temperature
    )
    rollout = collect_rollout(
        policy, policy, TabularValue(WORLD), WORLD.score_fn, WORLD.prompts(8192), WORLD, config,
        seed=1,
    )  # fmt: skip
    with torch.no_grad():
        exact = WORLD.response_logprobs(WORLD.logprobs_all(policy, temperature))
    rows = (rollout.response[:, None] == WORLD.response[None]).all(-1)
    assert (rows.sum(1) == 1).all()
    p = exact.exp()
    z = (rows.double().mean(0) - p).abs() / (p * (1 - p) / 8192).sqrt()
    assert z.max() < 3.5
    cold = WORLD.response_logprobs(WORLD.logprobs_all(policy)).detach().exp()
    wrong = (rows.double().mean(0) - cold).abs() / (cold * (1 - cold) / 8192).sqrt()
    assert (wrong.max() > 10) == (temperature != 1.0)  # the slip: the temperature forgotten
    # The rollout's own log-probabilities are those of the tempered policy.
    totals = (rows.double() @ exact).to(rollout.logprobs.dtype)
    torch.testing.assert_close(rollout.logprobs.sum(1), totals, rtol=1e-5, atol=1e-5)


# --- KL estimators as gradients ---------------------------------------------------------------


def policy_gradient(advantages, table, world=WORLD):
    """Minus the expected gradient of policy_loss, summed over tokens, by enumeration: (S, V)."""
    p, total = world.response_logprobs(table).exp(), 0.0
    leaf = table.clone().requires_grad_()
    logprobs, old = world.token_logprobs(leaf.log_softmax(-1)), world.token_logprobs(table)
    for y, mask in enumerate(world.mask):
        row = slice(y, y + 1)
        loss, _ = policy_loss(logprobs[row], old[row], advantages[row], mask[None], 0.2)
        total = total - p[y] * mask.sum() * loss
    total.backward()
    return leaf.grad


def reward_gradient(name, table, ref=REF, world=WORLD):
    """What PPO follows when this estimator is charged in the reward, with scores of 0: (S, V)."""
    pair = views(table, ref, world)
    if name == "full":
        pair = table[world.before], ref[world.before]
    kl = KL_ESTIMATORS[name](*pair)
    rewards = per_token_rewards(torch.zeros(len(kl)).double(), kl, world.mask, 1.0)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), world.mask, 1.0, 1.0)
    return policy_gradient(advantages, table, world)


def loss_gradient(name, table, ref=REF, world=WORLD):
    """The expected gradient of the estimator as a loss, summed over tokens: samples are data."""
    p = world.response_logprobs(table).exp()

    def loss(logprobs_all):
        pair = views(logprobs_all, ref, world)
        if name == "full":
            pair = logprobs_all[world.before], ref[world.before]
        return (p * KL_ESTIMATORS[name](*pair).masked_fill(~world.mask, 0).sum(1)).sum()

    return gradient(loss, table)


def test_in_the_reward_kl_follows_the_kl_of_whole_responses():
    expected = gradient(lambda x: -WORLD.kl(x, REF), POLICY)
    torch.testing.assert_close(reward_gradient("kl", POLICY), expected, **EXACT)


@pytest.mark.parametrize("name", ["abs", "mse", "k3", "full"])
def test_in_the_reward_no_other_estimator_follows_the_kl(name):
    expected = gradient(lambda x: -WORLD.kl(x, REF), POLICY)
    got = reward_gradient(name, POLICY)
    assert (got - expected).norm() > 0.2 * expected.norm()


def test_full_in_the_reward_does_not_move_the_token_that_it_is_charged_for():
    table, ref = random_table(ONE_TOKEN, 2), random_table(ONE_TOKEN, 1)
    got = reward_gradient("full", table, ref, ONE_TOKEN)
    assert got.abs().max() < 1e-12  # the same penalty whatever the token
    last = torch.tensor([len(s) == 2 for s in WORLD.states])
    got = reward_gradient("full", POLICY)
    assert got[last].abs().max() < 1e-12 and got[~last].abs().min() > 1e-5


def test_full_in_the_reward_and_in_the_loss_are_two_halves_of_the_kl():
    # The product rule: the loss moves each state's KL, the reward how often a state is visited.
    whole = gradient(lambda x: WORLD.kl(x, REF), POLICY)
    halves = loss_gradient("full", POLICY) - reward_gradient("full", POLICY)
    torch.testing.assert_close(halves, whole, **EXACT)


def test_in_the_reward_k3_follows_the_kl_less_the_reverse_kl():
    table, ref = random_table(ONE_TOKEN, 2), random_table(ONE_TOKEN, 1)
    kl, got = ONE_TOKEN.kl, reward_gradient("k3", table, ref, ONE_TOKEN)
    expected = gradient(lambda x: kl(ref, x) - kl(x, ref), table)
    torch.testing.assert_close(got, expected, **EXACT)


def test_in_the_reward_mse_follows_the_bias_of_k2():
    table, ref = random_table(ONE_TOKEN, 2), random_table(ONE_TOKEN, 1)

    def bias(x):
        log_ratio = (x - ref)[0]
        return (x[0].exp() * log_ratio.square() / 2).sum() - ONE_TOKEN.kl(x, ref)

    expected = gradient(lambda x: -bias(x), table)
    torch.testing.assert_close(
        reward_gradient("mse", table, ref, ONE_TOKEN), expected, **EXACT
    )  # fmt: skip


def test_in_the_loss_full_and_mse_follow_the_kl_of_each_state_as_often_as_it_is_visited():
    reach = WORLD.reach(POLICY)[:, None]
    probabilities, log_ratio = POLICY.exp(), POLICY - REF
    each = (probabilities * log_ratio).sum(1, keepdim=True)
    expected = reach * probabilities * (log_ratio - each)  # d KL / d logit, worked by hand
    torch.testing.assert_close(loss_gradient("full", POLICY), expected, **EXACT)
    torch.testing.assert_close(loss_gradient("mse", POLICY), expected, **EXACT)
    whole = gradient(lambda x: WORLD.kl(x, REF), POLICY)
    assert (expected - whole).norm() > 0.1 * whole.norm()  # what a token does to later KL


def test_in_the_loss_k3_follows_the_reverse_kl_and_kl_nothing():
    reach = WORLD.reach(POLICY)[:, None]
    expected = reach * (POLICY.exp() - REF.exp())  # d KL(ref, pi) / d logit
    torch.testing.assert_close(loss_gradient("k3", POLICY), expected, **EXACT)
    assert loss_gradient("kl", POLICY).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["full", "mse", "k3"])
def test_the_kl_loss_of_ppo_has_the_enumerated_gradient(name):
    """ppo.py's own term, each response weighted by its probability, against the sums above."""
    policy, ref_policy = double(POLICY), double(REF)
    config = dataclasses.replace(PPO, kl_loss_estimator=name, kl_loss_coef=1.0)
    p = WORLD.response_logprobs(POLICY).exp()
    batch = listed_rollout(torch.zeros_like(WORLD.mask, dtype=torch.float64))
    total = 0.0
    for y in range(len(p)):
        row = batch.rows(slice(y, y + 1))
        _, kl = logprobs_and_kl(policy, ref_policy, row, config)
        total = total + p[y] * kl.sum()
    total.backward()
    torch.testing.assert_close(policy.logits.grad, loss_gradient(name, POLICY), **EXACT)


def listed_rollout(advantages, table=POLICY, ref=REF):
    """A rollout of every response once, with these advantages."""
    logprobs, ref_logprobs = views(table, ref)
    zero = torch.zeros_like(logprobs)
    return Rollout(
        WORLD.tokens, WORLD.attention_mask, WORLD.response, WORLD.mask, logprobs, ref_logprobs,
        zero, logprobs - ref_logprobs, zero, WORLD.scores, WORLD.scores, zero, advantages, zero,
    )  # fmt: skip


# --- GAE --------------------------------------------------------------------------------------


def listed_advantages(value, lam, beta=BETA, table=POLICY):
    """GAE of every response, with a critic that says `value` (S,)."""
    rewards = per_token_rewards(WORLD.scores, kl_k1(*views(table)), WORLD.mask, beta)
    return gae(rewards, value[WORLD.before], WORLD.mask, 1.0, lam)[0]


def mean_by_state_and_token(per_token, table=POLICY):
    """E[x_t | state, token] of (Y, R), by summing over all responses: (S, V)."""
    p = WORLD.response_logprobs(table).exp()[:, None] * WORLD.mask
    sums, mass = torch.zeros(2, *table.shape, dtype=torch.float64)
    places = WORLD.before.flatten(), WORLD.response.flatten()
    sums.index_put_(places, (p * per_token).flatten(), accumulate=True)
    mass.index_put_(places, p.flatten(), accumulate=True)
    return sums / mass


@LAMBDAS
def test_with_exact_values_gae_is_the_exact_advantage_for_every_lam(lam):
    values, _, advantages = WORLD.values(POLICY, REF, BETA)
    got = mean_by_state_and_token(listed_advantages(values, lam))
    torch.testing.assert_close(got, advantages, **EXACT)


@LAMBDAS
def test_with_wrong_values_only_lam_1_keeps_the_policy_gradient(lam):
    _, q, _ = WORLD.values(POLICY, REF, BETA)
    wrong = random_table(WORLD, 7)[:, 0]
    advantages = listed_advantages(wrong, lam)
    exact = WORLD.gradient(double(POLICY), REF, BETA)[0]
    got = policy_gradient(advantages, POLICY)
    if lam == 1.0:
        baseline = mean_by_state_and_token(advantages)
        torch.testing.assert_close(baseline, q - wrong[:, None], **EXACT)  # off by a state's number
        torch.testing.assert_close(got, exact, **EXACT)  # which no gradient sees
    else:
        assert (got - exact).norm() > 0.02 * exact.norm()


def test_the_error_that_wrong_values_make_grows_as_lam_falls():
    wrong = random_table(WORLD, 7)[:, 0]
    exact = WORLD.gradient(double(POLICY), REF, BETA)[0]
    got = [policy_gradient(listed_advantages(wrong, lam), POLICY) for lam in (0.95, 0.5, 0.0)]
    errors = [float((g - exact).norm()) for g in got]
    assert errors == sorted(errors) and errors[0] > 0


def test_at_the_optimum_every_sampled_advantage_is_0_not_only_their_mean():
    best, _ = WORLD.optimum(REF, BETA)
    values, _, _ = WORLD.values(best, REF, BETA)
    rewards = per_token_rewards(WORLD.scores, kl_k1(*views(best)), WORLD.mask, BETA)
    for lam in (0.0, 0.95, 1.0):
        advantages, _ = gae(rewards, values[WORLD.before], WORLD.mask, 1.0, lam)
        assert advantages.abs().max() < 1e-10


# --- the policy gradient ----------------------------------------------------------------------


@pytest.mark.parametrize("lam, temperature", [(0.0, 1.0), (0.95, 1.0), (1.0, 1.0), (0.95, 1.6)])
def test_the_sampled_policy_gradient_is_unbiased_for_the_exact_one(lam, temperature):
    """64 rollouts of 256 answers, seed 3, exact critic: max |z| < 4 over the 52 logits.

    At temperature 1.6 the policy that acts, and the reference, are the heated ones.
    """
    hot, hot_ref = ((x / temperature).log_softmax(-1) for x in (POLICY, REF))
    values, _, _ = WORLD.values(hot, hot_ref, BETA)
    model = double(POLICY)
    objective = WORLD.objective(WORLD.logprobs_all(model, temperature), hot_ref, BETA)
    (exact,) = torch.autograd.grad(objective, list(model.parameters()))
    config, estimates = dataclasses.replace(PPO, lam=lam, temperature=temperature), []
    for policy, ref_policy, critic, rollout in sampled(config, value=values, seed=3, batches=64):
        loss, _ = ppo_loss(policy, ref_policy, critic, rollout, config)
        # The loss is a mean over tokens; the objective is one over answers.
        (loss * rollout.mask.sum() / len(rollout.mask)).backward()
        estimates.append(-policy.logits.grad)
        policy.logits.grad = None
    assert z_score(torch.stack(estimates), exact).max() < 4
    mean = torch.stack(estimates).mean(0)
    assert (mean - exact).norm() < 0.05 * exact.norm()


def row_gradients(advantages, table=POLICY):
    """The gradient of each response's own summed objective, and its tokens: (Y, S, V), (Y,)."""
    leaf = table.clone().requires_grad_()
    logprobs = WORLD.token_logprobs(leaf.log_softmax(-1))
    old, rows = WORLD.token_logprobs(table), []
    for y, mask in enumerate(WORLD.mask):
        row = slice(y, y + 1)
        loss, _ = policy_loss(logprobs[row], old[row], advantages[row], mask[None], 0.2)
        (grad,) = torch.autograd.grad(-loss * mask.sum(), leaf, retain_graph=True)
        rows.append(grad)
    return torch.stack(rows), WORLD.mask.sum(1)


def token_mean_gradient(rows, lengths, p, size):
    """E[sum of row gradients / sum of tokens] over batches of `size`: exact, by the lengths.

    Rows are independent, so it is size * E[g / (n + the tokens of the other rows)].
    """
    longest = int(lengths.max())
    of_length = torch.zeros(longest + 1).double().index_add(0, lengths, p)
    others = torch.ones(1).double()  # distribution of the tokens of size - 1 rows
    for _ in range(size - 1):
        wider = torch.zeros(len(others) + longest).double()
        for n, share in enumerate(of_length):
            wider[n : n + len(others)] += share * others
        others = wider
    counts = torch.arange(len(others)).double()
    weight = torch.stack([(others / (n + counts)).sum() for n in lengths])
    return size * torch.tensordot(p * weight, rows, 1)


def test_the_token_mean_biases_small_batches_and_less_the_larger_they_are():
    """1 / tokens is random where answers end by themselves, and it knows the answer's length."""
    values, _, _ = WORLD.values(POLICY, REF, BETA)
    rows, lengths = row_gradients(listed_advantages(values, 1.0))
    p = WORLD.response_logprobs(POLICY).exp()
    goal = torch.tensordot(p, rows, 1) / (p * lengths).sum()
    exact = WORLD.gradient(double(POLICY), REF, BETA)[0] / (p * lengths).sum()
    torch.testing.assert_close(goal, exact, **EXACT)
    bias = {
        size: float((token_mean_gradient(rows, lengths, p, size) - goal).norm() / goal.norm())
        for size in (1, 2, 16, 32, 64)
    }
    assert bias[1] > bias[2] > 0.05
    assert 1.8 < bias[16] / bias[32] < 2.2 and 1.8 < bias[32] / bias[64] < 2.2  # like 1 / size


def test_the_exact_token_mean_of_two_rows_is_that_of_all_pairs():
    rows, lengths = row_gradients(listed_advantages(torch.zeros(len(WORLD.states)).double(), 1.0))
    p = WORLD.response_logprobs(POLICY).exp()
    pairs = sum(
        p[i] * p[j] * (rows[i] + rows[j]) / (lengths[i] + lengths[j])
        for i in range(len(p))
        for j in range(len(p))
    )
    torch.testing.assert_close(token_mean_gradient(rows, lengths, p, 2), pairs, **EXACT)


def test_with_one_length_the_token_mean_is_unbiased_at_any_size():
    fixed = POLICY.clone()
    fixed[:, 0] = -60.0  # EOS has a chance of e^-60: every answer has 3 tokens
    fixed = fixed.log_softmax(-1)
    values, _, _ = WORLD.values(fixed, REF, BETA)
    rows, lengths = row_gradients(listed_advantages(values, 1.0, table=fixed), fixed)
    p = WORLD.response_logprobs(fixed).exp()
    goal = torch.tensordot(p, rows, 1) / 3
    torch.testing.assert_close(token_mean_gradient(rows, lengths, p, 1), goal, rtol=1e-8, atol=1e-9)


def test_whitening_turns_the_small_noise_near_the_optimum_into_a_large_one():
    best, _ = WORLD.optimum(REF, BETA)
    near = (best + 0.01 * random_table(WORLD, 9)).log_softmax(-1)
    values, _, _ = WORLD.values(near, REF, BETA)
    sizes = []
    for whiten in (False, True):
        config = dataclasses.replace(PPO, whiten_advantages=whiten)
        ((*_, rollout),) = sampled(config, table=near, value=values, seed=4)
        sizes.append(float(masked_mean(rollout.advantages.square(), rollout.mask)))
    assert sizes[0] < 1e-3 and sizes[1] == pytest.approx(1, abs=0.01)


# --- the ratio --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_learning_rate_0_every_minibatch_has_log_ratio_0_and_nothing_clipped(
    temperature, monkeypatch
):
    policy, critic = gpt2(1), ValueModel.from_policy(gpt2(3))
    config = dataclasses.replace(
        PPO, batch_size=64, minibatch_size=16, micro_batch_size=8, ppo_epochs=3, vf_coef=1.0,
        temperature=temperature,
    )  # fmt: skip
    ref_policy = frozen_copy(gpt2(2))
    rollout = collect_rollout(
        policy, ref_policy, critic, WORLD.score_fn, WORLD.prompts(64), WORLD, config, seed=0
    )
    optimizer = adamw({"policy": policy, "value": critic}, {"policy": 0.0, "value": 0.0})
    largest = []

    def spy(logprobs, old_logprobs, advantages, mask, clip_range):
        largest.append(float((logprobs - old_logprobs).masked_fill(~mask, 0).detach().abs().max()))
        return policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)

    monkeypatch.setattr("minippo.ppo.policy_loss", spy)
    generator = torch.Generator().manual_seed(0)
    stats = ppo_update(policy, ref_policy, critic, optimizer, rollout, config, generator)
    assert len(largest) == 3 * 64 / 8 and max(largest) <= 1e-5
    assert float(stats["policy/clip_frac"]) == 0 and float(stats["policy/approx_kl"]) < 1e-9
    assert float(stats["grad_norm/policy"]) > 1e-3  # there was something to learn


# --- padding, from generate to the loss -------------------------------------------------------


def weighted_gradients(rows, models, config):
    """Gradients of ppo_loss over rollouts, each weighted by its share of all tokens."""
    policy, ref_policy, critic = models
    policy.zero_grad(), critic.zero_grad()
    total = sum(rollout.mask.sum() for rollout in rows)
    for rollout in rows:
        loss, _ = ppo_loss(policy, ref_policy, critic, rollout, config)
        (loss * rollout.mask.sum() / total).backward()
    return [p.grad.clone() for model in (policy, critic) for p in model.parameters()]


@pytest.mark.parametrize("split", [1, 3])
def test_padding_and_splitting_change_nothing_from_generate_to_the_gradient(split):
    """Prompts of 1 to 5 tokens together, against pieces of `split` rows: other left padding,
    other widths of the response, the same samples, and the same gradient of everything."""
    prompts = [[3, 1, 2, 1, 3], [2], [1, 1, 3], [3, 2], [1], [2, 3, 1, 2], [1, 2]]
    config = dataclasses.replace(
        PPO, batch_size=8, minibatch_size=8, micro_batch_size=8, max_response_tokens=5, lam=0.9,
        kl_loss_coef=0.3, vf_coef=0.5,
    )  # fmt: skip
    models = gpt2(1).double(), frozen_copy(gpt2(2)).double(), ValueModel.from_policy(gpt2(3))
    models[2].double()

    def rule(tokens, attention_mask, query_length):
        response, real = tokens[:, query_length:], attention_mask[:, query_length:]
        return (response * real).sum(1) / 3.0

    def collect(rows):
        chosen = [prompts[i] for i in rows]
        return collect_rollout(*models, rule, chosen, WORLD, config, seed=2, rows=rows)

    together = collect(range(len(prompts)))
    pieces = [collect(range(len(prompts))[i : i + split]) for i in range(0, len(prompts), split)]
    assert len({piece.tokens.shape[1] for piece in pieces}) > 1
    assert len(set(together.mask.sum(1).tolist())) > 1
    for name in ("response", "mask", "logprobs", "values", "rewards", "advantages", "returns"):
        whole = getattr(together, name)
        parts = [getattr(piece, name) for piece in pieces]
        parts = [nn.functional.pad(x, (0, whole.shape[1] - x.shape[1])) for x in parts]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    got, expected = (weighted_gradients(r, models, config) for r in (pieces, [together]))
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert sum(float(g.norm()) for g in expected) > 1e-2


# --- the whole loss by finite differences -----------------------------------------------------


@pytest.mark.parametrize("estimator", ["full", "mse", "k3"])
def test_the_gradient_of_the_whole_loss_is_that_of_finite_differences(estimator):
    config = dataclasses.replace(
        PPO, batch_size=16, vf_coef=0.5, kl_loss_coef=0.3, kl_loss_estimator=estimator, lam=0.9,
        clip_range=0.2, value_clip_range=0.3, minibatch_size=16, micro_batch_size=16,
    )  # fmt: skip
    ((policy, ref_policy, critic, rollout),) = sampled(config, seed=6)
    generator = torch.Generator().manual_seed(0)
    for model in (policy, critic):  # so that ratios are not 1 and values have moved
        for p in model.parameters():
            p.data.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    _, stats = ppo_loss(policy, ref_policy, critic, rollout, config)
    assert 0 < stats["policy/clip_frac"] < 1 and 0 < stats["value/clip_frac"] < 1

    whole = _WholeLoss(policy, critic)

    def loss(logits, values):
        parameters = {"policy.logits": logits, "critic.values": values}
        return torch.func.functional_call(whole, parameters, (ref_policy, rollout, config))

    leaves = [p.detach().clone().requires_grad_() for p in (policy.logits, critic.values)]
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-7)


class _WholeLoss(nn.Module):
    """ppo_loss as a function of the parameters of policy and critic."""

    def __init__(self, policy, critic):
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, ref_policy, rollout, config):
        return ppo_loss(self.policy, ref_policy, self.critic, rollout, config)[0]
