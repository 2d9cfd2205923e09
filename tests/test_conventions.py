"""Every number in docs/conventions.md is computed here; a number that is changed fails.

Ours by our own functions, the others' by their rule over plain floats.
"""

import math
import re
import statistics
from pathlib import Path

import pytest
import torch

from minippo.advantages import gae
from minippo.config import PPOConfig
from minippo.kl import KL_ESTIMATORS, adapt_kl_coef, kl_full, kl_k1, kl_k2, kl_k3
from minippo.logprobs import gather_logprobs
from minippo.losses import policy_loss, ppo_objective, ranking_loss, value_loss
from minippo.masking import masked_mean, masked_var, masked_whiten, response_mask
from minippo.rewards import penalize_missing_eos, per_token_rewards, standardize_scores

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conventions.md"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")
OURS = PPOConfig()

PEERS = [
    *("early TRL", "last TRL", "lm-human-preferences", "OpenRLHF", "verl", "trlX"),
    "DeepSpeed-Chat",
]
COLUMNS = [*PEERS, "minippo"]


def row(*peers, ours=()):
    """The numbers of a row of the table: one entry per peer, a number, several or None."""
    cells = [*peers, ours]
    lists = [[] if x is None else list(x) if isinstance(x, (tuple, list)) else [x] for x in cells]
    return dict(zip(COLUMNS, lists, strict=True))


N = None
# What the peers' code has by default, and ours from our settings; n - 1 counts as the number 1.
TABLE = {
    "Value after EOS": row(0, N, N, 0, N, N, N, ours=0),
    "Lambda": row(0.95, 0.95, 0.95, 1, 1, 0.95, 0.95, ours=OURS.lam),
    "Variance": row(1, 1, N, N, 1, 1, N, ours=1),
    "KL estimator in the reward": row(N, N, N, 10, 10, N, N),
    "Clip, policy and value": row(
        *[(0.2, 0.2)] * 3, *[(0.2, 0.5)] * 2, *[(0.2, 0.2)] * 2,
        ours=(OURS.clip_range, OURS.value_clip_range),
    ),
    "Weight of the value loss": row(0.1, 0.1, 0.1, N, N, 1, N, ours=OURS.vf_coef),
    "Temperature": row(N, 0.7, 0.7, 1, 1, N, N, ours=OURS.temperature),
    "Missing EOS": row(N, N, -1, N, N, N, N, ours=OURS.missing_eos_penalty),
    "Scale of the scores": row(N, N, (0, 1), 10, N, 10, 5, ours=(0, 1)),
    "Ranked answers": row(N, N, 4, N, N, N, N),
}  # fmt: skip


# --- reading the page -------------------------------------------------------------------------


def table_rows() -> dict[str, list[str]]:
    """{title of a row: its cells} of the table, without the head and the line below it."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["", *COLUMNS]
    return {title: cells for title, *cells in rows[2:]}


def sections() -> dict[str, str]:
    """{title: text} of every section about a row of the table."""
    text = PAGE.read_text(encoding="utf-8").partition("\n## What was read")[0]
    parts = re.split(r"^### (.+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))


def as_printed(value: float, printed: str) -> str:
    """A number with as many decimals as the page has; one without decimals must be whole."""
    decimals = len(printed.partition(".")[2])
    assert decimals or value == round(value), f"{value} is printed as {printed}"
    return f"{value:.{decimals}f}"


# --- what each difference does ----------------------------------------------------------------

CONSEQUENCES = {}


def consequence(title):
    """Registers the numbers of a section, in their order on the page: given and computed."""

    def register(function):
        CONSEQUENCES[title] = function
        return function

    return register


def row_of(*values) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def all_true(tensor):
    return torch.ones_like(tensor, dtype=torch.bool)


def our_advantages(rewards, values, mask=None, lam=OURS.lam) -> list[float]:
    rewards, values = row_of(*rewards), row_of(*values)
    mask = all_true(values) if mask is None else torch.tensor([mask])
    return gae(rewards, values, mask, 1.0, lam)[0][0].tolist()


def recursion(rewards, values, lam) -> list[float]:
    """The plain recursion of the peers over a row of floats, V = 0 after its end."""
    advantages, advantage = [], 0.0
    for t in reversed(range(len(rewards))):
        ahead = values[t + 1] if t + 1 < len(values) else 0.0
        advantage = rewards[t] + ahead - values[t] + lam * advantage
        advantages.insert(0, advantage)
    return advantages


@consequence("Mask")
def mask_where_pad_is_eos():
    eos = pad = 2
    answer = [5, 7, eos, pad, pad]
    ours = response_mask(torch.tensor([answer]), eos).sum().item()
    return [3, ours, sum(token != pad for token in answer)]


@consequence("Score position")
def score_on_the_last_token_or_one_later():
    score, lam, at_eos, at_pad = 1, OURS.lam, 0.5, 0.2
    mask = torch.tensor([[True, False]])
    rewards = per_token_rewards(row_of(score)[0], row_of(0, 0), mask, 1.0)[0].tolist()
    ours = our_advantages(rewards, [at_eos, at_pad], mask[0].tolist(), lam)[0]
    later = recursion([0, score], [at_eos, at_pad], lam)[0]
    return [score, lam, at_eos, at_pad, ours, later]


@consequence("Value after EOS")
def a_value_that_stands_after_the_end():
    values, score, lam, after = [0.4, 0.6], 1, OURS.lam, 0.8
    mask = [True, True, False]
    ours = our_advantages([0, score, 0], [*values, after], mask, lam)[1]
    kept = recursion([0, score, 0], [*values, after], lam)[1]
    with_lam_1 = recursion([0, score, 0], [*values, after], 1)[1]
    return [*values, score, lam, after, 0, ours, kept, with_lam_1, 1]


@consequence("Holes in the mask")
def a_hole_stepped_over_or_zeroed():
    value, score, lam = 0.5, 1, OURS.lam
    ours = our_advantages([0, 0, score], [value, 9.0, value], [True, False, True], lam)[0]
    zeroed = recursion([0, 0, score], [value, 0, value], lam)[0]
    return [value, score, lam, ours, zeroed, 0]


@consequence("Lambda")
def how_much_of_the_score_arrives():
    length, score, lam, other = 24, 1, TABLE["Lambda"]["minippo"][0], TABLE["Lambda"]["verl"][0]
    rewards, values = [0] * (length - 1) + [score], [0] * length
    ours = [our_advantages(rewards, values, lam=x)[0] for x in (lam, other)]
    return [length, 0, score, lam, ours[0], other, ours[1]]


@consequence("Whitening of advantages")
def over_the_rollout_or_each_minibatch():
    minibatches = [1, 3], [5, 7]
    rollout = row_of(*minibatches[0], *minibatches[1])
    ours = masked_whiten(rollout, all_true(rollout))[0, 2].item()
    mean, deviation = statistics.fmean(minibatches[1]), statistics.stdev(minibatches[1])
    return [1, 3, 5, 7, 5, ours, (5 - mean) / deviation]


@consequence("Variance")
def divided_by_n_or_by_one_less():
    advantages = row_of(1, 2, 3)
    ours = masked_whiten(advantages, all_true(advantages))[0, 2].item()
    other = (3 - 2) / statistics.pstdev([1, 2, 3])
    many = torch.randn(1, 1000, dtype=torch.float64)
    variances = [masked_var(many, all_true(many), unbiased).item() for unbiased in (True, False)]
    return [1, 2, 3, 1, ours, other, 1, 1000, math.sqrt(variances[0] / variances[1])]


@consequence("Reduction of the loss")
def tokens_of_the_minibatch_or_of_each_micro_batch():
    losses = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    ours = masked_mean(losses, mask).item()
    micro = [statistics.fmean(row[keep].tolist()) for row, keep in zip(losses, mask)]
    return [1, 1, 3, 0, ours, statistics.fmean(micro)]


@consequence("KL estimator in the reward")
def one_token_under_every_estimator():
    policy, reference, far = 0.5, 0.25, 15
    logprobs, ref_logprobs = row_of(policy).log(), row_of(reference).log()
    sampled = [KL_ESTIMATORS[x](logprobs, ref_logprobs).item() for x in ("kl", "abs", "mse", "k3")]
    clamp = TABLE["KL estimator in the reward"]["OpenRLHF"][0]
    return [policy, reference, *sampled, far, min(far, clamp), kl_k1(row_of(far), row_of(0)).item()]


@consequence("Direction of k3")
def k3_and_k3_turned_round():
    policy, reference = [0.9, 0.1], [0.5, 0.5]
    logprobs, ref_logprobs = row_of(*policy).log(), row_of(*reference).log()
    exact = kl_full(logprobs[None], ref_logprobs[None]).item()
    ours = (kl_k3(logprobs, ref_logprobs)[0] * torch.tensor(policy)).sum().item()
    turned = sum(p * (p / q - 1 - math.log(p / q)) for p, q in zip(policy, reference))
    return [*policy, *reference, exact, ours, turned]


@consequence("KL unit of the controller")
def per_sequence_or_per_token():
    tokens, per_token, target, batch_size, horizon = 24, 0.25, 6, 512, 10_000
    arguments = (target, horizon, batch_size)
    ours = adapt_kl_coef(1.0, tokens * per_token, *arguments)
    other = adapt_kl_coef(1.0, per_token, *arguments)
    given = [tokens, per_token, tokens * per_token, target]
    return [*given, ours, per_token, other, batch_size, horizon]


@consequence("Clip, policy and value")
def a_critic_that_moved_part_of_the_way():
    clips = [TABLE["Clip, policy and value"][peer][1] for peer in ("minippo", "verl")]
    start, now, target = 0, 0.4, 1
    numbers = [start, now, target]
    for clip_range in clips:
        values = row_of(now).requires_grad_()
        mask = all_true(values)
        loss, _ = value_loss(values, row_of(start), row_of(target), mask, clip_range)
        loss.backward()
        numbers += [clip_range, loss.item(), values.grad.item() + 0.0]
    return numbers


@consequence("Weight of the value loss")
def the_share_of_the_critic():
    weights = [TABLE["Weight of the value loss"][peer][0] for peer in ("last TRL", "minippo")]
    error = row_of(1)
    loss, _ = value_loss(error, row_of(0), row_of(0), all_true(error), math.inf)
    nothing = torch.zeros(())
    shares = [ppo_objective(nothing, loss, nothing, weight, 0.0).item() for weight in weights]
    return [1, loss.item(), shares[0], weights[0], shares[1], weights[1]]


@consequence("Approximate KL of an update")
def three_estimates_of_one_step():
    step, tokens, pads = 0.1, 2, 2
    old = torch.zeros(1, tokens + pads, dtype=torch.float64)
    mask = torch.tensor([[True] * tokens + [False] * pads])
    new = old.masked_fill(mask, step)
    ours = policy_loss(new, old, old, mask, 0.2)[1]["approx_kl"].item()
    k2 = masked_mean(kl_k2(new, old), mask).item()
    with_pads = statistics.fmean([0.5 * step**2] * tokens + [0.0] * pads)
    return [step, ours, k2, with_pads, masked_mean(old - new, mask).item()]


@consequence("Temperature")
def divided_or_not():
    logits, temperature = [2, 0], TABLE["Temperature"]["last TRL"][0]
    token = torch.zeros(1, 1, dtype=torch.int64)
    ours = gather_logprobs(row_of(*logits)[None], token, temperature).item()
    undivided = logits[0] - math.log(sum(map(math.exp, logits)))
    return [*logits, temperature, ours, undivided, math.exp(undivided - ours)]


@consequence("Missing EOS")
def subtracted_or_replaced():
    score, penalty = -3, OURS.missing_eos_penalty
    replaced = TABLE["Missing EOS"]["lm-human-preferences"][0]
    response = torch.tensor([[5, 6]])
    ours = penalize_missing_eos(row_of(score)[0], all_true(response), response, 2, penalty).item()
    return [score, penalty, ours, replaced, replaced, replaced - score]


@consequence("Scale of the scores")
def standardised_or_clipped():
    scores, mean, deviation, limit = (
        [12, 6],
        8,
        2,
        TABLE["Scale of the scores"]["DeepSpeed-Chat"][0],
    )
    ours = standardize_scores(torch.tensor(scores), mean, deviation).tolist()
    clipped = {min(max(score, -limit), limit) for score in scores}
    assert len(clipped) == 1
    return [*scores, mean, deviation, *ours, limit, *clipped]


@consequence("Ranked answers")
def pairs_or_best_of_k():
    count = TABLE["Ranked answers"]["lm-human-preferences"][0]
    scores = torch.zeros(1, count)
    losses = [ranking_loss(torch.zeros(1, k)).item() for k in (2, 3, count, 9)]
    assert max(losses) - min(losses) < 1e-6  # whatever K
    best_of = torch.nn.functional.cross_entropy(scores, torch.tensor([0])).item()
    return [count, losses[2], 2, count, best_of, count, count - 1]


# --- the tests --------------------------------------------------------------------------------


def test_every_row_has_a_section_and_every_section_a_computation():
    assert list(table_rows()) == list(dict.fromkeys(table_rows()))
    assert set(table_rows()) == set(sections()) == set(CONSEQUENCES)
    assert set(TABLE) <= set(table_rows())


def test_the_numbers_in_the_table_are_the_defaults_used_below_it():
    for title, cells in table_rows().items():
        for column, cell in zip(COLUMNS, cells, strict=True):
            assert cell, f"{title}, {column}: empty"
            expected = TABLE.get(title, {}).get(column, [])
            printed = NUMBER.findall(cell)
            assert [float(x) for x in printed] == expected, f"{title}, {column}: {cell}"


@pytest.mark.parametrize("title", list(CONSEQUENCES))
def test_every_number_of_a_section_is_what_comes_out(title):
    text = sections()[title]
    printed = NUMBER.findall(text)
    computed = CONSEQUENCES[title]()
    assert len(printed) == len(computed), f"{printed} are not {computed}"
    assert printed == [as_printed(*pair) for pair in zip(computed, printed)], computed


def test_a_section_has_at_most_five_lines_and_no_number_is_left_elsewhere():
    text = PAGE.read_text(encoding="utf-8")
    assert all(len(section.splitlines()) <= 5 for section in sections().values())
    assert not NUMBER.findall(text.partition("\n|")[0])


def test_a_changed_number_is_noticed():
    assert as_printed(0.4751, "0.475") == "0.475" and as_printed(0.4749, "0.474") == "0.475"
    with pytest.raises(AssertionError, match="2.4 is printed as 2"):
        as_printed(2.4, "2")
