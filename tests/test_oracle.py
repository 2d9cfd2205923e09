"""The oracle against what is independent of it: plain Python over strings, recursions, identities.

The oracle grades the rest of the package, so nothing here takes a number from it on trust.
"""

import copy
import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from minippo.engine.passes import token_logits
from minippo.generation import generate, row_uniforms, sample_tokens
from minippo.models import frozen_copy, tiny_gpt2
from minippo.worlds.oracle import (
    TabularPolicy,
    TabularValue,
    World,
    feelings_score,
    feelings_world,
)

BETA = 0.7
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def uneven_score(words):
    """A score without structure: the letters' codes in a sine."""
    return math.sin(sum(7.0 ** (i + 1) * ord(word) for i, word in enumerate(words)))


def random_policy(world, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = len(world.states), len(world.words)
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def gpt2(vocab_size, seed=0):
    model = tiny_gpt2(vocab_size, n_layer=1, n_embd=16, n_head=2, n_positions=8, eos_id=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def world():
    return World(".abc", 3, uneven_score)


@pytest.fixture(scope="module")
def ref(world):
    return random_policy(world, 1)


@pytest.fixture(scope="module")
def policy(world):
    return random_policy(world, 2)


class Brute:
    """The same world in plain Python: a dict from each response, as a string, to its numbers."""

    def __init__(self, world, logprobs_all, ref_logprobs_all):
        words = "".join(world.words)
        rows = {"".join(world.text(s)): i for i, s in enumerate(world.states)}

        def probability(y, table):
            steps = [float(table[rows[y[:t]], words.index(y[t])]) for t in range(len(y))]
            return math.exp(sum(steps))

        strings = set()
        for letters in itertools.product(words, repeat=world.length):
            y = "".join(letters)
            strings.add(y[: y.index(".") + 1] if "." in y else y)
        self.p = {y: probability(y, logprobs_all) for y in strings}
        self.q = {y: probability(y, ref_logprobs_all) for y in strings}
        self.r = {y: uneven_score(y) for y in strings}

    def tilted(self, beta):
        weights = {y: self.q[y] * math.exp(self.r[y] / beta) for y in self.q}
        total = sum(weights.values())
        return {y: weight / total for y, weight in weights.items()}, total


@pytest.fixture(scope="module")
def brute(world, policy, ref):
    return Brute(world, policy, ref)


def by_string(world, numbers):
    """{response as a string: its number}"""
    return {"".join(world.text(y)): float(x) for y, x in zip(world.responses, numbers)}


# --- what there is ----------------------------------------------------------------------------


@pytest.mark.parametrize("v, length", [(2, 1), (2, 4), (4, 3), (5, 3), (6, 4)])
def test_every_response_is_listed_once(v, length):
    world = World(".abcde"[:v], length, len)
    listed = [world.text(y) for y in world.responses]
    expected = set()
    for letters in itertools.product(world.words, repeat=length):
        cut = letters.index(".") + 1 if "." in letters else length
        expected.add(letters[:cut])
    assert len(listed) == len(set(listed)) and set(listed) == expected
    others = v - 1
    assert len(world.states) == sum(others**t for t in range(length))
    assert len(listed) == len(world.states) + others**length  # each state may end, or be cut
    assert world.scores.tolist() == [len(words) for words in listed]


def test_responses_follow_the_contract_of_shapes_and_masks(world):
    for i, y in enumerate(world.responses):
        assert world.response[i, : len(y)].tolist() == list(y)
        assert world.mask[i].tolist() == [t < len(y) for t in range(world.length)]
    assert torch.equal(world.tokens[:, 1:], world.response) and (world.tokens[:, 0] == 0).all()
    assert torch.equal(world.attention_mask[:, 1:], world.mask) and world.attention_mask[:, 0].all()


@pytest.mark.parametrize("words, length", [(".abcdef", 2), (".a", 5), (".", 2), (".ab", 0)])
def test_a_world_that_cannot_be_listed_is_refused(words, length):
    with pytest.raises(ValueError, match=f"{len(words)} words, length {length}"):
        World(words, length, len)


def test_score_fn_looks_up_the_response_whatever_the_padding(world):
    for pad in (0, 2):  # in front of the prompt, as for prompts of other lengths
        tokens = torch.nn.functional.pad(world.tokens, (pad, 0), value=3)
        mask = torch.nn.functional.pad(world.attention_mask, (pad, 0))
        got = world.score_fn(tokens, mask, pad + 1)
        assert by_string(world, got) == {
            "".join(world.text(y)): uneven_score(world.text(y)) for y in world.responses
        }


def test_score_fn_refuses_a_response_that_has_not_ended(world):
    with pytest.raises(ValueError, match="not ended"):
        world.score_fn(torch.tensor([[0, 1, 0], [0, 1, 2]]), torch.ones(2, 3).bool(), 1)


def test_score_fn_refuses_a_response_that_is_longer_than_the_world(world):
    tokens = torch.tensor([[0, 1, 2, 3, 1]])
    with pytest.raises(ValueError, match="max_response_tokens=3"):
        world.score_fn(tokens, torch.ones(1, 5).bool(), 1)
    padded = torch.tensor([[True, True, True, True, False]])  # the fourth token is padding
    assert world.score_fn(tokens, padded, 1).shape == (1,)


# --- a policy, exactly ------------------------------------------------------------------------


def test_probabilities_of_responses_are_those_of_plain_python(world, policy, brute):
    got = by_string(world, world.response_logprobs(policy).exp())
    assert got == pytest.approx(brute.p, rel=1e-12)
    assert sum(got.values()) == pytest.approx(1, abs=1e-12)


def test_reach_is_the_share_of_responses_through_a_state(world, policy, brute):
    expected = [
        sum(p for y, p in brute.p.items() if y.startswith("".join(world.text(state))))
        for state in world.states
    ]
    assert world.reach(policy).tolist() == pytest.approx(expected, rel=1e-12)


def test_kl_is_that_of_plain_python_in_both_directions(world, policy, ref, brute):
    forward = sum(p * math.log(p / brute.q[y]) for y, p in brute.p.items())
    backward = sum(q * math.log(q / brute.p[y]) for y, q in brute.q.items())
    assert world.kl(policy, ref).item() == pytest.approx(forward, rel=1e-12)
    assert world.kl(ref, policy).item() == pytest.approx(backward, rel=1e-12)
    assert abs(forward - backward) > 0.1
    assert world.kl(policy, policy).item() == 0


def test_kl_is_the_kl_of_each_state_weighted_by_its_reach(world, policy, ref):
    each = kl_divergence(Categorical(logits=policy), Categorical(logits=ref))
    expected = (world.reach(policy) * each).sum()
    torch.testing.assert_close(world.kl(policy, ref), expected, **EXACT)


def test_the_objective_is_score_minus_penalised_kl(world, policy, ref, brute):
    score = sum(p * brute.r[y] for y, p in brute.p.items())
    kl = sum(p * math.log(p / brute.q[y]) for y, p in brute.p.items())
    got = world.objective(policy, ref, BETA).item()
    assert got == pytest.approx(score - BETA * kl, rel=1e-12)


def test_values_are_the_mean_reward_to_come_of_plain_python(world, policy, ref, brute):
    """Each response's rewards are listed token by token, and averaged over what may follow."""
    values, q, advantages = world.values(policy, ref, BETA)
    rows = {"".join(world.text(s)): i for i, s in enumerate(world.states)}

    def to_come(y, t):
        letters = [(rows[y[:i]], world.words.index(y[i])) for i in range(t, len(y))]
        return brute.r[y] - BETA * sum(float(policy[c] - ref[c]) for c in letters)

    def mean(prefix, t):
        through = {y: p for y, p in brute.p.items() if y.startswith(prefix)}
        total = sum(through.values())
        return sum(p * to_come(y, t) for y, p in through.items()) / total

    for state, s in rows.items():
        assert values[s].item() == pytest.approx(mean(state, len(state)), rel=1e-10)
        for a, letter in enumerate(world.words):
            expected = mean(state + letter, len(state))
            assert q[s, a].item() == pytest.approx(expected, rel=1e-10)
            assert advantages[s, a].item() == pytest.approx(expected - values[s].item(), abs=1e-10)


def test_the_value_of_the_root_is_the_objective_and_advantages_have_mean_0(world, policy, ref):
    values, _, advantages = world.values(policy, ref, BETA)
    torch.testing.assert_close(values[0], world.objective(policy, ref, BETA), **EXACT)
    mean = (policy.exp() * advantages).sum(1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)


def test_the_gain_of_another_policy_is_its_mean_of_our_advantages(world, policy, ref):
    # The performance difference lemma (Kakade and Langford 2002), without KL in the reward:
    # J(other) - J(policy) = sum over what the other visits and does of A of the policy.
    _, _, advantages = world.values(policy, ref, 0.0)
    other = random_policy(world, 3)
    gain = world.objective(other, ref, 0.0) - world.objective(policy, ref, 0.0)
    expected = (world.reach(other)[:, None] * other.exp() * advantages).sum()
    torch.testing.assert_close(gain, expected, **EXACT)


def test_the_greedy_policy_is_no_worse_anywhere(world, policy, ref):
    values, q, _ = world.values(policy, ref, 0.0)
    greedy = (1e3 * torch.nn.functional.one_hot(q.argmax(1), q.shape[1]).double()).log_softmax(-1)
    better, _, _ = world.values(greedy, ref, 0.0)
    assert (better >= values - 1e-12).all() and better[0] > values[0] + 0.1


# --- the gradient -----------------------------------------------------------------------------


def test_the_gradient_is_that_of_finite_differences(world, ref):
    model = TabularPolicy(world, random_policy(world, 4)).double()
    (gradient,) = world.gradient(model, ref, BETA)
    for cell in [(0, 0), (0, 2), (1, 1), (3, 0), (5, 3), (12, 2)]:
        ends = []
        for nudge in (1e-5, -1e-5):
            moved = copy.deepcopy(model)
            moved.logits.data[cell] += nudge
            ends.append(world.objective(world.logprobs_all(moved), ref, BETA).item())
        slope = (ends[0] - ends[1]) / 2e-5
        assert gradient[cell].item() == pytest.approx(slope, rel=1e-6, abs=1e-10)


def test_the_gradient_is_that_of_the_policy_gradient_theorem(world, ref):
    # d J / d logit(s, a) = reach(s) pi(a|s) A(s, a) for a table of softmax logits.
    model = TabularPolicy(world, random_policy(world, 4)).double()
    logprobs_all = world.logprobs_all(model).detach()
    _, _, advantages = world.values(logprobs_all, ref, BETA)
    expected = world.reach(logprobs_all)[:, None] * logprobs_all.exp() * advantages
    torch.testing.assert_close(world.gradient(model, ref, BETA)[0], expected, **EXACT)


# --- the best policy --------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.7, 5.0])
def test_the_optimum_is_the_tilted_reference_of_plain_python(world, ref, brute, beta):
    expected, total = brute.tilted(beta)
    best, log_partition = world.optimum(ref, beta)
    got = by_string(world, world.response_logprobs(best).exp())
    assert got == pytest.approx(expected, rel=1e-10)
    assert log_partition.item() == pytest.approx(math.log(total), rel=1e-12)
    assert best.exp().sum(1).tolist() == pytest.approx([1.0] * len(best), rel=1e-12)


def test_the_optimum_is_that_of_the_soft_bellman_recursion(world, ref):
    """V*(s) = beta log sum_a ref(a|s) exp(Q*(s, a) / beta), from the longest state to the root."""
    best, log_partition = world.optimum(ref, BETA)
    value = dict(zip(world.responses, world.scores.tolist()))
    for s, state in reversed(list(enumerate(world.states))):
        tilted = [
            math.exp(float(ref[s, a]) + value[(*state, a)] / BETA) for a in range(len(world.words))
        ]
        value[state] = BETA * math.log(sum(tilted))
        assert best[s].exp().tolist() == pytest.approx([x / sum(tilted) for x in tilted], rel=1e-9)
    assert value[()] == pytest.approx(BETA * log_partition.item(), rel=1e-12)
    values, _, _ = world.values(best, ref, BETA)
    assert values.tolist() == pytest.approx([value[state] for state in world.states], rel=1e-9)


def test_the_objective_falls_short_of_the_best_by_beta_times_the_kl_to_it(world, policy, ref):
    best, log_partition = world.optimum(ref, BETA)
    for candidate in (policy, ref, best):
        expected = BETA * (log_partition - world.kl(candidate, best))
        torch.testing.assert_close(world.objective(candidate, ref, BETA), expected, **EXACT)


def test_at_the_optimum_the_gradient_and_every_advantage_are_0(world, ref):
    best, _ = world.optimum(ref, BETA)
    _, _, advantages = world.values(best, ref, BETA)
    assert advantages.abs().max() < 1e-10
    model = TabularPolicy(world, best).double()
    model.logits.data.copy_(best)  # float64 to the last bit
    assert world.gradient(model, ref, BETA)[0].abs().max() < 1e-12


# --- the fixed point of the KL in the loss ----------------------------------------------------


def test_with_responses_of_one_token_both_fixed_points_are_one():
    world = World(".abc", 1, uneven_score)
    ref = random_policy(world, 1)
    best, _ = world.optimum(ref, BETA)
    torch.testing.assert_close(world.kl_loss_optimum(ref, BETA), best, **EXACT)


def test_with_longer_responses_they_differ_before_the_last_token_only(world, ref):
    best, _ = world.optimum(ref, BETA)
    fixed = world.kl_loss_optimum(ref, BETA)
    last = torch.tensor([len(state) == world.length - 1 for state in world.states])
    torch.testing.assert_close(fixed[last], best[last], **EXACT)
    apart = (fixed - best).abs().amax(1)[~last]
    assert (apart > 0.01).all()


def test_each_state_of_the_kl_loss_optimum_is_found_by_a_fine_search():
    """V = 2: a state's policy is one number. The best of 20,001 of them, last token first."""
    world = World(".a", 2, lambda words: {".": 0.3, "a.": 1.0, "aa": -0.5}["".join(words)])
    ref, c2 = random_policy(world, 5), 0.4
    p = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    choices = torch.stack([p, 1 - p], 1)

    def search(s, q):
        kl = (choices * (choices.log() - ref[s])).sum(1)  # of this token; later ones are not asked
        best = choices[(choices @ q - c2 * kl).argmax()]
        return best, float(best @ q)

    later, value = search(1, torch.tensor([1.0, -0.5]).double())
    first, _ = search(0, torch.tensor([0.3, value]).double())
    fixed = world.kl_loss_optimum(ref, c2).exp()
    torch.testing.assert_close(fixed, torch.stack([first, later]), rtol=0, atol=1e-4)
    assert (world.optimum(ref, c2)[0].exp()[0] - first).abs().max() > 0.02


def kl_loss_update(world, logprobs_all, ref, c2, charged):
    """The expected gradient of loss per state and logit, by autograd, states being data."""
    leaf = logprobs_all.clone().requires_grad_()
    logprobs = leaf.log_softmax(-1)
    _, _, advantages = world.values(logprobs_all, ref, charged)
    kl = kl_divergence(Categorical(logits=logprobs), Categorical(logits=ref))
    gain = (logprobs_all.exp() * advantages * logprobs).sum(1)
    (world.reach(logprobs_all) * (c2 * kl - gain)).sum().backward()
    return leaf.grad


def test_the_expected_update_vanishes_at_the_fixed_point_and_not_at_the_optimum(world, ref):
    fixed, (best, _) = world.kl_loss_optimum(ref, BETA), world.optimum(ref, BETA)
    assert kl_loss_update(world, fixed, ref, BETA, charged=0.0).abs().max() < 1e-12
    assert kl_loss_update(world, best, ref, BETA, charged=0.0).abs().max() > 1e-3


def test_what_is_computed_of_a_policy_is_data_and_has_no_gradient(world, ref):
    leaf = ref.clone().requires_grad_()
    results = (*world.optimum(leaf, 0.7), *world.values(leaf, leaf, 0.7))
    assert not any(x.requires_grad for x in (*results, world.kl_loss_optimum(leaf, 0.7)))


def test_a_weak_reward_leaves_the_reference_where_it_is(world, ref):
    for fixed in (world.optimum(ref, 1e8)[0], world.kl_loss_optimum(ref, 1e8)):
        torch.testing.assert_close(fixed, ref, rtol=0, atol=1e-6)


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_gpt2_is_read_as_its_own_unpadded_rows(world, temperature):
    model = gpt2(4)
    got = world.logprobs_all(model, temperature)
    assert got.dtype == torch.float64
    for s, state in enumerate(world.states):
        logits = model(input_ids=torch.tensor([[0, *state]])).logits[0, -1]
        expected = torch.log_softmax(logits.double() / temperature, -1)
        torch.testing.assert_close(got[s], expected, rtol=1e-5, atol=1e-5)


def test_a_table_is_read_as_what_was_put_in(world, policy):
    model = TabularPolicy(world, policy).double()
    model.logits.data.copy_(policy)
    torch.testing.assert_close(world.logprobs_all(model), policy, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_a_table_leaves_alone_what_it_started_from(world, policy, dtype):
    """A reference that is the start of a policy would follow it, and the KL stay 0."""
    torch.set_default_dtype(dtype)  # the table's own; the policy is float64
    try:
        model, before = TabularPolicy(world, policy), policy.clone()
        with torch.no_grad():
            model.logits.add_(1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.logits.dtype == dtype and torch.equal(policy, before)


def test_a_policy_that_excludes_a_token_is_refused(world, policy):
    excluding = policy.clone()
    excluding[2, 1] = -math.inf
    with pytest.raises(ValueError, match="probability 0"):
        world.logprobs_all(TabularPolicy(world, excluding))


def test_a_table_gives_each_place_the_logits_of_its_state(world, policy):
    model, rows = TabularPolicy(world, policy), {s: i for i, s in enumerate(world.states)}
    logits = token_logits(model, world.tokens, world.attention_mask)
    for i, y in enumerate(world.responses):
        for t in range(len(y)):
            assert torch.equal(logits[i, t], model.logits[rows[y[:t]]])
        assert len(y) == world.length or (logits[i, len(y)] == 0).all()


def test_a_table_samples_the_same_with_its_cache_as_by_hand(world, policy):
    model = TabularPolicy(world, policy)
    query = torch.zeros(64, 1).long()
    response = generate(model, query, torch.ones(64, 1).bool(), 3, 0, 0, seed=5)
    uniforms = row_uniforms(5, 0, range(64), 3)
    for i in range(64):
        prefix = []
        for t in range(3):
            logits = model.logits[world.states.index(tuple(prefix))][None]
            prefix.append(int(sample_tokens(logits, uniforms[i : i + 1, t])))
            if prefix[-1] == 0:
                break
        assert response[i].tolist() == prefix + [0] * (3 - len(prefix))


def test_left_padding_changes_nothing_for_table_and_critic(world, policy):
    model, critic = TabularPolicy(world, policy), TabularValue(world)
    critic.values.data.copy_(torch.arange(len(world.states)) + 1.0)
    tokens = torch.nn.functional.pad(world.tokens, (2, 0), value=3)
    mask = torch.nn.functional.pad(world.attention_mask, (2, 0))
    wide = token_logits(model, tokens, mask)[:, 2:]
    assert torch.equal(wide, token_logits(model, world.tokens, world.attention_mask))
    values = critic(tokens, mask, 3)
    assert torch.equal(values, critic(world.tokens, world.attention_mask, 3))
    rows = {s: i + 1.0 for i, s in enumerate(world.states)}
    for i, y in enumerate(world.responses):
        assert values[i, : len(y)].tolist() == [rows[y[:t]] for t in range(len(y))]


def test_a_frozen_copy_of_a_table_does_not_follow_it(world, policy):
    model = TabularPolicy(world, policy)
    ref_policy = frozen_copy(model)
    with torch.no_grad():
        model.logits.add_(torch.randn(model.logits.shape))
    torch.testing.assert_close(world.logprobs_all(ref_policy), policy, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in ref_policy.parameters())


# --- the world to read ------------------------------------------------------------------------


@pytest.mark.parametrize("text, score", [
    (".", 0.0), ("good .", 1.0), ("bad .", -1.0), ("very good .", 2.0), ("not good .", -0.5),
    ("not bad .", 0.5), ("not very good .", -1.0), ("very very bad .", -4.0), ("good not .", 0.5),
    ("very .", -0.5), ("not not good .", 0.25), ("good bad .", 0.0), ("good good good", 0.0),
    ("very very good", 1.0), ("good good very", -1.5),
])  # fmt: skip
def test_feelings_by_hand(text, score):
    assert feelings_score(tuple(text.split())) == score


def test_the_reference_of_feelings_is_a_policy():
    world, ref = feelings_world()
    assert ref.dtype == torch.float64 and ref.shape == (21, 5)
    assert ref.exp().sum(1).tolist() == pytest.approx([1.0] * 21, abs=1e-12)
    assert ref[0].exp().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.2], rel=1e-12)
    assert len(world.responses) == 85


def test_the_table_says_what_stands_in_every_state():
    world = World(".a", 2, lambda words: {".": 0.0, "a.": 1.0, "aa": 0.0}["".join(words)])
    half = torch.full((2, 2), 0.5).double().log()
    policy = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).double().log()
    lines = world.table(policy, half, kl_coef=1.0).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    # pi*: weights 1/2 for ".", e/4 for "a.", 1/4 for "aa": of them 35, 47 and 17 in a hundred.
    # "." costs log(0.8 / 0.5) = 0.470, "a" log(0.2 / 0.5) = -0.916. After "a" they are worth
    # 1 - 0.470 = 0.530 and 0.916, V = 0.607; at the start -0.470 and 0.607 + 0.916, V = -0.071.
    assert lines[2].split() == "(start) 1.000 -0.07 | 50 80 35 -0.40 | 50 20 65 +1.59".split()
    assert lines[3].split() == "a 0.200 +0.61 | 50 80 73 -0.08 | 50 20 27 +0.31".split()
