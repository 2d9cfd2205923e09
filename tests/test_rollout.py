"""A rollout against the contract, row by row: oracles are lone unpadded rows and Python loops."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from minippo.batching import Samples
from minippo.config import PPOConfig
from minippo.engine.look import _checked_scores
from minippo.generation import generate_many
from minippo.models import Policy, RewardModel, ValueModel, frozen_copy, tiny_gpt2
from minippo.optim import adamw
from minippo.ppo import ppo_loss, ppo_update
from minippo.rollout import Rollout, collect_rollout, estimate_advantages, rollout_metrics

V, PAD, EOS = 40, 0, 1
IDS = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
PROMPTS = [[5, 6, 7, 8, 9], [11], [21, 22, 23], [30, 31], [5, 6], [12, 13, 14, 15], [39], [38, 2]]
CONFIG = PPOConfig(
    batch_size=8, minibatch_size=8, micro_batch_size=8, max_response_tokens=10, kl_coef=0.3,
    lam=0.9, missing_eos_penalty=0.7,
)  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def lively(model, seed, scale=0.2):
    """Larger weights than a fresh model has; another seed makes another model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def gpt2(seed, width=16):
    return lively(tiny_gpt2(V, n_layer=2, n_embd=width, n_head=2, n_positions=32), seed)


def rule(tokens, attention_mask, query_length):
    """A score that reads the whole answer: how many of its real tokens are even, less their sum."""
    real = attention_mask[:, query_length:].bool()
    response = tokens[:, query_length:]
    return ((response % 2 == 0) & real).sum(1) - 0.01 * (response * real).sum(1)


class World:
    """Policy, reference, critic and reward; half of the answers end, at different lengths."""

    def __init__(self, tokenizer=TOKENIZER):
        self.policy, self.ref_policy = gpt2(1), frozen_copy(gpt2(2))
        with torch.no_grad():  # EOS has a chance at every place
            self.policy.transformer.ln_f.bias.add_(0.8 * self.policy.lm_head.weight[EOS])
        self.value_model, self.tokenizer = ValueModel.from_policy(gpt2(3, width=24)), tokenizer

    def rollout(self, config=CONFIG, score_fn=rule, prompts=PROMPTS, seed=0, **options):
        return collect_rollout(
            self.policy, self.ref_policy, self.value_model, score_fn, prompts, self.tokenizer,
            config, seed=seed, **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def rollout(world):
    return world.rollout()


def row_of(rollout, i, tokenizer=TOKENIZER):
    """Prompt and answer of a row without any padding, as lists; the answer up to its first EOS."""
    response = rollout.response[i].tolist()
    if tokenizer.eos_token_id in response:
        response = response[: response.index(tokenizer.eos_token_id) + 1]
    return PROMPTS[i], response


def alone(model, prompt, answer, temperature=1.0):
    """Log-softmax before each answer token of the unpadded row, (R_i, V)."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)


def stacked(rollout, make):
    """What `make(i)` gives for each row's counted tokens, as (B, R), 0 where masked."""
    expected = torch.zeros(rollout.mask.shape)
    for i in range(len(expected)):
        values = torch.as_tensor(make(i), dtype=torch.float32)
        expected[i, : len(values)] = values
    return expected


# --- the contract -----------------------------------------------------------------------------


def test_the_test_rollout_has_answers_that_end_and_some_that_do_not(rollout):
    lengths = rollout.mask.sum(1).tolist()
    ended = (rollout.response == EOS).any(1).tolist()
    assert len(set(lengths)) >= 3 and 2 <= sum(ended) <= 6


def test_tokens_are_the_left_padded_query_and_the_right_padded_response(rollout):
    width = max(map(len, PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        gap = width - len(prompt)
        _, answer = row_of(rollout, i)
        tail = rollout.mask.shape[1] - len(answer)
        assert rollout.tokens[i].tolist() == [PAD] * gap + prompt + answer + [PAD] * tail
        counts = [0] * gap + [1] * (len(prompt) + len(answer)) + [0] * tail
        assert rollout.attention_mask[i].int().tolist() == counts


def test_the_mask_counts_up_to_and_with_the_first_eos(rollout):
    for i in range(len(PROMPTS)):
        _, answer = row_of(rollout, i)
        assert rollout.mask[i].tolist() == [t < len(answer) for t in range(len(rollout.mask[i]))]
    assert rollout.mask.dtype == rollout.attention_mask.dtype == torch.bool
    width = rollout.response.shape[1]
    assert torch.equal(rollout.attention_mask[:, -width:], rollout.mask)
    assert torch.equal(rollout.tokens[:, -width:], rollout.response)


def test_everything_per_token_is_zero_where_masked(rollout):
    checked = []
    for field in dataclasses.fields(Rollout):
        tensor = getattr(rollout, field.name)
        if tensor.shape == rollout.mask.shape and field.name not in ("response", "mask"):
            assert not tensor[~rollout.mask].any(), field.name
            checked.append(field.name)
    names = "logprobs ref_logprobs values kl entropy rewards advantages returns"
    assert checked == names.split()


def test_nothing_in_a_rollout_has_a_gradient(rollout):
    assert not any(getattr(rollout, f.name).requires_grad for f in dataclasses.fields(Rollout))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_rows_numbers_are_those_of_the_row_alone(world, temperature):
    rollout = world.rollout(dataclasses.replace(CONFIG, temperature=temperature))
    rows = [row_of(rollout, i) for i in range(len(PROMPTS))]

    def picked(model, i):
        return alone(model, *rows[i], temperature)[torch.arange(len(rows[i][1])), rows[i][1]]

    def entropy(i):
        return torch.distributions.Categorical(
            logits=alone(world.policy, *rows[i], temperature)
        ).entropy()

    def values(i):
        prompt, answer = rows[i]
        classifier = world.value_model.classifier
        with torch.no_grad():
            prefixes = [torch.tensor([prompt + answer[:t]]) for t in range(len(answer))]
            hidden = [classifier.base_model(input_ids=p).last_hidden_state[0, -1] for p in prefixes]
            return torch.stack(hidden) @ classifier.score.weight[0]

    for got, make in [
        (rollout.logprobs, lambda i: picked(world.policy, i)),
        (rollout.ref_logprobs, lambda i: picked(world.ref_policy, i)),
        (rollout.entropy, entropy),
        (rollout.values, values),
    ]:
        torch.testing.assert_close(got, stacked(rollout, make), **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["kl", "abs", "mse", "k3", "full"])
def test_each_kl_estimator_by_its_definition(world, name, temperature):
    config = dataclasses.replace(CONFIG, kl_estimator=name, temperature=temperature)
    rollout = world.rollout(config)

    def divergence(i):
        prompt, answer = row_of(rollout, i)
        p, q = (alone(m, prompt, answer, temperature) for m in (world.policy, world.ref_policy))
        if name == "full":
            return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        picked = torch.arange(len(answer)), answer
        return [estimate(name, float(d)) for d in p[picked] - q[picked]]

    def estimate(name, d):
        return {"kl": d, "abs": abs(d), "mse": d * d / 2, "k3": math.exp(-d) - 1 + d}[name]

    torch.testing.assert_close(rollout.kl, stacked(rollout, divergence), rtol=1e-4, atol=2e-5)
    assert rollout.kl.abs().max() > 0.1  # the two policies do differ
    expected = -config.kl_coef * rollout.kl.sum() + rollout.scores.sum()
    torch.testing.assert_close(rollout.rewards.sum(), expected)


def test_rewards_are_the_penalty_at_each_token_and_the_score_at_the_last(rollout):
    def rewards(i):
        _, answer = row_of(rollout, i)
        charged = [-0.3 * float(rollout.kl[i, t]) for t in range(len(answer))]
        charged[-1] += float(rollout.scores[i])
        return charged

    torch.testing.assert_close(rollout.rewards, stacked(rollout, rewards), **CLOSE)


def test_a_given_coefficient_takes_the_place_of_the_configured_one(world, rollout):
    other = world.rollout(kl_coef=2.0)
    expected = torch.zeros_like(rollout.rewards)
    for i in range(len(PROMPTS)):
        expected[i, len(row_of(rollout, i)[1]) - 1] = rollout.scores[i]
    torch.testing.assert_close(other.rewards, expected - 2.0 * rollout.kl, **CLOSE)
    free = world.rollout(kl_coef=0.0)
    torch.testing.assert_close(free.rewards, expected, **CLOSE)


# --- scores -----------------------------------------------------------------------------------


def test_score_fn_sees_tokens_mask_and_the_length_of_the_query(world, rollout):
    seen = []

    def spy(*args):
        seen.append(args)
        return rule(*args)

    world.rollout(score_fn=spy)
    ((tokens, attention_mask, query_length),) = seen
    order = rollout.attention_mask.sum(1).argsort(stable=True)  # similar lengths together
    assert torch.equal(tokens, rollout.tokens[order]) and query_length == max(map(len, PROMPTS))
    assert torch.equal(attention_mask, rollout.attention_mask[order])


def test_scores_are_standardised_first_and_then_fined_for_not_ending(world):
    mean, std = 0.25, 4.0
    rollout = world.rollout(score_stats=(mean, std))
    for i in range(len(PROMPTS)):
        _, answer = row_of(rollout, i)
        raw = sum(t % 2 == 0 for t in answer) - 0.01 * sum(answer)
        fine = 0.0 if answer[-1] == EOS else CONFIG.missing_eos_penalty
        assert float(rollout.raw_scores[i]) == pytest.approx(raw, rel=1e-5, abs=1e-5)
        assert float(rollout.scores[i]) == pytest.approx((raw - mean) / std - fine, abs=1e-5)


def test_a_reward_model_of_another_width_serves_as_score_fn(world, rollout):
    reward = RewardModel.from_policy(gpt2(4, width=32))
    scored = world.rollout(score_fn=frozen_copy(reward))
    for i in range(len(PROMPTS)):
        prompt, answer = row_of(rollout, i)
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            hidden = reward.classifier.base_model(input_ids=ids).last_hidden_state[0, -1]
            expected = hidden @ reward.classifier.score.weight[0]
        torch.testing.assert_close(scored.raw_scores[i], expected, **CLOSE)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda scores: scores[:, None],
        lambda scores: scores[:-1],
        lambda scores: scores.mean(),
        lambda scores: scores.tolist(),
        lambda scores: None,
    ],
    ids=["column", "too few", "scalar", "list", "none"],
)
def test_a_score_fn_of_the_wrong_shape_is_refused(world, wrong):
    with pytest.raises(ValueError, match=r"score_fn.*\(8,\)"):
        world.rollout(score_fn=lambda *args: wrong(rule(*args)))


def test_what_a_score_fn_gave_instead_is_named(world):
    with pytest.raises(ValueError, match="got list$"):
        world.rollout(score_fn=lambda *args: rule(*args).tolist())


@pytest.mark.parametrize("micro, sizes", [(8, [8]), (3, [3, 3, 2]), (1, [1] * 8)])
def test_score_fn_sees_no_more_answers_at_once_than_the_models_do(world, rollout, micro, sizes):
    seen = []

    def spy(tokens, attention_mask, query_length):
        seen.append((tokens, attention_mask))
        return rule(tokens, attention_mask, query_length)

    # A config refuses a size that does not divide the batch; a last batch may be smaller still.
    config = SimpleNamespace(**{**dataclasses.asdict(CONFIG), "micro_batch_size": micro})
    scored = world.rollout(config, score_fn=spy)
    assert [len(tokens) for tokens, _ in seen] == sizes
    order = rollout.attention_mask.sum(1).argsort(stable=True)
    for i, name in enumerate(["tokens", "attention_mask"]):
        assert torch.equal(torch.cat([pair[i] for pair in seen]), getattr(rollout, name)[order])
    torch.testing.assert_close(scored.raw_scores, rollout.raw_scores, rtol=0, atol=0)


def test_a_wrong_shape_is_refused_for_any_part_of_the_answers(world):
    calls = []

    def wrong_at_last(*args):
        calls.append(1)
        return rule(*args) if len(calls) < 4 else rule(*args)[:-1]

    config = dataclasses.replace(CONFIG, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"score_fn.*\(2,\).*got \(1,\)"):
        world.rollout(config, score_fn=wrong_at_last)


def test_scores_from_another_device_come_to_that_of_the_answers():
    tokens = torch.zeros(3, 5, dtype=torch.long, device="meta")  # any device that is not the CPU
    samples = Samples(tokens, tokens, tokens[:, 2:], tokens[:, 2:])
    scores = _checked_scores(lambda *args: torch.ones(3), samples)
    assert scores.device.type == "meta"


def test_scores_of_other_types_take_that_of_the_values(world, rollout):
    whole = world.rollout(score_fn=lambda tokens, mask, q: tokens[:, -1])
    double = world.rollout(score_fn=lambda *args: rule(*args).double())
    assert whole.raw_scores.dtype == double.rewards.dtype == rollout.values.dtype == torch.float32
    torch.testing.assert_close(double.rewards, rollout.rewards)


# --- advantages -------------------------------------------------------------------------------


def python_gae(rewards, values, gamma, lam):
    """Advantages of one answer as the definition says: sums of discounted TD errors."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    count = range(len(deltas))
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in count if s >= t) for t in count]


def whitened(rows):
    """The rows with mean 0 and unbiased variance 1 over all their numbers together."""
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_and_returns_by_an_independent_loop(world, gamma, lam, whiten):
    config = dataclasses.replace(CONFIG, gamma=gamma, lam=lam, whiten_advantages=whiten)
    rollout = world.rollout(config)
    advantages, returns = [], []
    for i in range(len(PROMPTS)):
        length = len(row_of(rollout, i)[1])
        rewards, values = (x[i, :length].tolist() for x in (rollout.rewards, rollout.values))
        advantages.append(python_gae(rewards, values, gamma, lam))
        returns.append([a + v for a, v in zip(advantages[-1], values, strict=True)])
    advantages = whitened(advantages) if whiten else advantages
    expected = stacked(rollout, advantages.__getitem__)
    torch.testing.assert_close(rollout.advantages, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.returns, stacked(rollout, returns.__getitem__), **CLOSE)


@pytest.mark.parametrize("whiten", [False, True])
def test_simple_advantages_are_reward_minus_value_at_the_prompt_for_every_token(world, whiten):
    config = dataclasses.replace(CONFIG, advantage="simple", whiten_advantages=whiten)
    rollout = world.rollout(config)
    advantages, returns = [], []
    for i in range(len(PROMPTS)):
        length = len(row_of(rollout, i)[1])
        total = sum(rollout.rewards[i].tolist())
        advantages.append([total - float(rollout.values[i, 0])] * length)
        returns.append([total] * length)
    advantages = whitened(advantages) if whiten else advantages
    expected = stacked(rollout, advantages.__getitem__)
    torch.testing.assert_close(rollout.advantages, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.returns, stacked(rollout, returns.__getitem__), **CLOSE)


def test_estimated_advantages_do_not_read_masked_positions(rollout):
    dirty = [x.masked_fill(~rollout.mask, math.nan) for x in (rollout.rewards, rollout.values)]
    clean = estimate_advantages(rollout.rewards, rollout.values, rollout.mask, CONFIG)
    for got, expected in zip(estimate_advantages(*dirty, rollout.mask, CONFIG), clean, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# --- what must not matter ---------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_micro_batch_size_does_not_change_the_rollout(world, rollout, micro):
    other = world.rollout(dataclasses.replace(CONFIG, micro_batch_size=micro))
    for field in dataclasses.fields(Rollout):
        got, expected = getattr(other, field.name), getattr(rollout, field.name)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_a_single_token_that_counts_gives_finite_numbers(world):
    """One token has no variance: it is not whitened, and nothing is left to be explained."""
    config = dataclasses.replace(CONFIG, max_response_tokens=1, whiten_advantages=True)
    one = world.rollout(config, prompts=[[5, 6]])
    assert one.mask.tolist() == [[True]]
    expected = one.rewards - one.values
    torch.testing.assert_close(one.advantages, expected, **CLOSE)
    metrics = rollout_metrics(one, EOS)
    assert all(math.isfinite(float(value)) for value in metrics.values())
    assert float(metrics["value/explained_variance"]) == 1


def test_two_tokens_that_count_are_whitened(world):
    config = dataclasses.replace(CONFIG, max_response_tokens=1, whiten_advantages=True)
    two = world.rollout(config, prompts=[[5, 6], [7]])
    low, high = sorted(two.advantages.flatten().tolist())
    # Mean 0, and an unbiased variance of 1: 2 a^2 / (2 - 1) = 1.
    assert (low, high) == pytest.approx((-(0.5**0.5), 0.5**0.5), rel=1e-3)


def test_models_in_float64_give_a_rollout_in_float64():
    double = World()
    for model in (double.policy, double.ref_policy, double.value_model):
        model.double()
    names = "logprobs ref_logprobs values kl entropy rewards advantages returns"
    rollout = double.rollout()
    assert {getattr(rollout, name).dtype for name in names.split()} == {torch.float64}


def test_two_rollouts_of_one_seed_are_identical_and_of_two_seeds_are_not(world, rollout):
    again, other, later = world.rollout(), world.rollout(seed=1), world.rollout(step=1)
    for field in dataclasses.fields(Rollout):
        assert torch.equal(getattr(again, field.name), getattr(rollout, field.name))
    assert other.response.tolist() != rollout.response.tolist() != later.response.tolist()


def test_rows_key_the_sampling(world, rollout):
    part = world.rollout(prompts=PROMPTS[2:5], rows=[2, 3, 4])
    for i in range(3):
        expected = row_of(rollout, i + 2)[1]
        assert part.response[i][part.mask[i]].tolist() == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampled_answers_are_those_of_generate_many(world, temperature):
    rollout = world.rollout(dataclasses.replace(CONFIG, temperature=temperature))
    answers = generate_many(world.policy, PROMPTS, TOKENIZER, 10, 0, temperature=temperature)
    assert [row_of(rollout, i)[1] for i in range(len(PROMPTS))] == answers


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one(world, temperature):
    config = dataclasses.replace(CONFIG, temperature=temperature, micro_batch_size=4)
    rollout = world.rollout(config)
    for batch, _ in rollout.micro_batches(2):
        with torch.no_grad():
            _, stats = ppo_loss(world.policy, world.ref_policy, world.value_model, batch, config)
        assert abs(float(stats["policy/ratio"]) - 1) <= 1e-5
        assert float(stats["policy/clip_frac"]) == 0 and float(stats["policy/approx_kl"]) < 1e-9
        logprobs = stacked(rollout, lambda i: lone_logprobs(world.policy, rollout, i, temperature))
        assert (logprobs - rollout.logprobs).abs().max() <= 1e-5


def lone_logprobs(policy, rollout, i, temperature):
    prompt, answer = row_of(rollout, i)
    return alone(policy, prompt, answer, temperature)[torch.arange(len(answer)), answer]


def test_a_tokenizer_whose_padding_is_its_eos_counts_the_first_eos_and_no_other():
    same = SimpleNamespace(eos_token_id=EOS, pad_token_id=EOS)
    rollout, own = World(same).rollout(), World().rollout()
    for name in ("mask", "attention_mask"):
        assert torch.equal(getattr(rollout, name), getattr(own, name))
    names = "logprobs ref_logprobs values kl entropy raw_scores scores rewards advantages returns"
    for name in names.split():
        torch.testing.assert_close(getattr(rollout, name), getattr(own, name), **CLOSE)
    assert bool((rollout.response[~rollout.mask] == EOS).all())


# --- rows and pieces --------------------------------------------------------------------------


def test_minibatches_hold_each_row_once_in_an_order_of_the_generator(rollout, generator):
    parts = list(rollout.minibatches(3, generator))
    assert [len(part.tokens) for part in parts] == [3, 3, 2]
    order = [rollout.tokens.tolist().index(row) for p in parts for row in p.tokens.tolist()]
    assert sorted(order) == list(range(8)) and order != list(range(8))
    together = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields()}
    for name, tensor in together.items():
        assert torch.equal(tensor, getattr(rollout, name)[order])
    again = rollout.minibatches(8, torch.Generator().manual_seed(0))
    assert [rollout.tokens.tolist().index(r) for r in next(again).tokens.tolist()] == order


def test_parts_of_a_rollout_elsewhere_keep_their_lengths_on_the_cpu(
    rollout, generator, monkeypatch
):
    """Nothing can be read from the meta device, so nothing has been asked of it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # CUDA's alone
    there = {f.name: getattr(rollout, f.name).to("meta") for f in fields()}
    elsewhere = Rollout(**there)
    vars(elsewhere)["lengths"] = rollout.lengths
    parts = [m for part in elsewhere.minibatches(4, generator) for m, _ in part.micro_batches(2)]
    assert {part.tokens.device.type for part in parts} == {"meta"}
    generator.manual_seed(0)
    order = torch.randperm(8, generator=generator).split(4)
    order = [half[rollout.lengths[half, 0].argsort(stable=True)] for half in order]
    assert torch.equal(torch.cat([p.lengths for p in parts]), rollout.lengths[torch.cat(order)])


def test_lengths_are_those_of_the_masks_also_after_these_were_replaced(rollout):
    expected = torch.stack([rollout.attention_mask.sum(1), rollout.mask.sum(1)], 1)
    assert torch.equal(rollout.lengths, expected)
    mask = rollout.mask.clone()
    mask[:, 0] = False
    assert torch.equal(dataclasses.replace(rollout, mask=mask).lengths[:, 1], mask.sum(1))
    assert torch.equal(rollout.rows([5, 2]).lengths, expected[[5, 2]])


def fields():
    return dataclasses.fields(Rollout)


def test_shares_of_micro_batches_are_their_part_of_the_tokens(rollout):
    parts = list(rollout.micro_batches(3))
    order = sorted(range(8), key=lambda i: sum(map(len, row_of(rollout, i))))  # by length
    lengths = [len(row_of(rollout, i)[1]) for i in order]
    expected = [sum(lengths[i : i + 3]) / sum(lengths) for i in (0, 3, 6)]
    assert [float(share) for _, share in parts] == pytest.approx(expected, rel=1e-6)
    assert torch.equal(torch.cat([part.tokens for part, _ in parts]), rollout.tokens[order])


def test_a_rollout_is_frozen(rollout):
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout.scores = rollout.raw_scores


# --- metrics ----------------------------------------------------------------------------------


def test_the_metrics_of_a_rollout_by_hand(world, rollout):
    answers = [row_of(rollout, i)[1] for i in range(8)]
    pairs = [list(zip(a.tolist(), b.tolist(), strict=True)) for a, b in zip(
        rollout.logprobs, rollout.ref_logprobs, strict=True)]  # fmt: skip
    sums = [sum(p - q for p, q in row) for row in pairs]
    count = sum(map(len, answers))
    errors = (rollout.returns - rollout.values)[rollout.mask]
    expected = {
        "objective/scores": sum(rollout.scores.tolist()) / 8,
        "objective/raw_scores": sum(rollout.raw_scores.tolist()) / 8,
        "objective/rewards": sum(rollout.rewards.flatten().tolist()) / 8,
        "objective/kl_per_sequence": sum(sums) / 8,
        "objective/kl_per_token": sum(sums) / count,
        "objective/entropy": sum(rollout.entropy.flatten().tolist()) / count,
        "objective/response_tokens": count / 8,
        "objective/eos_rate": sum(answer[-1] == EOS for answer in answers) / 8,
        "value/explained_variance": 1
        - float(errors.var()) / float(rollout.returns[rollout.mask].var()),
    }
    got = {name: float(value) for name, value in rollout_metrics(rollout, EOS).items()}
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_reported_kl_is_the_log_ratio_whichever_estimator_is_charged(world, rollout):
    other = world.rollout(dataclasses.replace(CONFIG, kl_estimator="full"))
    key = "objective/kl_per_sequence"
    assert not torch.allclose(other.kl, rollout.kl, atol=1e-3)
    torch.testing.assert_close(rollout_metrics(other, EOS)[key], rollout_metrics(rollout, EOS)[key])


# --- other families of models -----------------------------------------------------------------

SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32}
OTHERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **IDS)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **IDS)),
    "llama without padding": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, bos_token_id=EOS, eos_token_id=EOS)
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_another_saved_decoder_goes_through_rollout_and_update(family, tmp_path):
    lively(OTHERS[family](), 1).save_pretrained(tmp_path)
    policy, other = Policy.from_pretrained(tmp_path), World()
    other.policy, other.ref_policy = policy, frozen_copy(policy)
    reward = RewardModel.from_policy(policy)
    other.value_model = ValueModel.from_reward_model(reward)
    config = dataclasses.replace(CONFIG, micro_batch_size=4, kl_loss_coef=0.1)
    rollout = other.rollout(config, score_fn=frozen_copy(reward))
    expected = stacked(rollout, lambda i: lone_logprobs(policy, rollout, i, 1.0))
    torch.testing.assert_close(rollout.logprobs, expected, **CLOSE)
    before = [p.clone() for p in policy.parameters()]
    trained = {"policy": policy, "value": other.value_model}
    optimizer = adamw(trained, {"policy": 1e-3, "value": 1e-3})
    stats = ppo_update(
        policy, other.ref_policy, other.value_model, optimizer, rollout, config,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert all(math.isfinite(float(value)) for value in stats.values())
    pairs = zip(before, policy.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in pairs)
