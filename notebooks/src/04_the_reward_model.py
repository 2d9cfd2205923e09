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
# what comparisons can teach and what they cannot; on the tiny GPT-2 you see why all pairs of a
# prompt belong in one batch, and when to stop. Then you examine the shipped reward model as one
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
import os
import sys
import warnings

os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore", message="IProgress not found")
if "google.colab" in sys.modules:
    print("Upload a clone of the repository, then run: %pip install -q ./minippo")

# %%
import math
import random

import matplotlib.pyplot as plt
import torch

from minippo.plots import COLOURS, STYLES

torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25})
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS[:4], linestyle=STYLES)

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
# The notes that this course follows print $L = -\frac{1}{\binom K2} E[\log \sigma(\ldots)]$. An
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
# `sigmoid(-200)` is 0 in float32, and its logarithm `-inf`. `torch.nn.functional` has one function
# for the logarithm of a sigmoid.
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
# The world of `minippo.oracle` has 85 possible answers, each with a true score. Suppose annotators
# who follow Bradley and Terry exactly: answer $i$ is preferred to $j$ with probability
# $\sigma((r_i - r_j) / \tau)$, where $\tau$ says how noisy they are. Take *all* pairs with these
# probabilities, so that nothing depends on luck, give every answer a free number $s$, and minimise
# your loss. What comes out?

# %%
from minippo.oracle import feelings_world

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
assert (scores - true_scores).std() < 1e-4 and abs(loss - moved_loss) < 1e-9

# %% [markdown]
# The loss recovers the truth *up to a constant*, and any constant will do. Adding 5 to all scores
# of a prompt changes no gap, so no preference and no loss, and each prompt may have a constant of
# its own. So a sentence such as "R(x, y) = 0.9" says nothing by itself. What does mean something is
# a difference, and before PPO scores are **standardised**: less the mean of the scores of reference
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
# "The last layer without softmax", say the notes: what is meant is that the projection onto `V`
# tokens is replaced by a **head** of width 1. Some projects put a sigmoid behind it, so that scores
# lie between 0 and 1. No gap can then exceed 1, and no preference $\sigma(1) = 73\%$:

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
from minippo.batching import encode_prompt, encode_response
from minippo.models import RewardModel, frozen_copy, load_policy, load_tokenizer
from minippo.sft import join

tokenizer, policy = load_tokenizer("sft"), load_policy("sft")
pad_id = tokenizer.pad_token_id
fresh = RewardModel.from_policy(policy, seed=0)
print("the policy's projection", tuple(policy.lm_head.weight.shape))
print("the reward model's head", tuple(fresh.classifier.score.weight.shape))

# %%
shipped = frozen_copy(RewardModel.load("reward"))  # trained on 6,000 prompts with 8 answers each
prompt = encode_prompt(tokenizer, "How do I grow sweet tomatoes?")
texts = ["You can water the tomato plants every morning.", "Figure it out yourself."]
responses = [encode_response(tokenizer, text) for text in texts]
tokens, attention_mask, mask = join([prompt] * 2, responses, pad_id)
everywhere = shipped.read(shipped.hidden(tokens, attention_mask))
print("numbers at every position", tuple(everywhere.shape))
print("scores", shipped(tokens, attention_mask))
for token, number in list(zip(tokens[1].tolist(), everywhere[1].tolist()))[len(prompt) - 1 :]:
    print(f"{tokenizer.decode([token])!r:16s} {number:+.2f}")

# %% [markdown]
# The notes write the reward of token $t$ as $r_\phi(q, o_{\le t})$, a score at every token. The
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
# The notes speak of $K(K-1)/2$ inputs. There are $K(K-1)/2$ *pairs*, but only $K$ answers to read:

# %%
print(" K  pairs  answers read, pair by pair  answers read once")
for K in (2, 4, 8, 9):
    pairs = K * (K - 1) // 2
    print(f"{K:2d}  {pairs:5d}  {2 * pairs:26d}  {K:17d}")

# %% [markdown]
# Four answers of the SFT model to each prompt, ranked by the annotator of TinyHH. It sees a
# **gold** score (notebook 00) and is noisy: it ranks by score / 0.5 plus random noise, which makes
# every pair Bradley-Terry with $\tau = 0.5$. 96 prompts to learn from, 64 held out. That is little,
# on purpose: overfitting should show within a minute.

# %%
from minippo.batching import Encoded, decode_response
from minippo.evaluation import sample_answers
from minippo.tinyhh.annotator import TEMPERATURE, judge, rank
from minippo.tinyhh.rows import prompt_rows


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
sampled, texts, judged = sample(prompt_rows("preference", 160), seed=7)
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
train_rows, held_out = ranked[:96], ranked[96:]
perfect = torch.tensor(gold_ranked[96:]) / TEMPERATURE
print("gold scores in the order of one ranking:", gold_ranked[0])
print(f"a model that knows the gold score: held-out loss {ranking_loss(perfect):.3f}")

# %% [markdown]
# Even that model has a loss: annotators disagree with themselves. First, that reading the answers
# once gives the very same loss and gradient as reading every pair:

# %%
from minippo.reward_model import score_all, score_responses


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
# Two ways through the same data, five times each (an **epoch** is one time):
#
# - **together**: a step takes 8 prompts and all 6 pairs of each, 32 answers read;
# - **shuffled**: all 576 pairs in random order, a step takes 8 pairs of any prompts, 16 answers
#   read. An answer comes back in $K - 1 = 3$ different steps of one epoch.
#
# Held out: the loss of 64 rankings that are not trained on. Before you run it, guess: after how
# many epochs is each at its best?

# %%
from minippo.batching import pieces
from minippo.optim import adamw, optimizer_step

EPOCHS = 5
all_pairs = [pair for row in train_rows for pair in as_pairs(row)]
print(len(train_rows), "rankings of 4, or", len(all_pairs), "pairs")


# %%
def epochs_of(rows, seed):
    """Reward model trained on rows, 8 a step; its (training, held-out) loss after each epoch."""
    reward_model = RewardModel.from_policy(policy, seed, pad_id)
    optimizer = adamw({"reward": reward_model}, {"reward": 1e-3})
    order, curve = random.Random(seed), []
    for _ in range(EPOCHS):
        shuffled = order.sample(rows, len(rows))
        losses = []
        for piece in pieces(shuffled, 8):
            loss = ranking_loss(score_responses(reward_model, piece, pad_id))
            loss.backward()
            optimizer_step(optimizer, max_grad_norm=1.0)
            losses.append(float(loss.detach()))
        scores = torch.tensor(score_all(reward_model, held_out, pad_id))
        curve.append((sum(losses) / len(losses), float(ranking_loss(scores))))
    return curve


# %%
curves = {"together": epochs_of(train_rows, 0), "shuffled": epochs_of(all_pairs, 0)}
for name, curve in curves.items():
    train_loss, held_out_loss = zip(*curve)
    print(f"{name} training", *(f"{loss:.2f}" for loss in train_loss))
    print(f"{name} held out", *(f"{loss:.2f}" for loss in held_out_loss))
