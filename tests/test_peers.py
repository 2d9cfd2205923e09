"""Ours beside trl 1.12.0, the last release that had a PPO trainer.

Its masked statistics are functions and are called. GAE, KL and losses stand inline in `train()`, so
the very lines are read from the installed file and run on our tensors: line numbers below are those
of `trl/experimental/ppo/ppo_trainer.py` in that release. What a line gives is also worked by hand.
Where the conventions differ, the difference is asserted, not tolerated.

    pip install "minippo[bench]"
"""

import importlib.metadata
import math
import os
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_conventions import TABLE

from minippo.advantages import gae
from minippo.kl import kl_k1, kl_k2, kl_k3
from minippo.logprobs import entropy_from_logits, gather_logprobs, response_window
from minippo.losses import policy_loss, ppo_objective, preference_loss, value_loss
from minippo.masking import masked_mean, masked_var, masked_whiten, response_mask
from minippo.rewards import penalize_missing_eos, per_token_rewards

VERSION = "1.12.0"


def installed() -> str:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "missing"


if installed() != VERSION:
    reason = f"needs trl=={VERSION}, it is {installed()}: pip install 'minippo[bench]'"
    pytest.skip(reason, allow_module_level=True)

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trl.experimental.ppo import PPOConfig as PeerConfig  # noqa: E402
from trl.experimental.ppo import ppo_trainer as peer  # noqa: E402
from trl.trainer import reward_trainer as peer_reward  # noqa: E402

PAD, EOS, LAM = 0, 2, 0.95
ARGS = {field.name: field.default for field in fields(PeerConfig)}


def run_lines(first: int, last: int, begins: str, module=peer, **names) -> SimpleNamespace:
    """Runs lines first..last of a module of trl; what they assign comes back."""
    lines = Path(module.__file__).read_text(encoding="utf-8").splitlines()[first - 1 : last]
    code = textwrap.dedent("\n".join(lines))
    assert code.startswith(begins), f"line {first} is {code[:60]!r}"
    scope = {**vars(module), **names}
    exec(compile(code, f"{module.__file__}:{first}", "exec"), scope)
    return SimpleNamespace(**scope)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- the statistics, called -------------------------------------------------------------------

HOLES = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def test_mean_variance_and_whitening_are_the_same():
    x = randn(3, 5)
    torch.testing.assert_close(masked_mean(x, HOLES), peer.masked_mean(x, HOLES))
    torch.testing.assert_close(masked_mean(x, HOLES, dim=1), peer.masked_mean(x, HOLES, axis=1))
    for unbiased in (True, False):
        theirs = peer.masked_var(x, HOLES, unbiased)
        torch.testing.assert_close(masked_var(x, HOLES, unbiased), theirs)
    whitened = peer.masked_whiten(x, HOLES).masked_fill(~HOLES, 0)  # as line 798 does
    torch.testing.assert_close(masked_whiten(x, HOLES), whitened)


def test_theirs_can_leave_the_mean_in_ours_takes_it_off():
    x = randn(3, 5) + 7
    kept = peer.masked_whiten(x, HOLES, shift_mean=False)
    off = masked_whiten(x, HOLES)
    torch.testing.assert_close(kept[HOLES], off[HOLES] + masked_mean(x, HOLES))


def test_a_masked_nan_spoils_theirs_and_not_ours():
    x = randn(3, 5).masked_fill(~HOLES, math.nan)
    for ours, theirs in ((masked_mean, peer.masked_mean), (masked_var, peer.masked_var)):
        assert theirs(x, HOLES).isnan() and ours(x, HOLES).isfinite()


def test_an_empty_mask_is_an_error_there_and_nan_here():
    x, nothing = randn(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="sum of the mask is zero"):
        peer.masked_var(x, nothing)
    assert masked_var(x, nothing).isnan()
    one = torch.tensor([[True, False, False]])  # 0 * 1/0 on both sides
    assert peer.masked_var(x, one).isnan() and masked_var(x, one).isnan()


# --- log-probabilities and masks --------------------------------------------------------------


def test_log_probabilities_window_and_temperature():
    logits, response = randn(3, 7, 11), torch.randint(3, 11, (3, 4))
    for temperature in (1.0, 0.7):
        given = logits.clone()
        theirs = run_lines(
            712, 714, "ref_logits =", ref_output=SimpleNamespace(logits=given),
            context_length=3, args=SimpleNamespace(temperature=temperature), response=response,
        ).ref_logprob  # fmt: skip
        ours = gather_logprobs(response_window(logits, 4), response, temperature)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        assert (ours - theirs).abs().max() > 1e-9  # they divide by the temperature + 1e-7
        assert not torch.equal(given, logits)  # and write into the output of the model
    exact = peer.selective_log_softmax(response_window(logits, 4), response)
    torch.testing.assert_close(gather_logprobs(response_window(logits, 4), response), exact)


def test_entropy_is_the_same_but_where_a_token_is_excluded():
    logits = randn(2, 3, 5)
    theirs = run_lines(855, 856, "prob_dist =", logits=logits).entropy
    torch.testing.assert_close(entropy_from_logits(logits), theirs)
    logits[..., 0] = -math.inf
    assert run_lines(855, 856, "prob_dist =", logits=logits).entropy.isnan().all()
    assert entropy_from_logits(logits).isfinite().all()


RESPONSES = torch.tensor([[5, 6, EOS, 9, 9], [7, EOS, 8, EOS, 9], [5, 6, 7, 8, 9]])


def truncated(pad_id: int):
    """Their mask of what does not count, from the sampled tokens: lines 721-723, 727, 763-764."""
    response = peer.truncate_response(EOS, pad_id, RESPONSES)
    tokenizer = SimpleNamespace(pad_token_id=pad_id)
    names = {"postprocessed_response": response, "processing_class": tokenizer}
    lengths = run_lines(727, 727, "sequence_length =", **names).sequence_length
    return run_lines(763, 764, "response_idxs =", responses=response, sequence_lengths=lengths)


def test_the_mask_is_the_same_if_padding_has_its_own_token():
    assert torch.equal(response_mask(RESPONSES, EOS), ~truncated(PAD).padding_mask)


def test_their_mask_loses_the_eos_where_padding_is_eos():
    ours, theirs = response_mask(RESPONSES, EOS), ~truncated(EOS).padding_mask
    assert ours.sum(1).tolist() == [3, 2, 5] and theirs.sum(1).tolist() == [2, 1, 5]


# --- rewards and advantages -------------------------------------------------------------------


def rollout(response, scores, logprobs, ref_logprobs, values, **settings) -> SimpleNamespace:
    """Their rewards, advantages and returns: lines 755-798 over a truncated response (B, R)."""
    args = SimpleNamespace(**{**ARGS, **settings})
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    copies = {"scores": scores.clone(), "logprobs": logprobs, "ref_logprobs": ref_logprobs}
    return run_lines(
        755, 798, "# Response Processing 3", responses=response, postprocessed_responses=response,
        sequence_lengths=peer.first_true_indices(response == PAD) - 1, values=values, args=args,
        self=SimpleNamespace(processing_class=tokenizer, args=args), **copies,
    )  # fmt: skip


def random_rollout(response, **settings):
    """The same numbers for both sides, and their result."""
    shape = tuple(response.shape)
    inputs = randn(shape[0]), -randn(*shape, seed=1).abs(), -randn(*shape, seed=2).abs()
    inputs += (randn(*shape, seed=3),)
    return inputs, rollout(response, *inputs, **settings)


FULL = torch.tensor([[5, 6, 7, 8, EOS], [5, 6, 7, 8, 9]])  # no padding: nothing differs
PADDED = torch.tensor([[5, 6, EOS, PAD, PAD], [7, EOS, PAD, PAD, PAD], [5, 6, 7, 8, 9]])


@pytest.mark.parametrize("name, estimator", [("k1", kl_k1), ("k3", kl_k3)])
def test_the_kl_is_the_same_and_0_where_masked(name, estimator):
    (_, logprobs, ref_logprobs, _), theirs = random_rollout(PADDED, kl_estimator=name)
    mask = response_mask(PADDED, EOS)
    filled = (x.masked_fill(~mask, 0) for x in (logprobs, ref_logprobs))
    torch.testing.assert_close(estimator(*filled), theirs.kl)
    assert (theirs.kl[~mask] == 0).all()  # though the log-probabilities stand at 1.0 there
    assert (theirs.logprobs[~mask] == peer.INVALID_LOGPROB).all()


def test_their_k3_cancels_where_the_policies_nearly_agree():
    logprobs, ref_logprobs = torch.zeros(1, 1), torch.full((1, 1), 1e-4)  # k3 = 5.0002e-9
    inputs = torch.zeros(1), logprobs, ref_logprobs, torch.zeros(1, 1)
    theirs = rollout(torch.tensor([[EOS]]), *inputs, kl_estimator="k3").kl.item()
    assert kl_k3(logprobs, ref_logprobs).item() == pytest.approx(5.00017e-9, rel=1e-2)
    assert abs(theirs - 5.00017e-9) > 0.5 * 5e-9


def test_rewards_and_gae_are_the_same_where_nothing_is_padded():
    (scores, logprobs, ref_logprobs, values), theirs = random_rollout(FULL, lam=LAM)
    mask = response_mask(FULL, EOS)
    assert mask.all()
    rewards = per_token_rewards(scores, kl_k1(logprobs, ref_logprobs), mask, ARGS["kl_coef"])
    torch.testing.assert_close(rewards, theirs.rewards)
    advantages, returns = gae(rewards, values, mask, ARGS["gamma"], LAM)
    torch.testing.assert_close(returns, theirs.returns)
    torch.testing.assert_close(advantages, theirs.returns - values)
    torch.testing.assert_close(masked_whiten(advantages, mask), theirs.advantages)


def test_the_score_stands_one_token_later_where_there_is_padding():
    (scores, logprobs, ref_logprobs, _), theirs = random_rollout(PADDED)
    mask = response_mask(PADDED, EOS)
    penalties = per_token_rewards(torch.zeros(3), theirs.kl, mask, ARGS["kl_coef"])
    torch.testing.assert_close(penalties, theirs.non_score_reward)
    place_of_theirs = (theirs.rewards - penalties).abs().argmax(1)
    ours = per_token_rewards(scores, theirs.kl, mask, ARGS["kl_coef"])
    assert (ours - penalties).abs().argmax(1).tolist() == [2, 1, 4]
    assert place_of_theirs.tolist() == [3, 2, 4]  # the last row has no pad to put it on
    torch.testing.assert_close(theirs.rewards.sum(1), ours.sum(1))  # nothing is lost


def one_answer(value_at_pad: float, lam: float):
    """Tokens [a, EOS, pad, pad], V = 0.3, 0.5 and V(pad), score 1, no KL: both sides."""
    response = torch.tensor([[5, EOS, PAD, PAD]])
    values = torch.tensor([[0.3, 0.5, value_at_pad, 9.0]], dtype=torch.float64)
    zeros, score = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    theirs = rollout(response, score, zeros, zeros, values, lam=lam, gamma=1.0)
    mask = response_mask(response, EOS)
    ours, _ = gae(per_token_rewards(score, zeros, mask, 1.0), values, mask, 1.0, lam)
    return ours[0, :2].tolist(), (theirs.returns - theirs.values)[0].tolist()


def test_an_answer_worked_by_hand_on_both_sides():
    ours, theirs = one_answer(value_at_pad=0.2, lam=0.95)
    # ours:   A_1 = 1 - 0.5 = 0.5                     A_0 = 0.5 - 0.3 + 0.95 * 0.5 = 0.675
    assert ours == pytest.approx([0.675, 0.5])
    # theirs: A_3 = 0 (masked), A_2 = 1 - 0.2 = 0.8   A_1 = 0.2 - 0.5 + 0.95 * 0.8 = 0.46
    #         A_0 = 0.5 - 0.3 + 0.95 * 0.46 = 0.637
    assert theirs == pytest.approx([0.637, 0.46, 0.8, 0.0])


def test_the_later_score_makes_no_difference_at_lambda_1_only():
    ours, theirs = one_answer(value_at_pad=0.2, lam=1.0)
    assert ours == pytest.approx(theirs[:2])
    ours, theirs = one_answer(value_at_pad=0.0, lam=0.95)  # V(pad) = 0 does not save it
    assert ours[1] - theirs[1] == pytest.approx(0.05 * 1)  # (1 - lambda) of the score is gone


def test_whitening_is_over_the_same_tokens():
    (*_, values), theirs = random_rollout(PADDED)
    mask = response_mask(PADDED, EOS)
    unwhitened = theirs.returns - theirs.values
    torch.testing.assert_close(masked_whiten(unwhitened, mask), theirs.advantages)


def test_a_missing_eos_costs_the_same():
    (scores, *_), theirs = random_rollout(PADDED, missing_eos_penalty=1.5)
    ours = penalize_missing_eos(scores, response_mask(PADDED, EOS), PADDED, EOS, 1.5)
    torch.testing.assert_close(ours, theirs.scores)
    assert (ours != scores).tolist() == [False, False, True]


# --- losses -----------------------------------------------------------------------------------


def update(response, new_logprobs, new_values, theirs) -> SimpleNamespace:
    """Their losses and statistics on the whole rollout: lines 824-826, 828-847 and 852-857."""
    rows = torch.arange(len(response))
    old = {"mb_advantage": theirs.advantages, "mb_logprobs": theirs.logprobs}
    old |= {"mb_return": theirs.returns, "mb_values": theirs.values, "micro_batch_inds": rows}
    old |= {"padding_mask": theirs.padding_mask, "padding_mask_p1": theirs.padding_mask_p1}
    args = SimpleNamespace(**{**ARGS, "cliprange_value": 0.2})
    masked = run_lines(824, 826, "new_logprobs =", new_logprobs=new_logprobs, **old).new_logprobs
    names = {**old, "new_logprobs": masked, "vpred": new_values, "args": args}
    losses = run_lines(828, 847, "vpred = torch.masked_fill", **names)
    stats = run_lines(852, 854, "pg_clipfrac =", **vars(losses))
    rest = run_lines(857, 857, "approxkl =", **vars(losses))
    return SimpleNamespace(**{**vars(stats), "approxkl": rest.approxkl})


def both_updates(response):
    """Our two losses with their statistics and the other side's, from one rollout."""
    (_, logprobs, _, values), theirs = random_rollout(response)
    shape = tuple(response.shape)
    new = logprobs + 0.3 * randn(*shape, seed=4), values + 0.3 * randn(*shape, seed=5)
    mask = response_mask(response, EOS)
    policy = policy_loss(new[0], logprobs, theirs.advantages, mask, ARGS["cliprange"])
    value = value_loss(new[1], theirs.values, theirs.returns, mask, ARGS["cliprange_value"])
    return mask, policy, value, update(response, *new, theirs), new[0] - logprobs


@pytest.mark.parametrize("response", [FULL, PADDED], ids=["full", "padded"])
def test_the_policy_loss_and_its_clip_fraction_are_the_same(response):
    _, (loss, stats), _, theirs, _ = both_updates(response)
    torch.testing.assert_close(loss, theirs.pg_loss)
    torch.testing.assert_close(stats["clip_frac"].float(), theirs.pg_clipfrac)
    assert stats["clip_frac"] > 0


def test_value_loss_and_total_are_the_same_where_nothing_is_padded():
    _, (policy, _), (value, stats), theirs, _ = both_updates(FULL)
    torch.testing.assert_close(value, theirs.vf_loss)
    torch.testing.assert_close(stats["clip_frac"].float(), theirs.vf_clipfrac)
    total = ppo_objective(policy, value, torch.zeros(()), ARGS["vf_coef"], 0.0)
    torch.testing.assert_close(total, theirs.loss)


def test_their_value_loss_counts_one_pad_of_each_padded_answer():
    mask, _, (ours, _), theirs, _ = both_updates(PADDED)
    one_more = ~theirs.padding_mask_p1
    assert (one_more.sum(1) - mask.sum(1)).tolist() == [1, 1, 0]
    pads = 0.5 * theirs.vf_loss_max[one_more & ~mask].sum()
    expected = (ours * mask.sum() + pads) / one_more.sum()
    torch.testing.assert_close(theirs.vf_loss, expected)
    assert (theirs.vf_loss - ours).abs() > 0.01


def test_their_approximate_kl_and_ratio_are_diluted_by_padding():
    mask, (_, stats), _, theirs, log_ratio = both_updates(PADDED)
    share = mask.sum() / mask.numel()
    assert share.item() == pytest.approx(10 / 15)
    k2 = masked_mean(kl_k2(log_ratio, torch.zeros_like(log_ratio)), mask)
    torch.testing.assert_close(theirs.approxkl, k2 * share)
    k3 = masked_mean(log_ratio.exp() - 1 - log_ratio, mask)
    torch.testing.assert_close(stats["approx_kl"], k3)
    torch.testing.assert_close(theirs.ratio.mean(), stats["ratio"] * share + (1 - share))


def test_a_value_loss_worked_by_hand_on_both_sides():
    # V = 0.5, old value 0, return 1, clip 0.2: half of max((0.5 - 1)^2, (0.2 - 1)^2) = 0.32
    one, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    theirs = SimpleNamespace(
        advantages=one, logprobs=0 * one, returns=one, values=0 * one,
        padding_mask=~mask, padding_mask_p1=~mask,
    )  # fmt: skip
    result = update(torch.tensor([[EOS]]), math.log(1.5) * one, 0.5 * one, theirs)
    assert result.vf_loss.item() == pytest.approx(0.32)
    assert value_loss(0.5 * one, 0 * one, one, mask, 0.2)[0].item() == pytest.approx(0.32)
    # ratio 1.5, advantage 1: -min(1.5, 1.2) = -1.2
    assert result.pg_loss.item() == pytest.approx(-1.2)
    ours, _ = policy_loss(math.log(1.5) * one, 0 * one, one, mask, 0.2)
    assert ours.item() == pytest.approx(-1.2)


@pytest.mark.parametrize("margin", [None, [0.5, 0.0, 2.0]])
def test_the_reward_model_loss_is_the_same(margin):
    chosen, rejected = randn(2, 3).unbind()
    margin = None if margin is None else torch.tensor(margin, dtype=torch.float64)
    names = {"rewards_chosen": chosen, "rewards_rejected": rejected}
    names["inputs"] = {} if margin is None else {"margin": margin}
    theirs = run_lines(754, 757, 'if "margin" in inputs', peer_reward, **names).loss
    torch.testing.assert_close(preference_loss(chosen, rejected, margin), theirs)


def test_the_page_of_conventions_has_their_defaults():
    theirs = {title: cells["last TRL"] for title, cells in TABLE.items()}
    assert theirs["Clip, policy and value"] == [ARGS["cliprange"], ARGS["cliprange_value"]]
    assert theirs["Weight of the value loss"] == [ARGS["vf_coef"]]
    assert theirs["Lambda"] == [ARGS["lam"]] and theirs["Temperature"] == [ARGS["temperature"]]
    assert ARGS["missing_eos_penalty"] is None and not ARGS["whiten_rewards"]
