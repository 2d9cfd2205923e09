"""The sampler against softmax, a loop without a cache, and batches cut and shuffled at will."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from minippo.batching import left_pad
from minippo.generation import generate, generate_many, row_uniforms, sample_tokens
from minippo.models import tiny_gpt2

V, PAD, EOS, LENGTH = 40, 0, 1, 12
IDS = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 64}
PROMPTS = [[5, 6, 7, 8, 9], [11], [21, 22, 23], [30, 31], [5, 6], [12, 13, 14, 15], [39], [38, 2]]
INF = float("inf")


def lively(model):
    """Larger weights than a fresh model has, so that the context decides the next token."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


MODELS = {
    "gpt2": lambda: tiny_gpt2(V, n_layer=2, n_embd=16, n_head=2, n_positions=64),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **IDS)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **IDS)),
}


@pytest.fixture(scope="module", params=MODELS)
def any_policy(request):
    torch.manual_seed(0)
    return lively(MODELS[request.param]())


@pytest.fixture(scope="module")
def policy():
    return lively(MODELS["gpt2"]())


def sample(
    policy, prompts=PROMPTS, eos_id=EOS, pad_id=PAD, seed=3, step=2, rows=None, temperature=1.0
):
    query, mask = left_pad(prompts, pad_id)
    return generate(policy, query, mask, LENGTH, eos_id, pad_id, seed, step, rows, temperature)


def answers(response, eos_id=EOS):
    """The rows of a response as lists, cut after their first EOS."""
    rows = response.tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


# --- the random numbers -----------------------------------------------------------------------


def test_uniforms_belong_to_their_seed_step_and_row():
    base = row_uniforms(0, 0, [0, 1, 2, 3], 6)
    assert base.shape == (4, 6) and bool((base >= 0).all()) and bool((base < 1).all())
    torch.testing.assert_close(row_uniforms(0, 0, [3, 1], 6), base[[3, 1]], rtol=0, atol=0)
    streams = [row_uniforms(s, t, range(8), 6) for s in range(4) for t in range(4)]
    assert len(torch.cat(streams).unique()) == 4 * 4 * 8 * 6  # none is another's neighbour


def test_a_longer_stream_begins_like_a_shorter_one():
    long, short = row_uniforms(5, 1, [9], 300), row_uniforms(5, 1, [9], 7)
    torch.testing.assert_close(long[:, :7], short, rtol=0, atol=0)


def test_uniforms_are_uniform_over_rows_steps_and_places():
    for numbers in (
        row_uniforms(0, 0, range(4000), 1),
        torch.cat([row_uniforms(0, step, [0], 1) for step in range(4000)]),
        row_uniforms(0, 0, [0], 4000),
    ):
        counts = torch.histc(numbers.float(), bins=10, min=0, max=1)
        # Chi-square with 9 degrees of freedom: mean 9, standard deviation 4.2; 40 is at 1e-5.
        assert float(((counts - 400) ** 2 / 400).sum()) < 40


def test_large_seeds_steps_and_rows_are_taken():
    assert len(row_uniforms(2**63, 10**6, [10**9], 3).unique()) == 3


# --- one token --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_softmax(temperature):
    logits, count = torch.tensor([0.3, -1.0, 2.0, 0.0, -4.0, 1.1]), 40_000
    weights = [math.exp(z / temperature) for z in logits.tolist()]
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = sample_tokens(logits.expand(count, -1), uniforms, temperature)
    seen = torch.bincount(tokens, minlength=6).tolist()
    for got, weight in zip(seen, weights, strict=True):
        p = weight / sum(weights)
        assert abs(got - count * p) < 5 * math.sqrt(count * p * (1 - p))


def test_the_token_is_the_first_whose_cumulative_probability_exceeds_u():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    for u, token in [(0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.59, 2), (0.61, 3)]:
        got = sample_tokens(logits[None], torch.tensor([u], dtype=torch.float64))
        assert got.tolist() == [token]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24, 1 - 2**-26, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(u):
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]])
    assert sample_tokens(logits, torch.tensor([u], dtype=torch.float64)).item() in (1, 3)


def test_sampling_leaves_the_logits_alone():
    logits = torch.randn(3, V)
    before = logits.clone()
    sample_tokens(logits, torch.rand(3), 0.7)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_half_precision_logits_are_sampled_in_single_precision():
    logits = torch.zeros(1, 4096, dtype=torch.float16)  # a float16 sum stops growing at 1/2
    got = sample_tokens(logits, torch.tensor([0.999], dtype=torch.float64))
    assert abs(got.item() - 0.999 * 4096) < 3


# --- whole responses --------------------------------------------------------------------------


@torch.no_grad()
def reference(policy, prompt, row, seed, step, temperature, eos_id):
    """The same answer without a cache or a batch: numpy's own cumulative sum, in float64."""
    stream = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, row]))
    tokens = list(prompt)
    for _ in range(LENGTH):
        logits = policy(input_ids=torch.tensor([tokens])).logits[0, -1].double().numpy()
        weights = np.exp((logits - logits.max()) / temperature)
        cumulative = np.cumsum(weights / weights.sum())
        tokens.append(int(np.argmax(cumulative > stream.random())))
        if tokens[-1] == eos_id:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_cache_gives_the_tokens_of_a_loop_without_one(any_policy, temperature):
    rows = [7, 3, 100, 12, 5, 6, 2**40, 0]
    response = sample(any_policy, rows=rows, temperature=temperature)
    expected = [
        reference(any_policy, prompt, row, 3, 2, temperature, EOS)
        for prompt, row in zip(PROMPTS, rows, strict=True)
    ]
    assert answers(response) == expected


def test_rows_stop_at_their_eos_and_are_padded_after_it(policy):
    """Every token takes its turn as EOS, so rows of many lengths occur."""
    lengths = set()
    for eos_id in range(2, V, 3):
        response = sample(policy, eos_id=eos_id)
        for row, answer in zip(response.tolist(), answers(response, eos_id), strict=True):
            assert row[len(answer) :] == [PAD] * (len(row) - len(answer))
            assert answer[-1] == eos_id or len(answer) == LENGTH
            lengths.add(len(answer))
        assert max(len(answer) for answer in answers(response, eos_id)) == response.shape[1]
    assert len(lengths) > LENGTH / 2


def test_stopping_rows_changes_nothing_in_the_others(policy):
    unstopped = sample(policy, eos_id=V + 5)  # a token that does not exist
    assert unstopped.shape == (len(PROMPTS), LENGTH)
    for eos_id in range(2, V, 3):
        for whole, answer in zip(
            unstopped.tolist(), answers(sample(policy, eos_id=eos_id), eos_id), strict=True
        ):
            assert answer == whole[: len(answer)]


CUTS = {
    "whole": [range(8)],
    "in two": [[0, 1, 2], [3, 4, 5, 6, 7]],
    "alone": [[i] for i in range(8)],
    "reordered": [[7, 2, 5], [0], [6, 1, 4, 3]],
}


@pytest.mark.parametrize("parts", CUTS.values(), ids=CUTS)
def test_the_same_samples_however_the_batch_is_cut_or_ordered(any_policy, parts):
    rows = [10, 11, 12, 13, 14, 15, 16, 17]
    whole = answers(sample(any_policy, rows=rows))
    got = {}
    for part in parts:
        piece = sample(any_policy, [PROMPTS[i] for i in part], rows=[rows[i] for i in part])
        got |= dict(zip(part, answers(piece), strict=True))
    assert [got[i] for i in range(8)] == whole


def test_rows_are_numbered_from_zero_if_not_said_otherwise(policy):
    assert torch.equal(sample(policy), sample(policy, rows=range(len(PROMPTS))))


def test_other_seeds_steps_and_rows_give_other_samples_and_the_same_ones_the_same(policy):
    base = sample(policy).tolist()
    assert sample(policy).tolist() == base
    others = [sample(policy, seed=4), sample(policy, step=3), sample(policy, rows=range(1, 9))]
    assert all(other.tolist() != base for other in others)


def test_the_global_generator_has_no_part_in_it(policy):
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), sample(policy)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    np.random.seed(5)
    assert torch.equal(sample(policy), first)


def test_a_low_temperature_takes_the_most_probable_token(policy):
    response = sample(policy, temperature=1e-3)
    for prompt, answer in zip(PROMPTS, answers(response), strict=True):
        tokens = list(prompt)
        for token in answer:
            logits = policy(input_ids=torch.tensor([tokens])).logits[0, -1]
            assert logits[token] >= logits.max() - 0.05
            tokens.append(token)


def test_under_autocast_the_model_is_read_in_bfloat16(policy, monkeypatch):
    kinds = []
    monkeypatch.setattr(
        "minippo.engine.passes.autocast", lambda _: torch.autocast("cpu", torch.bfloat16)
    )
    handle = policy.lm_head.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    assert sample(policy).dtype == torch.long
    handle.remove()
    assert set(kinds) == {torch.bfloat16} and len(kinds) > 1


def test_pad_may_be_eos(policy):
    one = sample(policy, eos_id=9, pad_id=9)
    assert answers(one, 9) == answers(sample(policy, eos_id=9), 9)


def test_the_responses_are_integers_without_gradient_that_fit_beside_the_query(policy):
    response = sample(policy)
    assert response.dtype == torch.long and not response.requires_grad
    assert torch.cat([left_pad(PROMPTS, PAD)[0], response], 1).shape[0] == len(PROMPTS)


def test_one_token_is_the_shortest_response(policy):
    query, mask = left_pad(PROMPTS, PAD)
    response = generate(policy, query, mask, 1, EOS, PAD, seed=3, step=2)
    assert response.shape == (8, 1)
    assert response[:, 0].tolist() == sample(policy)[:, 0].tolist()


def test_first_tokens_follow_the_policys_own_distribution(policy):
    count, temperature = 6000, 1.5
    query, mask = left_pad([[5, 6, 7]] * count, PAD)
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    expected = count * torch.softmax(logits / temperature, -1)
    tokens = generate(policy, query, mask, 1, EOS, PAD, seed=0, temperature=temperature)[:, 0]
    seen = torch.bincount(tokens, minlength=V)
    common = expected >= 5  # the rule of thumb for chi-square cells
    rest = torch.stack([seen[~common].sum(), expected[~common].sum()])
    chi = ((seen - expected)[common] ** 2 / expected[common]).sum()
    chi += (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1)
    freedom = int(common.sum())
    assert float(chi) < freedom + 5 * math.sqrt(2 * freedom)


# --- many prompts -----------------------------------------------------------------------------

TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_generate_many_answers_in_the_order_of_its_prompts(policy, batch_size):
    expected = [reference(policy, p, i, 5, 4, 1.0, EOS) for i, p in enumerate(PROMPTS)]
    got = generate_many(policy, PROMPTS, TOKENIZER, LENGTH, 5, 4, batch_size=batch_size)
    assert got == expected


def test_generate_many_passes_the_temperature_on(policy):
    expected = [reference(policy, p, i, 5, 0, 0.6, EOS) for i, p in enumerate(PROMPTS)]
    assert generate_many(policy, PROMPTS, TOKENIZER, LENGTH, 5, temperature=0.6) == expected


def test_generate_many_says_how_many_prompts_are_done(policy):
    done = []
    generate_many(policy, PROMPTS, TOKENIZER, 2, 5, batch_size=3, on_batch=done.append)
    assert done == [3, 3, 2]


def test_generate_many_where_pad_is_eos_ends_each_answer_once(policy):
    tokenizer = SimpleNamespace(eos_token_id=9, pad_token_id=9)
    got = generate_many(policy, PROMPTS, tokenizer, LENGTH, 5, batch_size=4)
    assert got == [reference(policy, p, i, 5, 0, 1.0, 9) for i, p in enumerate(PROMPTS)]


def test_generate_many_of_nothing_is_nothing(policy):
    assert generate_many(policy, [], TOKENIZER, LENGTH, 0) == []
