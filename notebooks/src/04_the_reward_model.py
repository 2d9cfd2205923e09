# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · The reward model: a score from comparisons
#
# **Promise.** You write the two losses of a reward model. In a world with a known truth you see
# what comparisons can teach and what they cannot; on the tiny GPT-2 you see what keeping all pairs
# of a prompt in one batch buys, and when to stop. Then you examine the shipped reward model as one
# should before trusting it: is it calibrated, does it like length, what does it get wrong.
# **Needs.** Notebooks 02 (pairs and rankings) and 03 (tokens, padding, masks). **Time.** 50
# minutes, of which the computer needs less than one. Two exercises.
#
# ## The question
#
# Ask ten people to grade an answer from 0 to 10 and you get ten scales. Ask them which of two
# answers is better, and most agree. So what is collected is comparisons. But PPO needs a number for
# one answer. **How do comparisons become a number, and what does that number mean?**

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import math
import random

import matplotlib.pyplot as plt
import torch

# %% [markdown]
# ## The formula
#
# The model of Bradley and Terry (1952): every answer has a **score** $s$, and the probability that
# answer $w$ is preferred to answer $l$ depends on the difference alone, the **gap**:
#
# $$P(y_w \succ y_l) = \sigma(s_w - s_l), \qquad \sigma(d) = \frac{1}{1 + e^{-d}}$$
#
# A gap of 0 means 50%, a gap of $\log 3 = 1.1$ means 75%. A **reward model** $s_\phi(x, y)$
# computes the score from a prompt $x$ and an answer $y$, and is trained so that the preferences
# that were observed become likely. With $K$ answers to a prompt, ranked best first, there are
# $\binom K2 = K(K-1)/2$ pairs:
#
# $$L_{pair} = -\log \sigma(s_w - s_l - \mu)
# \qquad
# L_{ranking} = -\frac{1}{\binom K2} \sum_{i < j} \log \sigma(s_i - s_j)$$
#
# | symbol | variable | shape | function |
# |---|---|---|---|
# | $s_w$, $s_l$ | `chosen_scores`, `rejected_scores` | `(B,)` | `RewardModel.forward` |
# | $\mu$, the margin: how much better | `margin` | `(B,)` or None | `RewardConfig.margin` |
# | $L_{pair}$, mean over the batch | `loss` | `()` | `preference_loss` |
# | $s_1 \ldots s_K$, best first | `scores` | `(B, K)` | `score_responses` |
# | $L_{ranking}$, mean over the prompts | `loss` | `()` | `ranking_loss` |
#
# The note prints $L = -\frac{1}{\binom K2} E[\log \sigma(\ldots)]$. An
# expectation over pairs is a mean already: divided by the number of pairs once more it is
# $\binom K2$ times too small. The factor belongs once, to the sum over the pairs of a prompt.
#
# ## By hand
#
# Two prompts with three ranked answers each, best first. All scores are multiples of
# $\ell = \log 3$, so that every $\sigma$ is a fraction: $\sigma(\ell) = \tfrac34$,
# $\sigma(2\ell) = \tfrac9{10}$, $\sigma(0) = \tfrac12$, $\sigma(-\ell) = \tfrac14$.
#
# ```text
# scores, best first     gap 1-2   1-3   2-3      probability of the observed order
#  2l   l   0               l      2l     l        3/4   9/10   3/4
#   0   l   0              -l       0     l        1/4   1/2    3/4
# ```
#
# The first row has its answers in the right order, the second puts the middle one on top. Minus the
# logarithms: $0.288$, $0.105$, $0.288$ and $1.386$, $0.693$, $0.288$. Means: $0.227$ and $0.789$.

# %%
L = math.log(3)
paper_scores = torch.tensor([[2 * L, L, 0.0], [0.0, L, 0.0]])
on_paper = torch.tensor([[3 / 4, 9 / 10, 3 / 4], [1 / 4, 1 / 2, 3 / 4]])
print(-on_paper.log())
print("rows:", -on_paper.log().mean(1), "both:", -on_paper.log().mean())

# %% [markdown]
# ## Exercise 1: `preference_loss`
#
# Difficulty 1 of 5 · importance 5 of 5 · 5 to 10 minutes
#
# $L_{pair}$, mean over the batch. The **margin** asks for a gap of at least that size: where
# annotators said "much better" and not just "better", the loss is not satisfied with a small gap.
# No margin is a margin of 0. For a gap of -200 (a pair that the model gets badly wrong) the loss is
# 200, not infinite.
#
# <details><summary>Hint 1: a nudge</summary>
#
# The margin makes the loss larger: the chosen answer has to be ahead by more. So it goes the same
# way as the rejected score.
#
# </details>
# <details><summary>Hint 2: the large wrong gap</summary>
#
# `sigmoid(-200)` is 0 in float32, and its logarithm `-inf` (in float64 that happens at 750).
# `torch.nn.functional` has one function for the logarithm of a sigmoid.
#
# </details>
# <details><summary>Hint 3: nearly the line</summary>
#
# `F.logsigmoid(gap)` with the margin taken off the gap; the mean; a minus in front.
#
# </details>

# %%
from torch.nn import functional as F


def preference_loss(chosen_scores, rejected_scores, margin=None):
    """chosen_scores, rejected_scores: (B,); margin: (B,) or None -> ()."""
    ### BEGIN SOLUTION
    gap = chosen_scores - rejected_scores
    gap = gap if margin is None else gap - margin
    return -F.logsigmoid(gap).mean()
    ### END SOLUTION


# %%
from minippo.checks import check_preference_loss

preference_loss = check_preference_loss(preference_loss)

# %% [markdown]
# What does the loss ask for? Its slope says how hard it pulls: a gap of 0 is pulled with
# $\tfrac12$, a wrong gap with up to 1, a large right gap hardly at all. A margin moves the curve.

# %%
gaps = torch.linspace(-4, 6, 101, requires_grad=True)
nothing = torch.zeros(1)


def loss_curve(margin):
    """The loss at each gap, and its slope."""
    losses = torch.stack([preference_loss(gap[None], nothing, nothing + margin) for gap in gaps])
    return losses.detach(), torch.autograd.grad(losses.sum(), gaps)[0]


# %%
curves, slopes = zip(*(loss_curve(margin) for margin in (0.0, 2.0)))
for gap in (-4, 0, 2, 6):
    at = int((gap + 4) * 10)
    row = [f"{curves[m][at]:.3f} (slope {slopes[m][at]:+.3f})" for m in (0, 1)]
    print(f"gap {gap:+d}: no margin {row[0]}, margin 2 {row[1]}")

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(10.8, 2.8), layout="constrained")
for axis, drawn, name in zip(axes, (curves, slopes), ("loss", "slope of the loss")):
    for margin, values in zip((0, 2), drawn):
        axis.plot(gaps.detach(), values, label=f"margin {margin}")
    axis.set(xlabel="gap: chosen minus rejected score", ylabel=name)
    axis.grid()
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Exercise 2: `ranking_loss`
#
# Difficulty 2 of 5 · importance 4 of 5 · 10 minutes
#
# $L_{ranking}$: scores `(B, K)`, best first, all pairs, mean over pairs and prompts. The pairs are
# *differences of K numbers*; nothing has to be computed twice.
#
# <details><summary>Hint 1: a nudge</summary>
#
# You need two lists of places, `better` and `worse`, with better < worse. Then
# `scores[:, better] - scores[:, worse]` is `(B, K(K-1)/2)`.
#
# </details>
# <details><summary>Hint 2: the tool</summary>
#
# `torch.triu_indices(K, K, offset=1)` gives the places above the diagonal of a K x K square: a
# tensor with two rows.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `better, worse = torch.triu_indices(count, count, offset=1)`, then minus the mean of `logsigmoid`
# of the differences. Without `offset=1` each answer would be compared with itself.
#
# </details>


# %%
def ranking_loss(scores):
    """scores: (B, K), ordered best first -> ()."""
    ### BEGIN SOLUTION
    count = scores.shape[1]
    better, worse = torch.triu_indices(count, count, offset=1)
    return -F.logsigmoid(scores[:, better] - scores[:, worse]).mean()
    ### END SOLUTION


# %%
from minippo.checks import check_ranking_loss

ranking_loss = check_ranking_loss(ranking_loss)

# %%
print("rows:", ranking_loss(paper_scores[:1]), ranking_loss(paper_scores[1:]))
print("both:", ranking_loss(paper_scores))
assert torch.allclose(ranking_loss(paper_scores), -on_paper.log().mean())

# %% [markdown]
# ## Is this right? A world where the truth is known
#
# The world of `minippo.worlds.oracle` has 85 possible answers, each with a true score. Suppose
# annotators who follow Bradley and Terry exactly: answer $i$ is preferred to $j$ with probability
# $\sigma((r_i - r_j) / \tau)$, with the true scores $r$; $\tau$ says how noisy they are. Take *all*
# pairs with these probabilities, so that nothing depends on luck, give every answer a free number
# $s$, and minimise your loss. What comes out?

# %%
from minippo.worlds.oracle import feelings_world

world, _ = feelings_world()
true_scores = world.scores
first, second = (~torch.eye(len(true_scores)).bool()).nonzero().T  # every ordered pair
print(len(true_scores), "answers,", len(first), "ordered pairs")
said = [" ".join(world.text(response)) for response in world.responses]
for words in ("very good .", "good .", "not bad .", "bad ."):
    print(f"{float(true_scores[said.index(words)]):+5.1f}  {words}")


# %%
def fit(temperature=1.0, margin=None, head=lambda s: s, start=0.0):
    """Free scores that minimise the expected loss: the scores (85,), and that loss."""
    share = ((true_scores[first] - true_scores[second]) / temperature).sigmoid()
    free = torch.full_like(true_scores, start).requires_grad_()
    settings = {"max_iter": 400, "tolerance_grad": 1e-10, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([free], tolerance_change=1e-14, **settings)

    def expected_loss():
        optimizer.zero_grad()
        pair = head(free)[first][:, None], head(free)[second][:, None]
        each = torch.vmap(preference_loss)(*pair, *([] if margin is None else [margin[:, None]]))
        loss = (share * each).sum() / share.sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    return head(free).detach(), float(expected_loss().detach())


# %% [markdown]
# `torch.vmap` calls your loss once for every pair, and each pair is weighted by how often it is
# observed. Two fits that start from different places:

# %%
scores, loss = fit()
moved_scores, moved_loss = fit(start=5.0)
print(f"loss {loss:.4f} from 0, {moved_loss:.4f} from 5")
for name, learned in (("from 0", scores), ("from 5", moved_scores)):
    off = learned - true_scores
    print(f"{name}: learned - true is between {float(off.min()):.3f} and {float(off.max()):.3f}")
print(f"mean of the true scores {float(true_scores.mean()):.3f}")
assert (scores - true_scores).std() < 1e-4 and abs(loss - moved_loss) < 1e-9

# %% [markdown]
# The loss recovers the truth *up to a constant*, and any constant will do. (The mean of the scores
# stays where it started, and the mean of the true ones is −2.506.) Adding 5 to all scores of a
# prompt changes no gap, so no preference and no loss, and each prompt may have a constant of its
# own. So a sentence such as "R(x, y) = 0.9" says nothing by itself. What does mean something is a
# difference, and before PPO scores are **standardised**: less the mean of the scores of reference
# samples, divided by their standard deviation.
#
# The scale is not free, but it is the annotators', not the world's. And a margin changes it:

# %%
gap_margin = true_scores[first] - true_scores[second]  # negative where they chose the worse
fits = {
    "annotators with noise 1": fit(),
    "annotators with noise 0.5": fit(temperature=0.5),
    "noise 1, true gap as margin": fit(margin=gap_margin),
}
centred = true_scores - true_scores.mean()
stretch = {}
for name, (learned, _) in fits.items():
    stretch[name] = float(((learned - learned.mean()) * centred).sum() / centred.square().sum())
    left_over = (learned - learned.mean() - stretch[name] * centred).abs().max()
    print(f"{name:28s} scores = {stretch[name]:.3f} x true + constant, +- {float(left_over):.4f}")

# %% [markdown]
# Decided annotators look like large differences. The true gap as margin doubles the scale: the pair
# is satisfied only when the gap exceeds it. The order of the answers is the same in all three.
#
# ## Break it: a head that cannot say it
#
# "The last layer without softmax", says the note: what is meant is that the projection onto `V`
# tokens is replaced by a **head** of width 1. Some projects put a sigmoid behind it, so that scores
# lie between 0 and 1. No gap can then exceed 1, so no preference can exceed $\sigma(1) = 73\%$:

# %%
squeezed, squeezed_loss = fit(head=torch.sigmoid)
widest = float(squeezed.max() - squeezed.min())
print(f"expected loss {squeezed_loss:.3f} with a sigmoid behind the head, {loss:.3f} without")
print(f"widest gap {widest:.3f}, so never surer than {1 / (1 + math.exp(-widest)):.1%}")
print(f"a pair that everybody agrees on still costs {-math.log(1 / (1 + math.exp(-1))):.3f}")
assert squeezed_loss > loss + 0.1 and widest <= 1

# %% [markdown]
# ## A real reward model
#
# Take the SFT model of notebook 03, drop the projection onto the vocabulary, put a head of width 1
# in its place. It gives a number at *every* position; the score is the one at the last token that
# counts, EOS if the answer ended. Only there has the model read the whole answer, and only there
# is it trained.

# %%
from minippo import (
    Policy,
    RewardModel,
    encode_prompt,
    encode_response,
    frozen_copy,
    join_query_response,
    load_tokenizer,
)

tokenizer, policy = load_tokenizer("sft"), Policy.from_pretrained("sft")
pad_id = tokenizer.pad_token_id
fresh = RewardModel.from_policy(policy, seed=0)
print("the policy's projection", tuple(policy.lm_head.weight.shape))
print("the reward model's head", tuple(fresh.classifier.score.weight.shape))

# %%
shipped = frozen_copy(RewardModel.from_pretrained("reward"))  # without gradients, as in PPO
prompt = encode_prompt(tokenizer, "How do I grow sweet tomatoes?")
texts = ["You can water the tomato plants every morning.", "Figure it out yourself."]
responses = [encode_response(tokenizer, text) for text in texts]
tokens, attention_mask, mask = join_query_response([prompt] * 2, responses, pad_id)
everywhere = shipped.read(shipped.hidden(tokens, attention_mask))
print("numbers at every position", tuple(everywhere.shape))
print("scores", shipped(tokens, attention_mask))
for token, number in list(zip(tokens[1].tolist(), everywhere[1].tolist()))[len(prompt) - 1 :]:
    print(f"{tokenizer.decode([token])!r:16s} {number:+.2f}")

# %% [markdown]
# The note writes the reward of token $t$ as $r_\phi(q, o_{\le t})$, a score at every token. The
# numbers before the end do exist, as you see, but nobody has trained them: a rude answer is not
# worth more in its middle. PPO gets the score once, at the last token that counts; what it gets at
# every token is the KL penalty.
#
# ## Break it: read the last column
#
# A shorter answer in a batch has padding behind it. Whoever reads `[:, -1]` reads the number at the
# padding. Then the score depends on the company that the answer is in:

# %%
end = int(attention_mask[1].sum())
alone = tokens[1:, :end], attention_mask[1:, :end]
readings = {
    "the tip": (shipped(tokens, attention_mask)[0], everywhere[0, -1]),
    "the rude one, alone": (shipped(*alone)[0], shipped.read(shipped.hidden(*alone))[0, -1]),
    "the rude one, in this batch": (shipped(tokens, attention_mask)[1], everywhere[1, -1]),
}
print(f"{'':28s} last that counts  last column")
for name, (score, last_column) in readings.items():
    print(f"{name:28s} {score:+16.2f}  {last_column:+11.2f}")
assert everywhere[1, -1] > everywhere[0, -1] and readings["the tip"][0] > -3 > readings[name][0]

# %% [markdown]
# In this batch the last column prefers the rude answer. Nothing crashed.
#
# ## All pairs of a prompt, from K readings
#
# The note speaks of $K(K-1)/2$ inputs. There are $K(K-1)/2$ *pairs*, but only $K$ answers to read:

# %%
print(" K  pairs  answers read, pair by pair  answers read once")
for K in (2, 4, 8, 9):
    pairs = K * (K - 1) // 2
    print(f"{K:2d}  {pairs:5d}  {2 * pairs:26d}  {K:17d}")

# %% [markdown]
# Four answers of the SFT model to each prompt, ranked by the annotator of TinyHH. It sees a
# **gold** score (notebook 00) and is noisy: `rank` sorts by score / 0.5 plus Gumbel noise, another
# way to draw the Plackett-Luce rankings of notebook 02, so every pair is Bradley-Terry with
# $\tau = 0.5$. 40 prompts of one turn to learn from, 48 held out. That is little, on purpose:
# overfitting should show within seconds.

# %%
from minippo import Encoded, decode_response, sample_answers
from minippo.worlds.tinyhh.annotator import TEMPERATURE, judge, rank
from minippo.worlds.tinyhh.rows import prompt_rows


def sample(rows, seed):
    """Four answers to each row: Encoded rows, texts, judgements."""
    prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
    sampled = sample_answers(policy, prompts, tokenizer, 48, seed, 4)
    texts = [[decode_response(tokenizer, ids) for ids in one.responses] for one in sampled]
    judged = [
        [judge(row["instruction"], text, row["history"]) for text in four]
        for row, four in zip(rows, texts)
    ]
    return sampled, texts, judged


# %%
rows = [row for row in prompt_rows("preference", 400) if not row["history"]][:88]
sampled, texts, judged = sample(rows, seed=7)
for text, judgement in zip(texts[0], judged[0]):
    print(f"{judgement.score:+.2f}  {text}")

# %%
rng = random.Random(0)
ranked, gold_ranked = [], []
for one, judgements in zip(sampled, judged):
    gold = [judgement.score for judgement in judgements]
    order = rank(gold, rng)
    ranked.append(Encoded(one.row, one.prompt, [one.responses[i] for i in order]))
    gold_ranked.append([gold[i] for i in order])
train_rows, held_out = ranked[:40], ranked[40:]
perfect = torch.tensor(gold_ranked[40:]) / TEMPERATURE
print(len(train_rows), "rankings to learn from,", len(held_out), "held out")
print("gold scores in the order of one ranking:", gold_ranked[0])
print(f"a model that knows the gold score: held-out loss {ranking_loss(perfect):.3f}")

# %% [markdown]
# Even that model has a loss: annotators disagree with themselves. First, that reading the answers
# once gives the very same loss and gradient as reading every pair:

# %%
from minippo import score_all, score_responses


def as_pairs(row):
    places = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    return [Encoded(row.row, row.prompt, [row.responses[i], row.responses[j]]) for i, j in places]


# %%
parameters = list(fresh.parameters())
once = ranking_loss(score_responses(fresh, train_rows[:1], pad_id))
by_pairs = [score_responses(fresh, [pair], pad_id)[0] for pair in as_pairs(train_rows[0])]
chosen, rejected = torch.stack(by_pairs).T
twice = preference_loss(chosen, rejected)
gradients = [torch.autograd.grad(loss, parameters) for loss in (once, twice)]
furthest = max(float((a - b).abs().max()) for a, b in zip(*gradients))
print(f"loss {float(once.detach()):.4f} from 4 readings, {float(twice.detach()):.4f} from 12")
print("gradients equal to 1e-4:", furthest < 1e-4)
assert abs(once - twice) < 1e-5 and furthest < 1e-4

# %% [markdown]
# ## In one batch, or shuffled
#
# The note demands all pairs of a prompt in one batch, because a reward model overfits, often
# within one **epoch** (one pass through the data). Three ways through the same rankings:
#
# | way | a step takes |
# |---|---|
# | together | 4 prompts, all 6 pairs of each |
# | shuffled, small steps | 4 pairs of any prompts |
# | shuffled, large steps | 24 pairs of any prompts |

# %%
from minippo import adamw, chunks, optimizer_step

all_pairs = [pair for row in train_rows for pair in as_pairs(row)]
ways = {
    "together": (train_rows, 4),
    "shuffled, small steps": (all_pairs, 4),
    "shuffled, large steps": (all_pairs, 24),
}
for name, (units, per_step) in ways.items():
    steps, answers = len(chunks(units, per_step)), sum(len(unit.responses) for unit in units)
    print(f"{name:22s} {steps:3d} steps an epoch, which read {answers} answers")

# %% [markdown]
# Shuffled, an answer is read $K - 1 = 3$ times in an epoch, mostly in different steps. Each way
# trains a fresh reward model for three epochs. Watch the loss on the rankings that are held out.
#
# > **Predict.** When is each of the three at its best, and which is the worst after three epochs?
#
# <details><summary>Answer</summary>
#
# All are at their best after about one epoch or before. The small shuffled steps end worst.
#
# </details>


# %%
def held_out_loss(reward_model):
    return float(ranking_loss(torch.tensor(score_all(reward_model, held_out, pad_id))))


def train(units, per_step, epochs=3, seed=0):
    """The training loss of each epoch; the held-out loss at its start, middle and end."""
    reward_model = RewardModel.from_policy(policy, seed, pad_id)
    optimizer = adamw({"reward": reward_model}, {"reward": 1e-3})
    rng, in_training, outside = random.Random(seed), [], [held_out_loss(reward_model)]
    for _ in range(epochs):
        losses, batches = [], chunks(rng.sample(units, len(units)), per_step)
        for step, batch in enumerate(batches, start=1):
            loss = ranking_loss(score_responses(reward_model, batch, pad_id))
            loss.backward()
            optimizer_step(optimizer, max_grad_norm=1.0)
            losses.append(float(loss.detach()))
            if step in (len(batches) // 2, len(batches)):
                outside.append(held_out_loss(reward_model))
        in_training.append(sum(losses) / len(losses))
    return in_training, outside


# %% tags=["nbval-ignore-output"]
curves = {name: train(*way) for name, way in ways.items()}
print("training loss of epoch     1    2    3")
for name, (in_training, _) in curves.items():
    print(f"{name:22s}", *(f"{loss:.2f}" for loss in in_training))
print("held out, after epoch      0  0.5    1  1.5    2  2.5    3")
for name, (_, outside) in curves.items():
    print(f"{name:22s}", *(f"{loss:.2f}" for loss in outside))

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(10.8, 3), layout="constrained")
for name, (in_training, outside) in curves.items():
    axes[0].plot([1, 2, 3], in_training, marker="o", label=name)
    axes[1].plot([half / 2 for half in range(7)], outside, marker="o", label=name)
axes[1].axhline(float(ranking_loss(perfect)), color="0.5", linestyle=":", label="gold score")
axes[1].axhline(math.log(2), color="0.5", linestyle="--", label="equal scores, log 2")
for axis, name in zip(axes, ("training", "held out")):
    axis.set(xlabel="epoch", ylabel="loss, nats per pair", title=name, xticks=range(4))
    axis.grid()
axes[1].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The line to beat is $\log 2$, the loss of equal scores for all; a fresh head begins above it. The
# training loss of all three falls and falls. On new rankings they are at their best after half an
# epoch or one, get *worse* from then on, and after two epochs none of them is below the line. So
# "train until convergence", as chapter 4 of the note says, is the wrong advice, and "one epoch, or
# stop when held-out pairs stop improving" the right one.
#
# And the batch? At their best all three are about equal (0.60 to 0.61). But small shuffled steps
# are far above the line half an epoch later, and end worst by far: they are six times as many steps
# of the same learning rate, on noisier gradients. With as many pairs in a step, shuffled and
# together end not far apart. (One seed, and one learning rate for all.) So the company of the same
# prompt is not what protects. What it saves is certain: keeping a prompt together takes a third of
# the reading, and a seventh for K = 8.

# %%
outside = {name: torch.tensor(held) for name, (_, held) in curves.items()}
together, small, large = outside.values()
for name, held in outside.items():
    overfits = held.argmin() <= 4 and held[-1] > held.min() + 0.1
    print(f"{name:22s} best within two epochs, then worse by 0.1 or more: {bool(overfits)}")
    assert overfits and curves[name][0][2] < 0.4 < curves[name][0][0]
coin = math.log(2)
reached = bool(together.min() < coin > large.min())
late = all(held[4] > coin for held in outside.values())
worst = bool(small[-1] > large[-1] + 0.2 and small[-1] > together[-1] + 0.2)
print("together and in large steps it gets below log 2:", reached)
print("after two epochs all three are above it:", late)
print("small steps end worst:", worst)
assert reached and late and worst and abs(large.min() - together.min()) < 0.1

# %% [markdown]
# ## Is the shipped reward model calibrated?
#
# Now the model that PPO uses, trained on many more rankings; `RewardConfig` holds the settings. 96
# new questions, four answers each. The model says $\sigma(s_i - s_j)$ for every pair. The
# annotator's true probability is known: $\sigma((g_i - g_j) / 0.5)$ with the gold scores $g$. A
# model is **calibrated** if among the pairs where it says 80%, the preferred answer really is
# preferred by 80% of the annotators.

# %%
from minippo import RewardConfig

config = RewardConfig()
print(f"trained on {config.prompts:,} prompts with {config.candidates} answers each", end=", ")
print(f"{config.epochs} epochs")
rows = prompt_rows("validation", 96)
sampled, texts, judged = sample(rows, seed=3)
scores = torch.tensor(score_all(shipped, sampled, pad_id))
gold = torch.tensor([[judgement.score for judgement in four] for four in judged])


def within_prompts(x, y):
    """Correlation of two (B, K) tensors, the mean of each prompt taken off."""
    pair = torch.stack([(z - z.mean(1, keepdim=True)).flatten() for z in (x, y)])
    return float(torch.corrcoef(pair)[0, 1])


print(f"scores {tuple(scores.shape)}, gold {tuple(gold.shape)}", end=", ")
print(f"correlation within prompts {within_prompts(scores, gold):.2f}")

# %%
i, j = torch.triu_indices(4, 4, offset=1)
differ = torch.tensor([[four[a] != four[b] for a, b in zip(i, j)] for four in texts])
score_gap = (scores[:, i] - scores[:, j])[differ]
gold_gap = (gold[:, i] - gold[:, j])[differ]
clear = gold_gap != 0
agreement = float((score_gap.sign() == gold_gap.sign())[clear].double().mean())
print(f"{len(score_gap)} pairs of different answers, {int(clear.sum())} with different gold scores")
print(f"order of the noiseless annotator met in {agreement:.1%} of these")


# %%
def calibration(scale=1.0, bins=5):
    """Rows of (predicted, observed, pairs), the answer with the higher score taken as preferred."""
    predicted = (scale * score_gap.abs()).sigmoid()
    observed = (gold_gap * score_gap.sign() / TEMPERATURE).sigmoid()
    places = ((predicted - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    chosen = [places == b for b in range(bins) if bool((places == b).any())]
    return [(float(predicted[c].mean()), float(observed[c].mean()), int(c.sum())) for c in chosen]


def calibration_error(table):
    return sum(abs(said - seen) * count for said, seen, count in table) / len(score_gap)


# %%
tables = {scale: calibration(scale) for scale in (1.0, 3.0)}
for said, seen, count in tables[1.0]:
    print(f"says {said:.2f}, is {seen:.2f}, {count:3d} pairs")
print("times 3, says/is:", " ".join(f"{said:.2f}/{seen:.2f}" for said, seen, _ in tables[3.0]))

# %% tags=["nbval-ignore-output"]
figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
axis.plot([0.5, 1], [0.5, 1], color="0.6", linestyle=":", label="perfect")
for (scale, table), marker in zip(tables.items(), "os"):
    said, seen, counts = zip(*table)
    axis.plot(said, seen, marker=marker, label=f"scores times {scale:.0f}")
    for x, y, count in table if scale == 1 else ():
        axis.annotate(f"n={count}", (x, y), (x + 0.01, y - 0.03), fontsize=8)
axis.set(xlabel="what the reward model says", ylabel="share of annotators who agree")
axis.legend(frameon=False)
axis.grid()
plt.show()

# %%
errors = {scale: calibration_error(table) for scale, table in tables.items()}
print(f"mean distance from the diagonal: {errors[1.0]:.3f}, with scores times 3: {errors[3.0]:.3f}")
unsure = [(said - seen, count) for said, seen, count in tables[1.0] if said < 0.9]
too_sure = sum(gap * count for gap, count in unsure) / sum(count for _, count in unsure)
print(f"on the {sum(count for _, count in unsure)} pairs below 90% it says {too_sure:.3f} too much")
same_order = float(((3 * score_gap).sign() == gold_gap.sign())[clear].double().mean())
print(f"pairs in order: {agreement:.1%}, with scores times 3: {same_order:.1%}")
assert errors[1.0] < 0.05 < errors[3.0] and agreement == same_order > 0.85

# %% [markdown]
# So the model is nearly calibrated, mostly because most pairs are easy; on the others it is a
# little too sure. The share of pairs in the right order is what reward models are usually reported
# by. (Do not compare these 92% with the ceiling of notebook 02: that is for noisy labels, and
# counts pairs of equal gold scores too.) It cannot see the scale: times three, the model is as
# "accurate" and far too sure.
#
# ## Does it like length?
#
# A reward model that pays for length makes PPO write long answers. The usual probe is a
# correlation:

# %%
lengths = torch.tensor([[float(len(ids)) for ids in one.responses] for one in sampled])
length_gap = (lengths[:, i] - lengths[:, j])[differ]
level = ~clear & (length_gap != 0) & (score_gap != 0)
longer_wins = float((score_gap.sign() == length_gap.sign())[level].double().mean())
print(f"correlation of length with score {within_prompts(lengths, scores):.2f}")
print(f"correlation of length with gold  {within_prompts(lengths, gold):.2f}")
print(f"gold equal: the longer one scores higher in {longer_wins:.0%} of {int(level.sum())}")

# %% [markdown]
# Length and score go together, but so do length and quality: an answer with two tips is longer than
# "It depends." Where the gold scores are equal, the longer one wins as often as not: no sign of a
# bias (a small one could not be seen in so few pairs).
#
# But these are answers that the SFT model wrote. PPO will look everywhere for a higher score. So
# change one thing by hand, further than anybody has written it, and look what happens:

# %%
question = "How do I grow sweet tomatoes?"
tip = "You can water the tomato plants every morning."
kinds = {"the tip again": tip, "a polite phrase": "I hope that helps."}


def probe(text):
    """Standardised score and gold score of an answer to the question."""
    row = Encoded(0, prompt, [encode_response(tokenizer, text)])
    score = (score_all(shipped, [row], pad_id)[0][0] - shipped.mean) / shipped.std
    return score, judge(question, text).score


# %%
probes = {}
for kind, more in kinds.items():
    probes[kind] = [probe(" ".join([tip] + [more] * count)) for count in range(4)]
    print(f"{kind + ', 0 to 3 times':31s}", end="")
    print("  score", *(f"{score:+.2f}" for score, _ in probes[kind]), end="")
    print("  gold", *(f"{gold_score:.2f}" for _, gold_score in probes[kind]))

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for axis, name, place in zip(axes, ("reward model, standardised", "gold score"), (0, 1)):
    for kind, values in probes.items():
        axis.plot([value[place] for value in values], marker="o", label=kind)
    axis.set(xlabel="times added to one tip", ylabel=name, xticks=range(4))
    axis.grid()
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# There it is. The annotator takes points off for saying the same thing twice; the reward model pays
# for it. The crowd, whose answers its data imitate, never gives a tip twice, and more tips meant a
# better answer. The polite phrase is milder: the score does not follow the gold there. The first
# one costs score where the gold stays, the third gains score where the gold falls, and in the end
# 1.5 points of gold have cost next to nothing of the score. The correlation could show none of
# this: on texts that the data do not contain, it says nothing. PPO can find such texts, and the KL
# penalty of notebook 05 is what keeps it near those on which the reward model knows its business.

# %%
again, phrase = (values for values in probes.values())
print("the tip four times instead of once: score up, gold down")
assert again[3][0] > again[0][0] + 0.4 and again[3][1] < again[0][1] - 1
print("the polite phrase three times: score the same within 0.3, gold down")
assert abs(phrase[3][0] - phrase[0][0]) < 0.3 and phrase[3][1] < phrase[0][1] - 1
assert within_prompts(lengths, gold) > 0.2 and 0.3 < longer_wins < 0.7

# %% [markdown]
# ## What does it get wrong? Read.
#
# Numbers say how often, reading says what. For each answer: how far its score is above (or below)
# what its gold score deserves, both as deviations from the mean of the prompt, in standard
# deviations. The six most overrated and the three most underrated answers:

# %%
over = (scores - scores.mean(1, keepdim=True)) / shipped.std
over = over - (gold - gold.mean(1, keepdim=True)) / gold.std()
order = over.flatten().argsort(descending=True).tolist()
for place in order[:6] + order[-3:]:
    row, column = divmod(place, 4)
    print(f"{float(over[row, column]):+.2f}  gold {float(gold[row, column]):+.1f}", end="  ")
    print("Q:", rows[row]["instruction"])
    print("   A:", " ".join(texts[row][column].split())[:150])
    print("   ", judged[row][column].sentence)

# %% [markdown]
# Read the overrated ones aloud. Some are *almost* right: a word said twice, two sentences grown
# together, a tip of another topic. They have the words that good answers have. One guess: the model
# has learned which words go together, and the annotator reads sentences. What it has against the
# underrated ones is hard to see.
#
# A low gold score could by itself make an answer look overrated. So the next cell compares broken
# answers with answers that are as bad in another way.

# %%
broken = torch.tensor([[one.parts["complete"] < 0 for one in four] for four in judged])
bad = gold < -1
for name, kind in (("broken", bad & broken), ("bad in another way", bad & ~broken)):
    print(f"{name:18s} {int(kind.sum()):3d} answers, mean gold {float(gold[kind].mean()):+.2f}, "
          f"overrated by {float(over[kind].mean()):+.2f}")  # fmt: skip
assert over[bad & broken].mean() > over[bad & ~broken].mean() + 0.1

# %% [markdown]
# On average only the broken ones are overrated; the others are not. Such a pattern tells which data
# to collect: answers that are almost right. And do not trust the score alone.
#
# ## What the note says, and what is meant
#
# | as printed | as meant | shown |
# |---|---|---|
# | $\frac{1}{\binom K2} E[\ldots]$ | the factor once, on the sum over pairs | Claims, next cell |
# | "R(x, y) = 0.9" | differences mean something, values do not | the fit from 5 |
# | "without softmax" | a head of width 1 in place of the projection | the shapes |
# | $r_\phi(q, o_{\le t})$ at every token | one score, at the last token | the rude answer |
# | $K(K-1)/2$ inputs | $K$ readings, $K(K-1)/2$ differences | the equal gradients |
# | "until convergence" (chapter 4) | one epoch, or stop on held-out pairs | the three ways |
#
# ## Claims
#
# What the text says, asserted:

# %%
ratio = math.comb(4, 2)
divided_twice = float(ranking_loss(torch.zeros(1, 4))) / ratio
print(f"equal scores: loss log 2 = {math.log(2):.3f}; divided by C(4,2) twice {divided_twice:.3f}")
shifted = ranking_loss(paper_scores + torch.tensor([[7.0], [-3.0]]))
assert torch.allclose(shifted, ranking_loss(paper_scores))
print("a constant for each prompt changes nothing in the loss")
assert [round(stretch[name], 2) for name in fits] == [1, 2, 2]
print("half the noise, or the true gap as margin, doubles the scores")

# %% [markdown]
# ## Quiz
#
# 1. Answer A to one question scores 3.1, answer B to another question scores 2.0. Which is better?
# 2. A reward model gives every answer the same score. What is its loss, for K = 2 and for K = 8?
# 3. Reward models A and B put the same 84% of pairs in order; B's scores are three times A's. What
#    differs?
# 4. K = 8. How many answers have to be read for all pairs of a prompt, and in how many steps of a
#    shuffled epoch does one answer turn up?
# 5. Scores correlate with length, and so does the gold score. Is the reward model biased?
#
# <details><summary>Answers</summary>
#
# 1. Nobody knows. Comparisons are within a prompt; each prompt may have its own constant.
#    Standardising fixes one constant and one scale for all prompts, not one for each.
# 2. $\log 2 = 0.693$ for both: every pair has the gap 0, and the loss is a mean over pairs.
# 3. How sure they are. At most one of them is calibrated. If they go into PPO as they are, the same
#    KL coefficient weighs a third as much against B; standardised, they are the same.
# 4. 8 answers for 28 pairs. In up to 7 steps: it is in $K - 1 = 7$ pairs.
# 5. The correlation does not say. Compare at equal gold score, and change the length by hand: here
#    the first showed nothing and the second showed that repetition is paid for.
#
# </details>
#
# **Next:** the reward model is right where it has data and wrong a little further away. What keeps
# the policy near? Notebook 05: the KL penalty.

# %%
from minippo.checks import scored

scored()
