"""SFT, reward model, critic warm-up and pretraining: losses by hand, toys that must be learned."""

import dataclasses
import math
import random
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from minippo import pretrain, reward_training, sft, value_training
from minippo.batching import Encoded, answered, join_query_response
from minippo.config import PretrainConfig, RewardConfig, SFTConfig, ValueConfig
from minippo.engine.gradients import accumulate
from minippo.models import RewardModel, ValueModel, tiny_gpt2
from minippo.optim import Hooks, NonFiniteError
from minippo.pretrain import encode_texts, perplexity, text_loss, train_lm, train_tokenizer
from minippo.reward_training import (
    pair_accuracy,
    reward_loss,
    score_all,
    score_responses,
    standardise_on,
    train_reward_model,
)
from minippo.sft import sft_loss, train_sft
from minippo.value_training import judged, prompt_explained_variance, train_value_model, warmup_loss

V, PAD, EOS = 40, 0, 1
IDS = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
ROWS = [
    Encoded(0, [5, 6, 7, 8, 9], [[11, 12, EOS]]),
    Encoded(1, [13], [[14, 15, 16, 17, 18, 19, EOS]]),
    Encoded(2, [20, 21, 22], [[EOS]]),
    Encoded(3, [23, 24], [[25, 26, EOS]]),
]
RANKED = [
    Encoded(0, [5, 6, 7, 8, 9], [[11, 12, EOS], [13, EOS], [14, 15, 16, EOS]]),
    Encoded(1, [13], [[14, 15, 16, 17, 18, 19, EOS], [20, EOS], [EOS]]),
    Encoded(2, [20, 21, 22], [[EOS], [30, EOS], [31, 32, EOS]]),
    Encoded(3, [2], [[3, EOS], [4, EOS], [5, 6, 7, 8, EOS]]),
]
SFT = SFTConfig(
    steps=6, batch_size=4, micro_batch_size=4, warmup_steps=0, max_prompt_tokens=8,
    max_response_tokens=8,
)  # fmt: skip
REWARD = RewardConfig(
    batch_size=4, micro_batch_size=4, warmup_steps=0, lr=1e-2, max_prompt_tokens=8,
    max_response_tokens=8,
)  # fmt: skip
VALUE = ValueConfig(batch_size=4, warmup_steps=0, lr=1e-2)


def lively(model, seed=7):
    """Larger weights than a fresh model has, so that every token matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def gpt2():
    return lively(tiny_gpt2(V, n_layer=1, n_embd=16, n_head=2, n_positions=32))


def fresh_gpt2(seed=0):
    return tiny_gpt2(V, n_layer=1, n_embd=16, n_head=2, n_positions=32, seed=seed)


def llama():
    torch.manual_seed(0)
    return lively(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=32, **IDS,
            )
        )
    )  # fmt: skip


FAMILIES = pytest.mark.parametrize("make", [gpt2, llama])


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_gradients(got, expected, rtol):
    """Equal up to rtol of each tensor's own size, and anything but zero."""
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= rtol * float(b.norm()) + 1e-12
    assert sum(float(b.norm()) for b in expected) > 1e-2


class Recorder(Hooks):
    """Keeps what a training calls; begins at step 0."""

    def __init__(self):
        self.calls = []

    def start(self, stage, total, state):
        self.started, self.state = (stage, total), set(state)
        return 0

    def step(self, stage, step, metrics):
        self.calls.append((stage, step, metrics))


# --- joining ------------------------------------------------------------------------------------


def test_join_by_hand():
    tokens, attention_mask, mask = join_query_response([[5, 6], [7]], [[8, EOS], [9, 10, EOS]], PAD)
    assert tokens.tolist() == [[5, 6, 8, EOS, PAD], [PAD, 7, 9, 10, EOS]]
    assert attention_mask.int().tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert mask.int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_join_counts_the_eos_where_pad_is_eos():
    _, attention_mask, mask = join_query_response([[5, 6], [7]], [[8, EOS], [9, 10, EOS]], EOS)
    assert attention_mask.sum(1).tolist() == [4, 4] and mask.sum(1).tolist() == [2, 3]


# --- supervised fine-tuning -----------------------------------------------------------------------


def demonstrations(rows=ROWS):
    return answered([row.prompt for row in rows], [row.responses[0] for row in rows], PAD)


@FAMILIES
def test_the_sft_loss_of_one_row_is_cross_entropy_on_its_response(make):
    policy, row = make(), ROWS[0]
    got = sft_loss(policy, demonstrations([row]))
    logits = policy(input_ids=torch.tensor([row.prompt + row.responses[0]])).logits[0]
    expected = F.cross_entropy(logits[4:7], torch.tensor(row.responses[0]))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@FAMILIES
def test_the_sft_loss_of_padded_rows_is_the_token_mean_over_the_rows_alone(make):
    policy, total, count = make(), 0.0, 0
    got = sft_loss(policy, demonstrations())
    for row in ROWS:
        logits = policy(input_ids=torch.tensor([row.prompt + row.responses[0]])).logits[0]
        wanted = torch.tensor(row.responses[0])
        start = len(row.prompt) - 1
        total = total + F.cross_entropy(logits[start:-1], wanted, reduction="sum")
        count += len(wanted)
    torch.testing.assert_close(got, total / count, rtol=1e-5, atol=1e-6)


def test_prompt_tokens_are_read_but_not_learned():
    """The loss has no gradient at the logits that predict prompt tokens, whatever they are."""
    policy, seen = gpt2(), []

    def keep(module, inputs, logits):
        logits.retain_grad()
        seen.append(logits)

    policy.lm_head.register_forward_hook(keep)
    batch = demonstrations()
    sft_loss(policy, batch).backward()
    assert seen[0].shape == (int(batch.mask.sum()), V)  # no others are computed
    assert bool((seen[0].grad.abs().sum(-1) > 0).all())
    assert policy.transformer.wpe.weight.grad[0].any()  # the prompt's own positions are read


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_sft_in_micro_batches_has_the_gradient_of_the_whole_batch(micro):
    policy = gpt2().double()
    sft_loss(policy, demonstrations()).backward()
    expected = gradients(policy)
    policy.zero_grad()

    def loss_of(batch):
        loss = sft_loss(policy, batch)
        return loss, {"loss": loss}

    loss = accumulate(loss_of, demonstrations(), micro)["loss"]
    # The loss turns the logits to float32, so the gradient has float32's own rounding.
    assert_same_gradients(gradients(policy), expected, 1e-6)
    assert not loss.requires_grad


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_sft_takes_the_same_steps_in_micro_batches(micro):
    histories = []
    for size in (4, micro):
        config = dataclasses.replace(SFT, micro_batch_size=size)
        histories.append(train_sft(gpt2(), ROWS, config, pad_id=PAD))
    for one, two in zip(*histories, strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_sft_learns_its_rows_by_heart():
    policy = fresh_gpt2()
    history = train_sft(policy, ROWS, dataclasses.replace(SFT, steps=40, lr=4e-2), pad_id=PAD)
    assert history[0]["loss/lm"] == pytest.approx(math.log(V), abs=0.3)
    assert history[-1]["loss/lm"] < 0.1
    for row in ROWS:
        logits = policy(input_ids=torch.tensor([row.prompt + row.responses[0]])).logits[0]
        assert logits[len(row.prompt) - 1 : -1].argmax(-1).tolist() == row.responses[0]


def test_sft_is_deterministic_and_depends_on_its_seed():
    rows = [Encoded(i, [5 + i], [[20 + i, EOS]]) for i in range(12)]
    runs = [train_sft(gpt2(), rows, SFT, pad_id=PAD, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_sft_stops_where_its_loss_is_not_finite():
    policy = gpt2()
    with torch.no_grad():
        policy.transformer.ln_f.weight[0] = math.nan
    hooks = Recorder()
    with pytest.raises(NonFiniteError, match=r"sft, step 0.*loss/lm"):
        train_sft(policy, ROWS, SFT, pad_id=PAD, hooks=hooks)
    assert not hooks.calls


# --- reward model -------------------------------------------------------------------------------


@torch.no_grad()
def lone_scores(reward_model, rows):
    """Each prompt with each of its responses alone and unpadded."""
    return [
        [
            float(reward_model(torch.tensor([ids]), torch.ones(1, len(ids))))
            for ids in (row.prompt + response for response in row.responses)
        ]
        for row in rows
    ]


@FAMILIES
@torch.no_grad()
def test_scores_of_k_responses_are_those_of_each_alone(make):
    reward_model = RewardModel.from_policy(make())
    got = score_responses(reward_model, RANKED, PAD)
    expected = torch.tensor(lone_scores(reward_model, RANKED))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def tokens_read(reward_model) -> list:
    """Fills with the tokens (B, T) of every forward pass of the backbone."""
    read, backbone = [], reward_model.classifier.base_model
    hook = lambda _, args, named, output: read.append(named["input_ids"])  # noqa: E731
    backbone.register_forward_hook(hook, with_kwargs=True)
    return read


def test_each_query_and_each_response_is_read_once():
    reward_model = RewardModel.from_policy(gpt2())
    read = tokens_read(reward_model)
    score_responses(reward_model, RANKED, PAD)
    assert [len(tokens) for tokens in read] == [4, 4 * 3]  # K a prompt, not K (K - 1)


def test_prompts_with_unequal_numbers_of_responses_are_not_mixed_up():
    two, four = [[6, EOS], [7, EOS]], [[i, EOS] for i in range(9, 13)]
    rows = [Encoded(0, [5], two), Encoded(1, [8], four)]
    with pytest.raises(ValueError):  # 2 + 4 scores would fill a (2, 3) just as well
        score_responses(RewardModel.from_policy(gpt2()), rows, PAD)


def test_the_ranking_loss_is_the_mean_over_all_pairs_by_hand():
    scores = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]])
    losses = [
        math.log1p(math.exp(-(row[i] - row[j])))
        for row in scores.tolist()
        for i, j in combinations(range(3), 2)
    ]
    assert float(reward_loss(scores)) == pytest.approx(sum(losses) / 6, rel=1e-6)


def test_the_margin_is_subtracted_from_the_gap_by_hand():
    scores, margins = torch.tensor([[2.0, 0.5], [0.0, 1.0]]), torch.tensor([0.7, 0.2])
    losses = [math.log1p(math.exp(-(2.0 - 0.5 - 0.7))), math.log1p(math.exp(-(0.0 - 1.0 - 0.2)))]
    assert float(reward_loss(scores, margins)) == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_margins_beside_more_than_two_candidates_are_refused():
    with pytest.raises(ValueError):  # else the first pair counts and the third answer is lost
        reward_loss(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0.7]))


@pytest.mark.parametrize(
    "scores, accuracy",
    [
        ([[3.0, 2.0, 1.0]], 1.0),
        ([[1.0, 2.0, 3.0]], 0.0),
        ([[3.0, 1.0, 2.0]], 2 / 3),
        ([[1.0, 1.0]], 0.0),
        ([[2.0, 1.0, 1.0]], 2 / 3),
        ([[2.0, 1.0], [1.0, 1.0], [1.0, 2.0], [5.0, 4.0]], 1 / 2),
    ],
)
def test_pair_accuracy_counts_a_tie_as_wrong(scores, accuracy):
    assert float(pair_accuracy(torch.tensor(scores))) == pytest.approx(accuracy)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_score_all_keeps_the_order_of_its_rows(batch_size):
    reward_model, done = RewardModel.from_policy(gpt2()), []
    got = score_all(reward_model, RANKED, PAD, batch_size, done.append)
    for scores, expected in zip(got, lone_scores(reward_model, RANKED), strict=True):
        assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert sum(done) == 4


def test_standardise_on_remembers_mean_and_std_by_hand():
    reward_model = RewardModel.from_policy(gpt2())
    standardise_on(reward_model, [[1.0, 2.0], [3.0, 6.0]])
    variance = sum((x - 3.0) ** 2 for x in (1.0, 2.0, 3.0, 6.0)) / 3
    assert reward_model.mean == pytest.approx(3.0)
    assert reward_model.std == pytest.approx(math.sqrt(variance))
    assert type(reward_model.mean) is type(reward_model.std) is float


@pytest.mark.parametrize("scores", [[[2.0]], [[0.1, 0.1], [0.1, 0.1]], [[1.0, math.nan]],
                                    [[1.0, math.inf]]])  # fmt: skip
def test_reference_scores_without_a_standard_deviation_are_refused(scores):
    reward_model = RewardModel.from_policy(gpt2())
    with pytest.raises(ValueError, match="reference scores.*standard deviation"):
        standardise_on(reward_model, scores)
    assert (reward_model.mean, reward_model.std) == (0.0, 1.0)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("with_margin", [False, True])
def test_the_reward_model_takes_the_same_steps_in_micro_batches(micro, with_margin):
    rows = [dataclasses.replace(r, responses=r.responses[:2]) for r in RANKED]
    margins, histories = [0.5, 1.0, 0.1, 2.0] if with_margin else None, []
    for size in (4, micro):
        config = dataclasses.replace(REWARD, micro_batch_size=size, epochs=3)
        reward_model = RewardModel.from_policy(gpt2())
        histories.append(
            train_reward_model(reward_model, rows, config, pad_id=PAD, margins=margins)
        )
    for one, two in zip(*histories, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("micro", [1, 3, 6])
def test_rankings_of_different_sizes_share_a_step_and_each_counts_once(micro):
    """The loss of the step is the mean over prompts of each one's mean over its own pairs."""
    rows = [Encoded(i, [5, 6], [[7 + i + k, EOS] for k in range(2 + i % 3)]) for i in range(6)]
    reward_model, by_hand = RewardModel.from_policy(fresh_gpt2()), []
    with torch.no_grad():
        for row in rows:
            (scores,) = score_responses(reward_model, [row], PAD).tolist()
            pairs = combinations(range(len(scores)), 2)
            losses = [math.log1p(math.exp(scores[j] - scores[i])) for i, j in pairs]
            by_hand.append(sum(losses) / len(losses))
    assert [len(s) for s in score_all(reward_model, rows, PAD)] == [2, 3, 4, 2, 3, 4]
    config = dataclasses.replace(REWARD, batch_size=6, micro_batch_size=micro, epochs=1, lr=1e-9)
    history = train_reward_model(reward_model, rows, config, pad_id=PAD)
    assert history[0]["loss/reward"] == pytest.approx(sum(by_hand) / 6, rel=1e-5)


@pytest.mark.parametrize("place", range(6))
def test_margins_stay_with_their_rows(place):
    """With one huge margin the loss tells in which batch its row was."""
    rows = [Encoded(i, [5, 6], [[7 + i, EOS], [20 + i, EOS]]) for i in range(6)]
    config = dataclasses.replace(REWARD, batch_size=1, micro_batch_size=1, lr=1e-9)
    margins = [1000.0 if i == place else 0.0 for i in range(6)]
    reward_model = RewardModel.from_policy(fresh_gpt2())
    read = tokens_read(reward_model)
    history = train_reward_model(reward_model, rows, config, pad_id=PAD, margins=margins)
    seen = [int(tokens[0, 0]) for tokens in read[1::2]]  # after each query its responses
    step = next(i for i, metrics in enumerate(history) if metrics["loss/reward"] > 900)
    assert seen[step] == 7 + place


def toy_preferences(count, seed):
    """Rankings by how many small tokens an answer holds; tokens and lengths are random."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        prompt = [rng.randrange(2, V) for _ in range(rng.randrange(1, 5))]
        sizes = rng.sample(range(5), 3)  # three different numbers of small tokens out of five
        answers = []
        for small in sorted(sizes, reverse=True):
            tokens = [rng.randrange(2, 20) for _ in range(small)]
            tokens += [rng.randrange(20, V) for _ in range(5 - small)]
            answers.append([*rng.sample(tokens, 5), EOS])
        rows.append(Encoded(i, prompt, answers))
    return rows


def test_a_reward_model_learns_a_toy_preference_and_generalises():
    reward_model = RewardModel.from_policy(fresh_gpt2())
    config = dataclasses.replace(REWARD, batch_size=16, micro_batch_size=16, lr=2e-2)
    history = train_reward_model(reward_model, toy_preferences(640, 0), config, pad_id=PAD)
    held_out = torch.tensor(score_all(reward_model, toy_preferences(300, 1), PAD))
    assert history[0]["reward/accuracy"] < 0.8 and history[-1]["loss/reward"] < 0.2
    assert float(pair_accuracy(held_out)) > 0.95


def test_a_fresh_reward_model_is_near_chance():
    accuracies = [
        float(pair_accuracy(score_responses(RewardModel.from_policy(fresh_gpt2(s)), rows, PAD)))
        for s in range(4)
        for rows in [toy_preferences(200, 1)]
    ]
    assert abs(sum(accuracies) / 4 - 0.5) < 0.2


def test_reward_training_has_one_step_per_batch_and_epoch_and_tells_its_hooks():
    rows, hooks = toy_preferences(22, 0), Recorder()
    config = dataclasses.replace(REWARD, epochs=3)
    history = train_reward_model(
        RewardModel.from_policy(gpt2()), rows, config, pad_id=PAD, hooks=hooks
    )
    assert hooks.started == ("reward", 3 * (22 // 4)) and len(history) == 15
    assert hooks.state == {"reward", "optimizer"}
    assert hooks.calls == [("reward", i, m) for i, m in enumerate(history)]
    assert set(history[0]) == {"loss/reward", "reward/accuracy", "grad_norm/reward"}


def test_reward_training_is_deterministic_and_depends_on_its_seed():
    rows = toy_preferences(16, 0)
    runs = [
        train_reward_model(RewardModel.from_policy(gpt2()), rows, REWARD, pad_id=PAD, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


# --- critic warm-up -----------------------------------------------------------------------------


def test_the_warmup_loss_is_half_the_squared_error_at_every_response_token():
    value_model = ValueModel.from_policy(gpt2())
    targets = [0.5, -1.0, 2.0, 0.0]
    got = warmup_loss(value_model, judged(ROWS, targets, PAD))
    errors = []
    for row, target in zip(ROWS, targets, strict=True):
        ids = torch.tensor([row.prompt + row.responses[0]])
        hidden = value_model.classifier.base_model(input_ids=ids).last_hidden_state[0]
        values = hidden @ value_model.classifier.score.weight[0]
        errors += [(v - target) ** 2 for v in values[len(row.prompt) - 1 : -1].tolist()]
    assert len(errors) == 3 + 7 + 1 + 3
    assert float(got.detach()) == pytest.approx(0.5 * sum(errors) / len(errors), rel=1e-5)


@torch.no_grad()
def test_explained_variance_is_that_of_the_value_at_the_prompt_by_hand():
    value_model = ValueModel.from_policy(gpt2())
    targets, errors = [0.5, -1.0, 2.0, 0.0], []
    for row, target in zip(ROWS, targets, strict=True):
        prompt = torch.tensor([row.prompt])
        hidden = value_model.classifier.base_model(input_ids=prompt).last_hidden_state[0, -1]
        errors.append((float(hidden @ value_model.classifier.score.weight[0]) - target) ** 2)
    variance = sum((t - 0.375) ** 2 for t in targets) / 4
    expected = 1 - sum(errors) / 4 / variance
    got = prompt_explained_variance(value_model, ROWS, targets, PAD)
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("targets", [[0.5], [0.5, 0.5, 0.5]])
def test_targets_without_variance_have_none_to_explain(targets):
    rows = ROWS[: len(targets)]
    with pytest.raises(ValueError, match=f"{len(targets)} held-out prompts"):
        prompt_explained_variance(ValueModel.from_policy(gpt2()), rows, targets, PAD)


def toy_values(count, seed):
    """Prompts whose second token alone decides the mean reward; answers say nothing."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, V) for _ in range(3)] for _ in range(count)]
    rows = [
        Encoded(i, p, [[rng.randrange(2, V) for _ in range(rng.randrange(1, 5))] + [EOS]])
        for i, p in enumerate(prompts)
    ]
    return rows, [math.sin(p[1] / 3) + 0.5 for p in prompts]


def test_the_critic_learns_the_mean_reward_that_the_prompt_decides():
    value_model = ValueModel.from_reward_model(RewardModel.from_policy(fresh_gpt2()))
    held_out, wanted = toy_values(256, 1)
    rows, targets = toy_values(1024, 0)
    before = prompt_explained_variance(value_model, held_out, wanted, PAD)
    config = dataclasses.replace(VALUE, batch_size=32, epochs=3, lr=2e-2)
    history = train_value_model(value_model, rows, targets, config, pad_id=PAD)
    after = prompt_explained_variance(value_model, held_out, wanted, PAD)
    assert before < 0.05 and after > 0.9  # a critic of zeros knows nothing
    assert history[-1]["loss/value"] < 0.1 * history[0]["loss/value"]


def test_targets_stay_with_their_rows():
    rows, targets = toy_values(12, 0)
    hooks, config = Recorder(), dataclasses.replace(VALUE, batch_size=1, epochs=1, lr=1e-9)
    value_model, seen = ValueModel.from_reward_model(RewardModel.from_policy(gpt2())), []
    value_model.classifier.base_model.register_forward_hook(
        lambda _, args, options, __: seen.append(options["input_ids"][0].tolist()), with_kwargs=True
    )
    history = train_value_model(value_model, rows, targets, config, pad_id=PAD, hooks=hooks)
    for tokens, metrics in zip(seen, history, strict=True):
        i = next(i for i, r in enumerate(rows) if [*r.prompt, *r.responses[0]][:-1] == tokens)
        assert metrics["loss/value"] == pytest.approx(targets[i] ** 2 / 2, abs=1e-5)
    assert hooks.started == ("value", 12) and len(hooks.calls) == 12


def test_a_target_that_is_not_finite_stops_the_warmup():
    value_model = ValueModel.from_policy(gpt2())
    with pytest.raises(NonFiniteError, match="value, step 0.*loss/value"):
        train_value_model(value_model, ROWS, [0.0, math.nan, 1.0, 2.0], VALUE, pad_id=PAD)


# --- pretraining --------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat", "the dog ran", "a cat ran and a dog sat", "the mat"]
PRETRAIN = PretrainConfig(steps=40, batch_size=4, lr=2e-2, warmup_steps=0)


@FAMILIES
def test_the_text_loss_is_the_token_mean_over_each_text_alone(make):
    model, total, count = make(), 0.0, 0
    sequences = [[5, 6, 7, 8, EOS], [9, EOS], [10, 11, 12, EOS]]
    ids = torch.tensor([s + [PAD] * (5 - len(s)) for s in sequences])
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    for sequence in sequences:
        tokens = torch.tensor(sequence)
        logits = model(input_ids=tokens[None]).logits[0]
        total = total + F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
        count += len(sequence) - 1
    torch.testing.assert_close(text_loss(model, ids, mask), total / count, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_loss_per_token():
    model, total, count = gpt2(), 0.0, 0
    sequences = [[5, 6, 7, 8, EOS], [9, EOS], [10, 11, 12, EOS], [3, 4, EOS], [2, EOS]]
    for sequence in sequences:
        tokens = torch.tensor(sequence)
        logits = model(input_ids=tokens[None]).logits[0]
        total += float(F.cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
        count += len(sequence) - 1
    for size in (1, 2, 64):
        got = perplexity(model, sequences, PAD, batch_size=size)
        assert got == pytest.approx(math.exp(total / count), rel=1e-4)


def test_pretraining_learns_its_texts():
    tokenizer = train_tokenizer(TEXTS, 280)
    sequences, dropped = encode_texts(tokenizer, TEXTS, 32)
    model = tiny_gpt2(len(tokenizer), n_layer=1, n_embd=16, n_head=2, n_positions=32)
    before = perplexity(model, sequences, PAD)
    hooks = Recorder()
    history = train_lm(model, sequences, PRETRAIN, pad_id=PAD, hooks=hooks)
    assert dropped == 0 and before > 200 and perplexity(model, sequences, PAD) < 4
    assert hooks.started == ("pretrain", 40) and history == [m for *_, m in hooks.calls]


def test_a_tokenizer_is_the_same_when_trained_again_and_takes_any_text():
    one, two = (train_tokenizer(TEXTS, 280) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    text = "caf\u00e9 \U0001f35e \u6f22\u5b57 zzz\n\n"
    assert one.decode(one.encode(text, add_special_tokens=False)) == text


# --- what all trainings share ---------------------------------------------------------------------


def sequences(rows):
    return [row.prompt + row.responses[0] for row in rows]


# Each takes a base model, rows of 2 answers at least, options of its config, and hooks; the limits
# are the defaults, which no model in here could hold.
LONG = {"max_prompt_tokens": 128, "max_response_tokens": 48}
STAGES = {
    "sft": lambda base, rows, hooks=None, **options: train_sft(
        base, rows, dataclasses.replace(SFT, **LONG, **options), pad_id=PAD, hooks=hooks
    ),
    "reward": lambda base, rows, hooks=None, **options: train_reward_model(
        RewardModel.from_policy(base), rows, dataclasses.replace(REWARD, **LONG, **options),
        pad_id=PAD, hooks=hooks,
    ),
    "value": lambda base, rows, hooks=None, **options: train_value_model(
        ValueModel.from_policy(base), rows, [1.0, 2.0, 3.0, 4.0],
        dataclasses.replace(VALUE, **options), pad_id=PAD, hooks=hooks,
    ),
    "pretrain": lambda base, rows, hooks=None, **options: train_lm(
        base, sequences(rows), dataclasses.replace(PRETRAIN, steps=2, **options),
        pad_id=PAD, hooks=hooks,
    ),
}  # fmt: skip
EVERY_STAGE = pytest.mark.parametrize("stage", STAGES)


@EVERY_STAGE
@pytest.mark.parametrize("length, fits", [(32, True), (33, False)])
def test_the_rows_that_are_given_must_fit_the_context_not_the_configured_limits(
    stage, length, fits
):
    hooks = Recorder()
    long = Encoded(0, [5] * (length - 3), [[6, 7, EOS], [8, EOS], [EOS]])
    rows = [long, *RANKED[1:]]
    if fits:
        assert STAGES[stage](gpt2(), rows, hooks) and hooks.calls
        return
    with pytest.raises(ValueError, match="33.*32"):
        STAGES[stage](gpt2(), rows, hooks)
    assert not hooks.calls


@EVERY_STAGE
def test_a_step_that_breaks_weights_at_a_finite_loss_is_not_handed_on(stage):
    hooks, name = Recorder(), {"sft": "policy", "pretrain": "policy"}.get(stage, stage)
    with pytest.raises(NonFiniteError, match=f"{stage}, step 0: weights/{name} became"):
        STAGES[stage](gpt2(), RANKED, hooks, lr=1e30)
    assert not hooks.calls


@EVERY_STAGE
def test_dropout_is_off_in_whatever_mode_a_model_came(stage, monkeypatch):
    expected = STAGES[stage](gpt2(), RANKED)

    def in_train_mode(classifier_or_policy):
        for module in classifier_or_policy.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        return classifier_or_policy.train()

    for kind in (RewardModel, ValueModel):
        made = kind.from_policy  # bound before it is replaced
        monkeypatch.setattr(kind, "from_policy", lambda base, made=made: in_train_mode(made(base)))
    assert STAGES[stage](in_train_mode(gpt2()), RANKED) == expected


@EVERY_STAGE
def test_a_training_in_half_precision_computes_its_losses_in_single(stage, monkeypatch):
    """What CUDA does, on the CPU: bfloat16 in the models, float32 in the formulas."""
    single, seen = STAGES[stage](gpt2(), RANKED), []
    module, formula = {
        "sft": (sft, "masked_mean"), "reward": (reward_training, "ranking_loss"),
        "value": (value_training, "masked_mean"), "pretrain": (pretrain, "lm_loss"),
    }[stage]  # fmt: skip
    real = getattr(module, formula)
    monkeypatch.setattr(module, formula, lambda x, *args: seen.append(x.dtype) or real(x, *args))
    monkeypatch.setattr(
        "minippo.engine.passes.autocast", lambda _: torch.autocast("cpu", torch.bfloat16)
    )
    half = STAGES[stage](gpt2(), RANKED)
    assert set(seen) == {torch.float32}
    losses = [next(iter(h[0].items())) for h in (single, half)]
    assert losses[1] != losses[0]  # the models did compute in bfloat16
    assert losses[1][1] == pytest.approx(losses[0][1], rel=0.05)


@EVERY_STAGE
def test_a_training_without_rows_is_refused(stage, monkeypatch):
    from minippo import batching

    calls, real = [], batching.epoch_batches

    def counting(*args):
        calls.append(args)
        assert len(calls) < 10, "the plan of batches goes on for ever"
        return real(*args)

    monkeypatch.setattr(batching, "epoch_batches", counting)
    with pytest.raises(ValueError, match="there are no rows"):
        STAGES[stage](gpt2(), [])
