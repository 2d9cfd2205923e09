"""PPO's loss, update and training: gradients by other routes, toy rewards that must be learned."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minippo.config import PPOConfig
from minippo.engine import look, ranks
from minippo.engine.passes import response_logits
from minippo.models import RewardModel, ValueModel, frozen_copy, tiny_gpt2
from minippo.optim import Hooks, NonFiniteError, adamw
from minippo.ppo import logprobs_and_kl, ppo_loss, ppo_update, train_ppo, update_progress
from minippo.rollout import collect_rollout

V, PAD, EOS, WANTED = 40, 0, 1, 17
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
PROMPTS = [[5, 6, 7, 8, 9], [11], [21, 22, 23], [30, 31], [5, 6], [12, 13, 14, 15], [39], [38, 2]]
CONFIG = PPOConfig(
    steps=3, batch_size=8, minibatch_size=8, micro_batch_size=8, ppo_epochs=2, lr=1e-3,
    value_lr=1e-3, warmup_steps=0, max_prompt_tokens=8, max_response_tokens=10,
)  # fmt: skip


def lively(model, seed, scale=0.2):
    """Larger weights than a fresh model has; another seed makes another model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def gpt2(seed, width=16, scale=0.2):
    return lively(tiny_gpt2(V, n_layer=1, n_embd=width, n_head=2, n_positions=32), seed, scale)


def models(scale=0.2):
    """Policy, another policy as reference, and a critic that is not zero; some answers end."""
    policy, value_model = gpt2(1, scale=scale), ValueModel.from_policy(gpt2(3, width=24))
    with torch.no_grad():
        policy.transformer.ln_f.bias.add_(0.8 * policy.lm_head.weight[EOS])
    return policy, frozen_copy(gpt2(2, scale=scale)), value_model


def with_dropout(model):
    """The model as somebody may hand it over: with dropout, in train mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model.train()


def rule(tokens, attention_mask, query_length):
    """Half a point for each real token of the answer that is even."""
    response, real = tokens[:, query_length:], attention_mask[:, query_length:]
    return 0.5 * ((response % 2 == 0) & real).sum(1)


def share_of_wanted(tokens, attention_mask, query_length):
    """The share of one token among the real tokens of the answer."""
    response, real = tokens[:, query_length:], attention_mask[:, query_length:]
    return ((response == WANTED) & real).sum(1) / real.sum(1)


def moved_rollout(config=CONFIG, nudge=0.05):
    """A rollout, and models that have since moved, so that ratios and clipping are at work."""
    policy, ref_policy, value_model = models()
    rollout = collect_rollout(
        policy, ref_policy, value_model, rule, PROMPTS, TOKENIZER, config, seed=0
    )
    lively(policy, 11, nudge), lively(value_model, 12, nudge)
    return rollout, policy, ref_policy, value_model


def gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


def assert_same_gradients(got, expected, rtol):
    """Equal up to rtol of each tensor's own size, and anything but zero."""
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= rtol * float(b.norm()) + 1e-9
    assert sum(float(b.norm()) for b in expected) > 1e-2


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def train(config=CONFIG, score_fn=rule, seed=0, prompts=PROMPTS, hooks=None, trio=None):
    policy, ref_policy, value_model = trio or models()
    return train_ppo(
        policy, ref_policy, value_model, score_fn, prompts, TOKENIZER, config, seed=seed,
        hooks=hooks,
    )  # fmt: skip


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["full", "mse", "k3"])
def test_the_loss_and_its_parts_by_a_loop_over_tokens(estimator):
    config = dataclasses.replace(
        CONFIG, kl_loss_coef=0.4, kl_loss_estimator=estimator, vf_coef=0.3, temperature=0.8,
        clip_range=0.1, value_clip_range=0.15,
    )  # fmt: skip
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    loss, stats = ppo_loss(policy, ref_policy, value_model, rollout, config)
    sums, count = {"policy": 0.0, "value": 0.0, "kl": 0.0, "clipped": 0, "ratio": 0.0}, 0
    for i in range(len(PROMPTS)):
        length = int(rollout.mask[i].sum())
        answer = rollout.response[i, :length].tolist()
        p, q, values = lone_row(policy, ref_policy, value_model, i, answer, config.temperature)
        for t, token in enumerate(answer):
            ratio = math.exp(float(p[t, token]) - float(rollout.logprobs[i, t]))
            gain, eps = float(rollout.advantages[i, t]), config.clip_range
            held = min(max(ratio, 1 - eps), 1 + eps)
            sums["policy"] -= min(ratio * gain, held * gain)
            sums["clipped"] += held * gain < ratio * gain
            sums["ratio"] += ratio
            old, goal = float(rollout.values[i, t]), float(rollout.returns[i, t])
            near = min(max(values[t], old - 0.15), old + 0.15)
            sums["value"] += 0.5 * max((values[t] - goal) ** 2, (near - goal) ** 2)
            sums["kl"] += divergence(estimator, p[t], q[t], token)
            count += 1
    means = {name: total / count for name, total in sums.items()}
    assert means["clipped"] > 0.05
    expected = {
        "loss/policy": means["policy"],
        "loss/value": means["value"],
        "loss/kl": means["kl"],
        "loss/total": means["policy"] + 0.3 * means["value"] + 0.4 * means["kl"],
        "policy/clip_frac": means["clipped"],
        "policy/ratio": means["ratio"],
    }
    got = {name: float(stats[name].detach()) for name in expected}
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert float(loss.detach()) == pytest.approx(expected["loss/total"], rel=1e-4, abs=1e-5)


@torch.no_grad()
def lone_row(policy, ref_policy, value_model, i, answer, temperature):
    """Log-softmaxes of policy and reference and the values of one unpadded row."""
    ids, start = torch.tensor([PROMPTS[i] + answer]), len(PROMPTS[i]) - 1
    p, q = (
        torch.log_softmax(m(input_ids=ids).logits[0, start:-1] / temperature, -1)
        for m in (policy, ref_policy)
    )
    hidden = value_model.classifier.base_model(input_ids=ids).last_hidden_state[0, start:-1]
    return p, q, (hidden @ value_model.classifier.score.weight[0]).tolist()


def divergence(estimator, p, q, token):
    if estimator == "full":
        return float(F.kl_div(q, p, log_target=True, reduction="sum"))
    log_ratio = float(p[token] - q[token])
    return log_ratio**2 / 2 if estimator == "mse" else math.exp(-log_ratio) - 1 + log_ratio


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
@pytest.mark.parametrize("estimator", ["full", "mse", "k3"])
def test_micro_batches_of_unequal_lengths_give_the_gradient_of_the_whole(micro, estimator):
    config = dataclasses.replace(CONFIG, kl_loss_coef=0.5, kl_loss_estimator=estimator)
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    policy.double(), ref_policy.double(), value_model.double()  # so that rounding is no excuse
    rollout = as_double(rollout)
    ppo_loss(policy, ref_policy, value_model, rollout, config)[0].backward()
    expected = gradients(policy, value_model)
    policy.zero_grad(), value_model.zero_grad()
    for batch, share in rollout.micro_batches(micro):
        (ppo_loss(policy, ref_policy, value_model, batch, config)[0] * share).backward()
    assert_same_gradients(gradients(policy, value_model), expected, 1e-6)


def as_double(rollout):
    tensors = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    floats = {name: x.double() for name, x in tensors.items() if x.is_floating_point()}
    return dataclasses.replace(rollout, **floats)


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_an_update_in_micro_batches_takes_the_step_of_the_whole_minibatch(micro):
    config = dataclasses.replace(CONFIG, micro_batch_size=micro, ppo_epochs=1, kl_loss_coef=0.5)
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    ppo_loss(policy, ref_policy, value_model, rollout, config)[0].backward()
    expected = gradients(policy, value_model)
    loss = float(ppo_loss(policy, ref_policy, value_model, rollout, config)[0].detach())
    policy.zero_grad(), value_model.zero_grad()
    optimizer, seen = optimizer_of(policy, value_model), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(policy, value_model)))
    config = dataclasses.replace(config, max_grad_norm=1e9)
    generator = torch.Generator().manual_seed(0)
    stats = ppo_update(policy, ref_policy, value_model, optimizer, rollout, config, generator)
    assert_same_gradients(*seen, expected, 2e-6)
    assert float(stats["loss/total"]) == pytest.approx(loss, rel=1e-5)


def optimizer_of(policy, value_model, lr=1e-3):
    return adamw({"policy": policy, "value": value_model}, {"policy": lr, "value": lr})


def test_an_update_goes_over_every_row_once_per_epoch_and_averages_its_statistics():
    config = dataclasses.replace(CONFIG, minibatch_size=2, micro_batch_size=1, ppo_epochs=3)
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    optimizer = optimizer_of(policy, value_model, lr=1e-12)  # nothing moves
    steps = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    generator = torch.Generator().manual_seed(0)
    stats = ppo_update(policy, ref_policy, value_model, optimizer, rollout, config, generator)
    assert len(steps) == 3 * 8 / 2
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(3):
        for minibatch in rollout.minibatches(2, generator):
            losses.append(ppo_loss(policy, ref_policy, value_model, minibatch, config)[0].detach())
    assert float(stats["loss/total"]) == pytest.approx(sum(map(float, losses)) / 12, rel=1e-4)


@pytest.mark.parametrize("name", "logprobs ref_logprobs values advantages returns".split())
def test_masked_positions_touch_neither_loss_nor_gradient(name):
    config = dataclasses.replace(CONFIG, kl_loss_coef=0.5, kl_loss_estimator="mse")
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    loss, _ = ppo_loss(policy, ref_policy, value_model, rollout, config)
    loss.backward()
    expected = gradients(policy, value_model)
    policy.zero_grad(), value_model.zero_grad()
    dirty = getattr(rollout, name).masked_fill(~rollout.mask, math.nan)
    dirty = dataclasses.replace(rollout, **{name: dirty})
    again, _ = ppo_loss(policy, ref_policy, value_model, dirty, config)
    again.backward()
    assert float(again.detach()) == float(loss.detach())
    assert_same_gradients(gradients(policy, value_model), expected, 0)


@pytest.mark.parametrize("estimator", ["full", "mse", "k3"])
def test_a_hole_in_the_mask_is_left_out_of_every_term(estimator):
    """Against the formulas on the packed tokens that count, written out here."""
    config = dataclasses.replace(CONFIG, kl_loss_coef=0.5, kl_loss_estimator=estimator)
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    mask = rollout.mask.clone()
    mask[:, 1] = False
    assert (rollout.mask & ~mask).sum() > 3 and mask[:, 2:].any()
    names = "logprobs ref_logprobs values advantages returns".split()
    dirty = {name: getattr(rollout, name).masked_fill(~mask, math.nan) for name in names}
    _, stats = ppo_loss(
        policy, ref_policy, value_model, dataclasses.replace(rollout, mask=mask, **dirty), config
    )
    places = rollout.tokens, rollout.attention_mask, mask.shape[1]
    p, q = (response_logits(m, *places).log_softmax(-1)[mask] for m in (policy, ref_policy))
    tokens, values = rollout.response[mask], value_model(*places)[mask]
    old, old_values, wanted, returns = (
        getattr(rollout, name)[mask] for name in "logprobs values advantages returns".split()
    )
    ratio = (p[torch.arange(len(tokens)), tokens] - old).exp()
    surrogate = torch.min(ratio * wanted, ratio.clamp(0.8, 1.2) * wanted)
    near = old_values + (values - old_values).clamp(-0.2, 0.2)
    errors = torch.max((values - returns) ** 2, (near - returns) ** 2)
    kl = [divergence(estimator, *row) for row in zip(p.detach(), q.detach(), tokens.tolist())]
    assert config.clip_range == config.value_clip_range == 0.2
    surrogate, squares = float(surrogate.detach().mean()), float(errors.detach().mean())
    assert float(stats["loss/policy"].detach()) == pytest.approx(-surrogate, rel=1e-4)
    assert float(stats["loss/value"].detach()) == pytest.approx(squares / 2, rel=1e-4)
    assert float(stats["loss/kl"].detach()) == pytest.approx(sum(kl) / len(kl), rel=1e-4, abs=1e-6)


# --- the KL as a term of the loss ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_full_kl_loss_is_that_of_torch_kl_div_with_its_gradient(temperature):
    config = dataclasses.replace(CONFIG, kl_loss_coef=1.0, temperature=temperature)
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    _, stats = ppo_loss(policy, ref_policy, value_model, rollout, config)
    stats["loss/kl"].backward()
    got = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    p, q = (
        torch.log_softmax(
            response_logits(m, rollout.tokens, rollout.attention_mask, rollout.mask.shape[1])
            / temperature, -1,
        )[rollout.mask]
        for m in (policy, ref_policy)
    )  # fmt: skip
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean")  # KL(p, q), mean over tokens
    expected.backward()
    torch.testing.assert_close(stats["loss/kl"], expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(got, [x.grad for x in policy.parameters()], 1e-4)


@pytest.mark.parametrize("estimator", ["full", "mse", "k3"])
def test_the_gradient_of_the_kl_loss_does_not_reach_the_reference(estimator):
    config = dataclasses.replace(CONFIG, kl_loss_coef=1.0, kl_loss_estimator=estimator)
    rollout, policy, ref_policy, value_model = moved_rollout(config)
    ref_policy.requires_grad_(True)  # even where somebody forgot to freeze it
    loss, _ = ppo_loss(policy, ref_policy, value_model, rollout, config)
    loss.backward()
    assert all(p.grad is None for p in ref_policy.parameters())
    assert all(p.grad is not None for p in policy.parameters())


@pytest.mark.parametrize("estimator", ["full", "mse", "k3"])
def test_an_impossible_token_does_not_spoil_the_kl_gradient(estimator, monkeypatch):
    config = dataclasses.replace(CONFIG, kl_loss_coef=1.0, kl_loss_estimator=estimator)
    rollout, policy, ref_policy, _ = moved_rollout(config)
    logits = torch.zeros(int(rollout.mask.sum()), V)
    unwritten = next(token for token in range(V) if token not in rollout.packed.targets)
    logits[:, unwritten] = -200.0
    logits.requires_grad_()
    real = look.packed_logits
    given = lambda model, packed: logits if model is policy else real(model, packed)  # noqa: E731
    monkeypatch.setattr(look, "packed_logits", given)
    loss = logprobs_and_kl(policy, ref_policy, rollout, config)[1].sum()
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(logits.grad).all())


def test_no_kl_is_computed_where_its_coefficient_is_zero():
    rollout, policy, _, value_model = moved_rollout()
    loss, stats = ppo_loss(policy, None, value_model, rollout, CONFIG)  # no reference is asked
    assert float(stats["loss/kl"]) == 0 and bool(torch.isfinite(loss))


# --- training ---------------------------------------------------------------------------------


def test_with_tiny_learning_rates_the_ratio_stays_one():
    for metrics in train(dataclasses.replace(CONFIG, lr=1e-12, value_lr=1e-12, minibatch_size=4,
                                             micro_batch_size=2)):  # fmt: skip
        assert abs(metrics["policy/ratio"] - 1) < 1e-5
        assert metrics["policy/approx_kl"] < 1e-8 and metrics["policy/clip_frac"] == 0


def test_without_prompts_nothing_is_said_of_their_length():
    config = dataclasses.replace(CONFIG, max_response_tokens=models()[0].config.n_positions)
    with pytest.raises(ValueError, match="no rows"):
        train_ppo(*models(), rule, [], TOKENIZER, config)


def test_dropout_is_off_in_all_four_models_in_whatever_mode_they_came(monkeypatch):
    four = [*models(), RewardModel.from_policy(gpt2(5, width=32))]
    quiet = train(score_fn=four[3], trio=copy.deepcopy(four[:3]))
    four, log_ratios = [with_dropout(model) for model in four], []

    def spy(policy, ref_policy, value_model, batch, config):
        places = (batch.tokens, batch.attention_mask, batch.mask.shape[1])
        logits = response_logits(policy, *places).detach()
        logprobs = torch.log_softmax(logits, -1).gather(-1, batch.response[..., None]).squeeze(-1)
        log_ratios.append(float((logprobs - batch.logprobs)[batch.mask].abs().max()))
        return ppo_loss(policy, ref_policy, value_model, batch, config)

    monkeypatch.setattr("minippo.ppo.ppo_loss", spy)
    assert train(score_fn=four[3], trio=four[:3]) == quiet
    assert log_ratios[0] <= 1e-5 and max(log_ratios) > 1e-3  # the first minibatch, and later ones
    assert not any(model.training for model in four)


def test_a_history_has_the_keys_of_the_course_and_floats_only():
    (metrics, *_) = train()
    expected = (
        "objective/scores objective/raw_scores objective/rewards objective/kl_per_sequence"
        " objective/kl_per_token objective/entropy objective/kl_coef objective/eos_rate"
        " objective/response_tokens value/explained_variance value/clip_frac loss/policy"
        " loss/value loss/kl loss/total policy/approx_kl policy/clip_frac policy/ratio"
        " grad_norm/policy grad_norm/value"
    )
    assert set(expected.split()) <= set(metrics)
    assert all(type(value) is float for value in metrics.values())


def test_two_runs_of_one_seed_are_identical_and_of_two_seeds_are_not():
    one, two, other = train(), train(), train(seed=1)
    assert one == two and one != other


def test_every_step_of_every_seed_has_an_order_of_minibatches_of_its_own(monkeypatch):
    orders = []

    def spy(*args):
        orders.append(tuple(torch.randperm(50, generator=args[-1]).tolist()))
        return {"loss/total": 0.0}

    monkeypatch.setattr("minippo.ppo.ppo_update", spy)
    train(), train(seed=1), train()
    assert len(set(orders[:6])) == 6 and orders[6:] == orders[:3]


def test_the_reference_stays_and_policy_and_critic_move():
    trio = models()
    before = [weights(m) for m in trio]
    train(trio=trio)
    policy, ref_policy, value_model = (
        equal(weights(m), old) for m, old in zip(trio, before, strict=True)
    )
    assert (policy, ref_policy, value_model) == (False, True, False)


def test_a_reward_model_stays_as_it_is():
    reward = RewardModel.from_policy(gpt2(5, width=32))
    before = weights(reward)
    train(score_fn=reward)
    assert equal(weights(reward), before) and all(p.grad is None for p in reward.parameters())


LEARNING = dataclasses.replace(
    CONFIG, steps=20, batch_size=32, minibatch_size=16, micro_batch_size=16, lr=2e-2,
    value_lr=1e-2, missing_eos_penalty=0.0, max_response_tokens=8,
)  # fmt: skip
TOYS = {
    "gae": {"kl_coef": 0.002},
    "simple": {"kl_coef": 0.002, "advantage": "simple"},
    "kl in the loss": {"kl_coef": 0.0, "kl_loss_coef": 0.002},
    "gae without whitening": {"kl_coef": 0.0, "whiten_advantages": False, "lam": 1.0},
}


def fresh_trio(seed):
    """A new policy, its reference and a critic from a reward model, as a real run has them."""
    policy = tiny_gpt2(V, n_layer=1, n_embd=16, n_head=2, n_positions=32, seed=seed)
    value_model = ValueModel.from_reward_model(RewardModel.from_policy(policy, seed))
    return policy, frozen_copy(policy), value_model


@pytest.mark.integration
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_toy_policy_learns_to_write_the_wanted_token(toy, seed):
    config = dataclasses.replace(LEARNING, **TOYS[toy])
    prompts = [[i % 38 + 2, i % 7 + 2] for i in range(64)]
    history = train(config, share_of_wanted, seed, prompts, trio=fresh_trio(seed))
    shares = [metrics["objective/raw_scores"] for metrics in history]
    assert shares[0] < 0.06  # one token in forty
    assert sum(shares[-3:]) / 3 > 0.9


def test_the_critics_loss_falls_when_only_the_critic_learns():
    config = dataclasses.replace(LEARNING, steps=25, lr=1e-12, kl_coef=0.0, value_clip_range=10.0)
    prompts = [[i % 38 + 2, i % 7 + 2] for i in range(64)]

    def by_prompt(tokens, attention_mask, query_length):  # known before a token is written
        return (tokens[:, query_length - 1] >= 5).float() * 2 - 1

    history = train(config, by_prompt, 0, prompts, trio=fresh_trio(0))
    errors = [m["loss/value"] for m in history]
    assert sum(errors[-3:]) < 0.2 * sum(errors[:3])
    assert history[-1]["value/explained_variance"] > 0.8 > history[0]["value/explained_variance"]


@pytest.mark.integration
def test_a_strong_kl_penalty_keeps_the_policy_near_its_reference():
    prompts = [[i % 38 + 2, i % 7 + 2] for i in range(64)]
    final = {}
    for name, setting in {
        "free": {"kl_coef": 0.0},
        "in the reward": {"kl_coef": 0.5},
        "in the loss": {"kl_coef": 0.0, "kl_loss_coef": 5.0},
    }.items():
        config = dataclasses.replace(LEARNING, **setting)
        history = train(config, share_of_wanted, 0, prompts, trio=fresh_trio(0))
        final[name] = history[-1]["objective/kl_per_sequence"]
    assert final["free"] > 8 and max(final["in the reward"], final["in the loss"]) < 2


# --- the adaptive coefficient and the stop rule -------------------------------------------------


def test_the_adaptive_coefficient_rises_above_the_target_and_falls_below_it():
    coefs = {}
    for target in (1e-3, 1e3):
        config = dataclasses.replace(CONFIG, target_kl=target, kl_horizon=80, kl_coef=0.5)
        history = train(config)
        coefs[target] = [metrics["objective/kl_coef"] for metrics in history]
    # The error is clipped at 0.2, so each step is 1 +- 0.2 * 8 / 80.
    assert coefs[1e-3] == pytest.approx([0.5, 0.5 * 1.02, 0.5 * 1.02**2], rel=1e-6)
    assert coefs[1e3] == pytest.approx([0.5, 0.5 * 0.98, 0.5 * 0.98**2], rel=1e-6)


def test_a_fixed_coefficient_stays():
    assert [m["objective/kl_coef"] for m in train()] == pytest.approx([CONFIG.kl_coef] * 3)


def test_the_coefficient_in_force_is_the_one_that_is_charged():
    config = dataclasses.replace(CONFIG, target_kl=1e-3, kl_horizon=8, lr=1e-12, value_lr=1e-12)
    for metrics in train(config):
        charged = metrics["objective/scores"] - metrics["objective/rewards"]
        expected = metrics["objective/kl_coef"] * metrics["objective/kl_per_sequence"]
        assert charged == pytest.approx(expected, rel=1e-4)


def test_training_stops_where_the_kl_exceeds_its_limit():
    config = dataclasses.replace(CONFIG, steps=6)
    kls = [m["objective/kl_per_sequence"] for m in train(config)]
    limit = sorted(kls)[2]
    first = next(i for i, kl in enumerate(kls) if kl > limit)
    stopped = train(dataclasses.replace(config, stop_kl=limit))
    assert [m["objective/kl_per_sequence"] for m in stopped] == kls[: first + 1]
    assert len(train(dataclasses.replace(config, stop_kl=max(kls) * 2))) == 6


@pytest.mark.parametrize("patience, steps", [(1, 3), (2, 6), (3, 7), (9, 8)])
def test_training_stops_after_its_patience_without_a_better_score(patience, steps):
    means = [1.0, 3.0, 2.0, 4.0, 4.0, 3.0, 1.0, 0.0]  # the best so far at steps 0, 1 and 3
    config = dataclasses.replace(CONFIG, stop_patience=patience)
    progress, stopped = {"kl_coef": 0.1, "best_score": None, "best_step": 0}, 8
    for step, mean in enumerate(means):
        metrics = {"objective/kl_per_sequence": 1.0, "objective/scores": mean}
        if update_progress(progress, metrics, step, config):
            stopped = step + 1
            break
    assert stopped == steps


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_scores_that_never_change_run_out_of_patience(patience):
    config = dataclasses.replace(
        CONFIG, steps=6, stop_patience=patience, missing_eos_penalty=0.0, lr=1e-12, value_lr=1e-12
    )
    constant = train(config, lambda tokens, *_: torch.ones(len(tokens)))
    assert len(constant) == patience + 1


def test_no_stop_rule_means_no_stop():
    assert len(train(dataclasses.replace(CONFIG, steps=4))) == 4


# --- hooks and resuming -------------------------------------------------------------------------


class Recorder(Hooks):
    """Keeps a copy of the state after each step; begins where it is told, from such a copy."""

    def __init__(self, begin=0, state=None):
        self.begin, self.given, self.states, self.metrics = begin, state, [], []

    def start(self, stage, total, state):
        self.called, self.state = (stage, total), state
        for name in self.given or {}:
            target, saved = state[name], self.given[name]
            target.update(saved) if isinstance(target, dict) else target.load_state_dict(saved)
        return self.begin

    def step(self, stage, step, metrics):
        self.metrics.append((stage, step, metrics))
        self.states.append({
            name: copy.deepcopy(x if isinstance(x, dict) else x.state_dict())
            for name, x in self.state.items()
        })  # fmt: skip


def test_hooks_see_every_step_with_its_metrics():
    hooks = Recorder()
    history = train(hooks=hooks)
    assert hooks.called == ("ppo", 3)
    assert hooks.metrics == [("ppo", step, metrics) for step, metrics in enumerate(history)]


def test_a_resumed_training_goes_on_exactly_where_it_stopped():
    config = dataclasses.replace(CONFIG, steps=4, target_kl=0.01, kl_horizon=20, warmup_steps=2)
    whole = Recorder()
    history = train(config, hooks=whole)
    rest = train(config, hooks=Recorder(2, whole.states[1]))
    assert rest == history[2:]


# --- what is refused --------------------------------------------------------------------------


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt has no token"):
        train(prompts=[*PROMPTS[:-1], []])


def test_a_last_minibatch_too_small_for_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    config = dataclasses.replace(CONFIG, minibatch_size=4, micro_batch_size=4)
    with pytest.raises(ValueError, match="the last minibatch has 2 rows, too few for 3 processes"):
        train(config, prompts=PROMPTS[:6])


# --- what breaks --------------------------------------------------------------------------------


def breaks_at(step, value):
    """A score_fn that is fine until one step, where one of its scores is broken."""
    calls = []

    def score_fn(*args):
        calls.append(1)
        scores = rule(*args)
        return scores.index_fill(0, torch.tensor([2]), value) if len(calls) == step + 1 else scores

    return score_fn


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_score_stops_the_training_and_names_stage_step_and_key(value):
    hooks = Recorder()
    with pytest.raises(NonFiniteError) as error:
        train(score_fn=breaks_at(1, value), hooks=hooks)
    message = str(error.value)
    assert "ppo" in message and "step 1" in message and "scores" in message
    assert len(hooks.metrics) == 1  # the broken step was not handed on


def test_a_broken_score_leaves_finite_weights():
    trio = models()
    with pytest.raises(ValueError):
        train(score_fn=breaks_at(1, math.nan), trio=trio)
    assert all(bool(torch.isfinite(w).all()) for m in trio for w in weights(m))


def test_an_infinite_loss_stops_the_training_and_names_it():
    config = dataclasses.replace(CONFIG, vf_coef=1e38)  # finite, as is the loss that it weighs
    with pytest.raises(NonFiniteError, match=r"ppo, step 0.*loss/total"):
        train(config, lambda *args: rule(*args) + 100)


def untouched(*args):
    raise AssertionError("a rollout was made")


@pytest.mark.parametrize("length", [23, 40])
def test_prompts_beyond_the_context_are_refused_whatever_the_configured_limit(length):
    assert CONFIG.max_prompt_tokens == 8  # prompts are cut in batching, which may be left out
    with pytest.raises(ValueError, match=f"{length + 10}.*32.*GPT2LMHeadModel.*max_prompt_tokens"):
        train(score_fn=untouched, prompts=[*PROMPTS, [5] * length])


def test_prompts_that_fit_are_taken_whatever_the_configured_limit():
    config = dataclasses.replace(CONFIG, steps=1, max_prompt_tokens=128)
    assert len(train(config, prompts=[*PROMPTS, [5] * 22])) == 1


@pytest.mark.parametrize("name", ["ref_policy", "value_model", "score_fn"])
def test_the_context_of_every_model_must_hold_prompt_and_answer(name):
    short = tiny_gpt2(V, n_layer=1, n_embd=16, n_head=2, n_positions=14)
    given = dict(zip(("policy", "ref_policy", "value_model"), models(), strict=True))
    given["score_fn"] = RewardModel.from_policy(gpt2(5))
    kinds = {"ref_policy": frozen_copy, "value_model": ValueModel.from_policy}
    given[name] = kinds.get(name, RewardModel.from_policy)(short)
    with pytest.raises(ValueError, match=f"15.*14.*{type(given[name]).__name__}"):
        train_ppo(*given.values(), PROMPTS, TOKENIZER, CONFIG)


def test_a_policy_that_is_its_own_reference_is_refused():
    policy, _, value_model = models()
    with pytest.raises(ValueError, match=r"frozen_copy\(policy\)"):
        train(score_fn=untouched, trio=(policy, policy, value_model))


@pytest.mark.parametrize("name", ["policy", "value"])
def test_a_step_that_breaks_weights_at_a_finite_loss_is_not_handed_on(name):
    rates = {"lr": 1e30} if name == "policy" else {"value_lr": 1e30}
    config = dataclasses.replace(CONFIG, ppo_epochs=1, **rates)  # no loss comes after that step
    hooks = Recorder()
    with pytest.raises(NonFiniteError, match=f"ppo, step 0: weights/{name} became"):
        train(config, hooks=hooks)
    assert not hooks.metrics


def test_fewer_prompts_than_a_batch_are_all_used():
    history = train(dataclasses.replace(CONFIG, batch_size=16), prompts=PROMPTS[:5])
    assert len(history) == 3
