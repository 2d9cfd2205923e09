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
# # 05 · KL penalties: how far may the policy go?
#
# **Promise.** You write four ways to measure how far the policy has moved from its reference, and
# hold each against the exact answer in a world where every response can be listed. You will know
# which of them may stand in the reward and which in the loss, why a measured KL can be negative,
# and how its coefficient is set. **Needs.** Notebooks 00 and 03: log-probabilities of tokens and
# the mask. **Time.** 90 minutes, of which the computer needs less than one. Six exercises.
#
# ## The question
#
# PPO makes answers that score well more likely. But the score comes from a reward model, which has
# seen the answers of the SFT model and little else. Far away from them it is guessing, and PPO
# would find the places where it guesses too high. So the policy pays for its distance from the SFT
# model, the *reference*. **What is that distance, and how is it measured on answers that were only
# sampled?**

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import math

import matplotlib.pyplot as plt
import torch

# %% [markdown]
# ## The formula
#
# The **KL divergence** (after Kullback and Leibler) of the policy from the reference is the mean of
# the logarithm of a ratio, over what the *policy* says:
#
# $$KL(\pi, \pi_{ref}) = \sum_y \pi(y) \, \log \frac{\pi(y)}{\pi_{ref}(y)}
# = \mathbb{E}_{y \sim \pi} \left[ \log \pi(y) - \log \pi_{ref}(y) \right]$$
#
# It is 0 where the two agree, positive otherwise, and counted in **nats** (natural logarithms). It
# has a direction: $KL(\pi_{ref}, \pi)$ is another number. $y$ can be a whole response or a single
# next token. For a whole response the logarithms of its tokens add up, so its KL is a sum over
# tokens as well:
#
# $$\log \frac{\pi(y)}{\pi_{ref}(y)} = \sum_t d_t, \qquad
# d_t = \log \pi(y_t \mid x, y_{<t}) - \log \pi_{ref}(y_t \mid x, y_{<t})$$
#
# | symbol | variable | shape | function |
# |---|---|---|---|
# | $\log \pi$ of each sampled token | `logprobs` | `(B, R)` | `gather_logprobs` |
# | $\log \pi_{ref}$ of the same token | `ref_logprobs` | `(B, R)` | `gather_logprobs` |
# | $\log \pi$ of every token | `logprobs_all` | `(B, R, V)` | `log_softmax` |
# | $\log \pi_{ref}$ of every token | `ref_logprobs_all` | `(B, R, V)` | `log_softmax` |
# | exact KL of the next token | `full` | `(B, R)` | `kl_full` |
# | $k_1 = d$ | `kl` | `(B, R)` | `kl_k1` |
# | $\lvert d \rvert$ | `abs` | `(B, R)` | `kl_abs` |
# | $k_2 = \tfrac12 d^2$ | `mse` | `(B, R)` | `kl_k2` |
# | $k_3 = e^{-d} - 1 + d$ | `k3` | `(B, R)` | `kl_k3` |
# | $\beta$, the KL coefficient | `kl_coef` | a number | `adapt_kl_coef` |
# | $r_t$ | `rewards` | `(B, R)` | `per_token_rewards` |
#
# The names `kl`, `abs`, `mse` and `full` are those of a well-known library (TRL) and of many notes
# that quote its code; `k1`, `k2` and `k3` are John Schulman's. Here `kl` is one *estimator*, KL the
# quantity.
#
# **The weights.** The sum is sometimes printed with the weights $\pi_{ref}(y)$. That is no
# slip without consequences. Two tokens, a policy of $\tfrac34, \tfrac14$ and a reference of
# $\tfrac12, \tfrac12$:

# %%
policy = torch.tensor([3 / 4, 1 / 4])
reference = torch.tensor([1 / 2, 1 / 2])
log_ratio = policy.log() - reference.log()
print(f"weights of the policy:     {(policy * log_ratio).sum():+.3f}")
print(f"weights of the reference:  {(reference * log_ratio).sum():+.3f}")
assert (policy * log_ratio).sum() > 0 > (reference * log_ratio).sum()

# %% [markdown]
# With the wrong weights it is $-KL(\pi_{ref}, \pi)$, which is never positive. Made smaller and
# smaller, as a loss is, it drives the policy *away* from the reference.
#
# ## Exercise 1: `kl_full`
#
# Difficulty 2 of 5 · importance 4 of 5 · 5 to 10 minutes
#
# The exact sum over the vocabulary, at each position. Both inputs are log-probabilities, not
# logits. One demand more: a token that the policy excludes has log-probability $-\infty$ and
# probability 0. It adds nothing ($0 \log 0 = 0$), but $0 \cdot (-\infty)$ is NaN in a computer.
# It must not get into the gradient either.
#
# <details><summary>Hint 1: a nudge</summary>
#
# It is the mean of the log-ratio under the policy. Where are the policy's probabilities?
#
# </details>
# <details><summary>Hint 2: the shapes</summary>
#
# Everything is `(B, R, V)` until a sum over the last axis. `logprobs_all.exp()` is the weight.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `excluded = logprobs_all == -torch.inf`. Fill both inputs with 0 there (`masked_fill`), so that
# their difference is 0 and not $-\infty$. Then weight and sum.
#
# </details>


# %%
def kl_full(logprobs_all, ref_logprobs_all):
    """logprobs_all, ref_logprobs_all: (B, R, V) -> (B, R)."""
    ### BEGIN SOLUTION
    excluded = logprobs_all == -torch.inf
    log_ratio = logprobs_all.masked_fill(excluded, 0) - ref_logprobs_all.masked_fill(excluded, 0)
    return (logprobs_all.exp() * log_ratio).sum(dim=-1)
    ### END SOLUTION


# %%
from minippo.checks import check_kl_full

kl_full = check_kl_full(kl_full)

# %% [markdown]
# ## One sample instead of a sum
#
# `kl_full` needs the logits of both models for the whole vocabulary: 50,257 numbers a token for
# GPT-2. What PPO keeps of a **rollout**, a batch of sampled answers, is one number a token: the
# log-probability of the token that was sampled. An **estimator** is a function of that number,
# for policy and reference, whose *mean over samples* should be the KL. It is **unbiased** if its
# mean is exactly that.
#
# **By hand.** Two responses, three positions; the last position of the second is padding. Write
# the log-ratio $d$ in units of $\log 2 = 0.693$:
#
# ```text
#                    response 1            response 2
# π of the token     1/2    1/4    1/4     1/2    1/8    -
# π_ref              1/4    1/2    1/4     1/4    1/4    -
# d / log 2            1     -1      0       1     -1    -
# kl    d            0.693 -0.693    0     0.693 -0.693   -
# mse   d²/2         0.240  0.240    0     0.240  0.240   -
# k3    e^-d - 1 + d 0.193  0.307    0     0.193  0.307   -
# ```
#
# For $d = \log 2$: $e^{-d} = \tfrac12$, so $k_3 = \tfrac12 - 1 + 0.693$. For $d = -\log 2$:
# $k_3 = 2 - 1 - 0.693$.

# %%
paper_policy = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 8, 1.0]])
paper_reference = torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1.0]])
paper_mask = torch.tensor([[True, True, True], [True, True, False]])
logprobs, ref_logprobs = paper_policy.log(), paper_reference.log()
print((logprobs - ref_logprobs) / math.log(2))

# %% [markdown]
# Notes that print this code often add that the difference of the logarithms "is the KL". It is one
# sample of it: two of the five numbers that count are negative, and a KL never is.
#
# ## Exercise 2: `kl_k1`
#
# Difficulty 1 of 5 · importance 5 of 5 · 2 minutes
#
# The log-ratio itself. Its mean over samples of the policy is the KL by definition. No clamp: a
# clamped estimator has another mean.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Which of the two is positive where the policy likes the token *more* than the reference does?
#
# </details>
# <details><summary>Hint 2: the shapes</summary>
#
# `(B, R)` and `(B, R)` to `(B, R)`, element by element. No sum, no mask.
#
# </details>
# <details><summary>Hint 3: nearly the line</summary>
#
# The logarithm of a ratio is a difference of logarithms: policy less reference.
#
# </details>


# %%
def kl_k1(logprobs, ref_logprobs):
    """logprobs, ref_logprobs: (B, R) -> (B, R)."""
    ### BEGIN SOLUTION
    return logprobs - ref_logprobs
    ### END SOLUTION


# %%
from minippo.checks import check_kl_k1

kl_k1 = check_kl_k1(kl_k1)

# %% [markdown]
# ## Exercise 3: `kl_k2`
#
# Difficulty 1 of 5 · importance 3 of 5 · 2 minutes
#
# Half the square of the log-ratio, `mse` in the table of names. It is never negative. Keep it
# differentiable: it is also used as a loss.
#
# <details><summary>Hint 1: a nudge</summary>
#
# The square is of the *log*-ratio, not of a difference of probabilities.
#
# </details>
# <details><summary>Hint 2: the shapes</summary>
#
# `(B, R)` again, element by element.
#
# </details>
# <details><summary>Hint 3: nearly the line</summary>
#
# `(...).square()`, with the factor one half in front of the square, not inside.
#
# </details>


# %%
def kl_k2(logprobs, ref_logprobs):
    """logprobs, ref_logprobs: (B, R) -> (B, R)."""
    ### BEGIN SOLUTION
    return 0.5 * (logprobs - ref_logprobs).square()
    ### END SOLUTION


# %%
from minippo.checks import check_kl_k2

kl_k2 = check_kl_k2(kl_k2)

# %% [markdown]
# ## Exercise 4: `kl_k3`
#
# Difficulty 3 of 5 · importance 4 of 5 · 5 to 10 minutes
#
# $k_3 = e^{-d} - 1 + d$. Why that? The mean of $e^{-d}$ over samples of the policy is
# $\sum_y \pi(y) \frac{\pi_{ref}(y)}{\pi(y)} = 1$, as long as the policy excludes nothing that the
# reference says. So $e^{-d} - 1$ has mean 0, and adding it to $d$ changes no mean. It was chosen so
# that the sum is never negative: the straight line $1 - d$ lies below the curve $e^{-d}$, and
# touches it at $d = 0$. (Something of mean 0 that is added to make the noise smaller is called a
# *control variate*.)
#
# Two traps. The *sign*: with $e^{d}$ in place of $e^{-d}$ it looks as good and is never negative
# either, but estimates something else. Several published implementations have it that way round.
# And *digits*: for nearly equal policies $e^{-d}$ is nearly 1, and taking off the 1 loses digits of
# what is left: in float32 most of them, in float64 fewer.
#
# <details><summary>Hint 1: a nudge</summary>
#
# $-d$ is the logarithm of reference over policy. Give it a name.
#
# </details>
# <details><summary>Hint 2: the tool</summary>
#
# `torch.expm1(x)` is $e^x - 1$ with all digits.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# With `log_ratio = ref_logprobs - logprobs` the estimate is `expm1` of it, less it.
#
# </details>


# %%
def kl_k3(logprobs, ref_logprobs):
    """logprobs, ref_logprobs: (B, R) -> (B, R), never negative."""
    ### BEGIN SOLUTION
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio
    ### END SOLUTION


# %%
from minippo.checks import check_kl_k3

kl_k3 = check_kl_k3(kl_k3)

# %% [markdown]
# All of them on the numbers on paper; `abs` is not worth an exercise:

# %%
from minippo import kl_abs

ESTIMATORS = {"kl": kl_k1, "abs": kl_abs, "mse": kl_k2, "k3": kl_k3}
for name, estimate in ESTIMATORS.items():
    print(f"{name:4s}", estimate(logprobs, ref_logprobs).masked_fill(~paper_mask, 0))
assert torch.allclose(kl_k3(logprobs, ref_logprobs)[0], torch.tensor([0.193, 0.307, 0]), atol=1e-3)

# %% [markdown]
# ## Is this right? A world where the sum can be done
#
# The oracle of this course is a world of five words and responses of at most three tokens: 85
# responses in all. A **state** is the beginning of a response. A policy is a table with the
# log-probability of each next token in each state. Everything that sampling estimates is a sum over
# 85 terms here.
#
# The world has a rule that scores responses: *good* counts +1 and *bad* −1, *very* doubles what
# follows and *not* multiplies it by −½ (*not bad* is +½), and `.` ends a response (a response
# without it loses 3; one that ends in *very* or *not*, ½). `world.optimum` gives the policy $\pi^*$
# for which the **objective**, the mean score less $\beta$ times the KL, is as large as it can be.
# We use it as an example of a policy that has moved away from the reference.

# %%
from minippo.worlds.oracle import feelings_world

world, ref = feelings_world()
best, _ = world.optimum(ref, kl_coef=0.8)
print("words:", world.words, "| states, words:", tuple(ref.shape))
for words, probability in zip(world.responses[:3], world.response_logprobs(best).exp()):
    print(f"{' '.join(world.text(words)):8s} has probability {probability:.3f}")
print(f"KL(best, ref) = {world.kl(best, ref):.3f}, KL(ref, best) = {world.kl(ref, best):.3f} nats")

# %% [markdown]
# `costs` gives what an estimator says of every token of every response. Its sum over the response,
# weighted with how often the response is sampled, is the estimator's exact mean; and just so its
# standard deviation, its range, and how often it is negative. Shapes: $Y = 85$ responses, $S = 21$
# states; `world.before (Y, R)` has the number of the state before each token, `world.mask (Y, R)`
# the tokens that count.

# %%
NAMES = [*ESTIMATORS, "full"]


def costs(name, policy, ref):
    """policy, ref: (S, V) log-probabilities -> (Y, R), 0 where a response has ended."""
    if name == "full":
        found = kl_full(policy[world.before], ref[world.before])
    else:
        found = ESTIMATORS[name](world.token_logprobs(policy), world.token_logprobs(ref))
    return found.masked_fill(~world.mask, 0)


def exact_stats(name, policy, ref, sampled_by):
    """Mean, standard deviation, least, largest, share below 0 of the sum over a response."""
    weights, x = world.response_logprobs(sampled_by).exp(), costs(name, policy, ref).sum(1)
    mean = (weights * x).sum()
    std = (weights * (x - mean).square()).sum().sqrt()
    return [float(v) for v in (mean, std, x.min(), x.max(), weights[x < -1e-9].sum())]


# %%
def report(policy):
    print(f"exact KL: {world.kl(policy, ref):.4f} nats per response")
    print("          mean     std      least   largest  below 0")
    for name in NAMES:
        mean, std, least, largest, below = exact_stats(name, policy, ref, policy)
        print(f"{name:5s} {mean:8.4f} {std:8.4f} {least:8.3f} {largest:9.3f} {below:8.1%}")


near = (ref + 0.1 * (best - ref)).log_softmax(-1)
report(near)
report(best)

# %% [markdown]
# The first table is of a policy a tenth of the way to the best one, the second of the best one.
#
# - `kl`, `k3` and `full` have the exact KL as their mean, near and far: unbiased.
# - `abs` is far off: near the reference by a factor of more than ten. It estimates no divergence.
# - `mse` is biased, a little when near, more when far.
# - `kl` is negative for two to five responses in ten. Single numbers below 0 are no bug.
# - Near the reference `k3` and `mse` have a small fraction of the noise of `kl`. Far away it is the
#   other way round for `k3`: its $e^{-d}$ explodes for a response that the policy hardly ever gives
#   and the reference does.
#
# That is a **tail**: rare and huge. How much of `k3` at the best policy comes from rare responses?

# %%
weights, k3 = world.response_logprobs(best).exp(), costs("k3", best, ref).sum(1)
order = weights.argsort()
rare = order[weights[order].cumsum(0) < 0.01]
mean = (weights * k3).sum()
spread = weights * (k3 - mean).square()
print(f"{len(rare)} of {len(weights)} responses are sampled {weights[rare].sum():.1%} of the time")
print(f"their share of the mean of k3:     {(weights * k3)[rare].sum() / mean:.1%}")
print(f"their share of the variance of k3: {spread[rare].sum() / spread.sum():.1%}")

# %% [markdown]
# A rollout of 128 answers may well not hold one of them. Then the estimate is too small, and the
# next rollout that holds one shows a spike. The policy did nothing between the two.
#
# ## See it
#
# The same for policies on the way from the reference to the best one and beyond:

# %%
steps = [0.03, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5]
path = [(ref + step * (best - ref)).log_softmax(-1) for step in steps]
exact = [float(world.kl(policy, ref)) for policy in path]
stats = {name: [exact_stats(name, policy, ref, policy) for policy in path] for name in NAMES}
print("exact KL       ", " ".join(f"{x:7.3f}" for x in exact))
for name in ("kl", "mse", "k3"):
    print(f"std of {name:4s}    ", " ".join(f"{s[1]:7.3f}" for s in stats[name]))

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(10.8, 3.4), layout="constrained")
for name, marker, size in zip(("kl", "mse", "k3", "abs"), "os^x", (10, 6, 6, 6)):
    means = [s[0] / x for s, x in zip(stats[name], exact)]
    noise = [s[1] / x for s, x in zip(stats[name], exact)]
    if name != "abs":  # far above the others
        axes[0].plot(exact, means, marker=marker, ms=size, fillstyle="none", label=name)
    axes[1].plot(exact, noise, marker=marker, ms=size, fillstyle="none", label=name)
axes[0].set(xscale="log", ylim=(0.85, 1.05), ylabel="mean / exact KL", title="bias: 1 is right")
axes[1].set(xscale="log", yscale="log", ylabel="standard deviation / exact KL", title="noise")
for axis in axes:
    axis.set_xlabel("exact KL, nats per response")
    axis.grid()
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# On the left `kl` and `k3` lie on each other at 1; `mse` falls below 0.9, and `abs` would be far
# above the picture. On the right `kl` and `k3` cross. Where? In smaller steps:

# %%
noise = {name: [s[1] for s in stats[name]] for name in ("kl", "k3")}
for step in range(50, 76):
    policy = (ref + step / 100 * (best - ref)).log_softmax(-1)
    kl_noise, k3_noise = (exact_stats(name, policy, ref, policy)[1] for name in ("kl", "k3"))
    if k3_noise > kl_noise:
        break
assert 50 < step < 75  # the crossing lies between these steps
print(f"k3 is the noisier one from {world.kl(policy, ref):.2f} nats on")
assert noise["k3"][0] < noise["kl"][0] / 10 and noise["k3"][-1] > noise["kl"][-1] * 10

# %% [markdown]
# ## Who sampled?
#
# All of this holds for samples *of the policy*, the first of the two. Suppose the responses came
# from the reference instead:

# %%
print(f"KL(best, ref) = {world.kl(best, ref):.3f}   KL(ref, best) = {world.kl(ref, best):.3f}")
print("mean over samples of    best     ref")
for name in NAMES:
    means = [exact_stats(name, best, ref, who)[0] for who in (best, ref)]
    print(f"{name:20s} {means[0]:7.3f} {means[1]:7.3f}")

# %% [markdown]
# On samples of the reference `kl` is exactly minus the KL in the other direction, and `k3` is a
# number without a meaning. `full` still sums over the right tokens, but at the wrong states.
#
# The same estimators have a second use, inside a PPO update: how far has the *new* policy moved
# from the *old* one, which sampled? Then the old one is the first of the two, and with
# $ratio = \pi_{new} / \pi_{old}$ the formula reads $k_3 = ratio - 1 - \log ratio$. In this package
# that number is called `approx_kl`, and only the distance to the reference is called `kl`.
# Somebody who copies the line with `ratio` from there and puts in policy and reference has $e^{d}$
# where $e^{-d}$ belongs:

# %%
turned = ESTIMATORS["k3"](world.token_logprobs(ref), world.token_logprobs(best)).sum(1)
mean = (world.response_logprobs(best).exp() * turned).sum()
print(f"k3 with the two exchanged, samples of the policy: {mean:.3f}, KL {world.kl(best, ref):.3f}")
assert mean > 1.15 * world.kl(best, ref)

# %% [markdown]
# ## Exercise 5: `per_token_rewards`
#
# Difficulty 3 of 5 · importance 5 of 5 · 15 to 20 minutes
#
# The first place where the KL can stand: in the reward.
#
# $$r_t = -\beta \, kl_t + \mathbb{1}[t \text{ is the last token that counts}] \; s$$
#
# The score $s$ is given once, for the whole answer, at its last token that counts. What is paid
# per token is the penalty. Two demands: masked positions get 0, whatever stands in `kl` there (it
# may be NaN); and the mask may have holes, for answers that a tool's text interrupts, so the number
# of tokens that count does not tell where the last one stands.
#
# With $\beta = \tfrac12$ and the `kl` on paper, scores 1 and 2, in units of $\log 2$ first:
#
# ```text
# -β d / log 2       -1/2   1/2    0       -1/2   1/2    -
# and the score         0     0    1          0     2    -
# ```
#
# <details><summary>Hint 1: a nudge</summary>
#
# The last token that counts is the one from which on exactly one token counts, itself included.
#
# </details>
# <details><summary>Hint 2: the tools</summary>
#
# Count from the right: `mask.flip(1).cumsum(dim=1).flip(1)`. Then `torch.where(last, ..., 0)` with
# `scores.unsqueeze(1)`, which is `(B, 1)`.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `last = mask & (counted == 1)`. The penalty is `kl_coef * kl.masked_fill(~mask, 0)`: fill first,
# because NaN times 0 is NaN. Score at `last`, less the penalty.
#
# </details>


# %%
def per_token_rewards(scores, kl, mask, kl_coef):
    """scores: (B,), kl: (B, R), mask: (B, R) bool, kl_coef: a number -> (B, R)."""
    ### BEGIN SOLUTION
    counted = mask.flip(1).cumsum(dim=1).flip(1)
    last = mask & (counted == 1)
    penalty = kl_coef * kl.masked_fill(~mask, 0)
    return torch.where(last, scores.unsqueeze(1), 0) - penalty
    ### END SOLUTION


# %%
from minippo.checks import check_per_token_rewards

per_token_rewards = check_per_token_rewards(per_token_rewards)

# %%
scores = torch.tensor([1.0, 2.0])
rewards = per_token_rewards(scores, kl_k1(logprobs, ref_logprobs), paper_mask, kl_coef=0.5)
print(rewards)
expected = torch.tensor([[-1 / 2, 1 / 2, 0], [-1 / 2, 1 / 2, 0]]) * math.log(2)
expected[0, 2] += 1
expected[1, 1] += 2
assert torch.allclose(rewards, expected)

# %% [markdown]
# The penalty is sometimes printed as $\beta$ times the ratio $\pi / \pi_{ref}$, without the
# logarithm. Then a policy that *is* the reference pays $\beta$ for every token, and shorter answers
# are cheaper for no reason:

# %%
same = torch.zeros(1, 4)
ratio, counts = same.exp(), torch.ones(1, 4, dtype=torch.bool)
for name, penalty in (("log-ratio", same), ("bare ratio", ratio)):
    rewards = per_token_rewards(torch.tensor([1.0]), penalty, counts, kl_coef=0.1)
    print(f"policy = reference, {name:10s}: {rewards}, sum {rewards.sum():.1f}")
assert torch.isclose(rewards.sum(), torch.tensor(0.6))

# %% [markdown]
# ## In the reward or in the loss
#
# The KL can stand in two places, and it is not the same in both.
#
# - **In the reward** it is a number, like the score. The **policy gradient**, the rule by which PPO
#   learns from rewards (notebook 06), needs no more: the log-probability of each sampled token is
#   raised in proportion to the reward that is paid from that token on, and lowered where the sum
#   is negative. The estimator itself is never differentiated.
# - **In the loss** the estimator *is* differentiated, at the sampled tokens, which are taken as
#   data: how the policy would have sampled others does not enter.
#
# What we want is the gradient of the exact KL of whole responses. In this world it can be computed,
# and so can what each of the two ways gives. The comparison has two numbers: the **cosine** of the
# angle with the wanted gradient (1 is the same direction, 0 is unrelated) and the length, relative
# to it. The policy stands halfway to the best one.

# %%
half = (ref + 0.5 * (best - ref)).log_softmax(-1)
sampled = world.response_logprobs(half).exp()[:, None]


def gradient(function):
    """d function / d logits at the policy `half`: (S, V)."""
    logits = half.clone().requires_grad_()
    return torch.autograd.grad(function(logits.log_softmax(-1)), logits)[0]


def in_the_reward(name):
    to_pay = costs(name, half, ref).flip(1).cumsum(1).flip(1)  # from each token on
    return gradient(lambda policy: (sampled * to_pay * world.token_logprobs(policy)).sum())


def in_the_loss(name):
    return gradient(lambda policy: (sampled * costs(name, policy, ref)).sum())


# %%
wanted = gradient(lambda policy: world.kl(policy, ref))


def compare(found):
    """Cosine with the wanted gradient and length relative to it; nothing if it is 0."""
    if found.norm() < 1e-9:
        return "    -  0.000"
    cosine = (found * wanted).sum() / (found.norm() * wanted.norm())
    return f"{cosine:5.3f} {found.norm() / wanted.norm():6.3f}"


print("       in the reward  in the loss")
print("       cosine length  cosine length")
for name in NAMES:
    print(f"{name:6s} {compare(in_the_reward(name)):14s}", compare(in_the_loss(name)))

# %% [markdown]
# In the reward, `kl` has the wanted gradient exactly, and no other one comes near. In the loss,
# `kl` has *none at all*: the mean of $\nabla \log \pi$ over samples of $\pi$ is 0. `full` and
# `mse` have one and the same gradient there, close to the wanted one. Where do the others point?

# %%
reach = world.reach(half)[:, None]  # how often each state is visited
reverse = reach * (half.exp() - ref.exp())  # gradient of KL(ref, policy) at each state
assert torch.allclose(in_the_reward("kl"), wanted)
assert in_the_loss("kl").abs().max() < 1e-12
assert torch.allclose(in_the_loss("mse"), in_the_loss("full"))
assert torch.allclose(in_the_loss("k3"), reverse)
assert torch.allclose(in_the_loss("full") + in_the_reward("full"), wanted)
print("k3 in the loss follows KL(ref, policy); full in the loss and full in the reward add up")

# %% [markdown]
# The last line is the product rule. The KL of a response is made of the KL at each state, weighted
# by how often the state is visited. `full` in the loss moves the KL at the states and keeps the
# visits fixed; `full` in the reward moves the visits and keeps the KL fixed. `kl` in the reward
# does both. So a KL loss ignores that an early token leads to states where more KL will be paid.
#
# Does it matter? Let real PPO train a policy in this world, from samples alone. The best policy is
# known, so the verdict is exact. Four runs: `kl`, `k3` or `full` in the reward, and `full` in the
# loss.
#
# > **Predict.** Which of the four will end at $\pi^*$?
#
# <details><summary>Answer</summary>
#
# Only `kl` in the reward: in the table above it alone has the wanted gradient.
#
# </details>

# %%
from minippo import PPOConfig, frozen_copy, train_ppo
from minippo.worlds.oracle import TabularPolicy, TabularValue

SETTINGS = dict(steps=40, batch_size=192, minibatch_size=192, micro_batch_size=192, lr=0.2)
SETTINGS |= dict(ppo_epochs=3, value_lr=0.2, whiten_advantages=False, missing_eos_penalty=0.0)
SETTINGS |= dict(kl_coef=0.8, value_clip_range=1e6, max_response_tokens=3)


def train(**settings):
    """The trained policy (S, V) and the metrics of each step."""
    config = PPOConfig(**(SETTINGS | settings))
    policy, critic = TabularPolicy(world, ref), TabularValue(world)
    models = policy, frozen_copy(policy), critic
    prompts = world.prompts(config.batch_size)
    history = train_ppo(*models, world.score_fn, prompts, world, config)
    return world.logprobs_all(policy).detach(), history


# %% tags=["nbval-ignore-output"]
runs = {
    "kl in the reward": dict(),
    "k3 in the reward": dict(kl_estimator="k3"),
    "full in the reward": dict(kl_estimator="full"),
    "full in the loss": dict(kl_coef=0.0, kl_loss_coef=0.8),
}
trained = {name: train(**settings)[0] for name, settings in runs.items()}
print("                     KL to pi*  KL to ref   objective")
for name, policy in {"(the reference)": ref, **trained}.items():
    numbers = world.kl(policy, best), world.kl(policy, ref), world.objective(policy, ref, 0.8)
    print(f"{name:19s} {numbers[0]:10.3f} {numbers[1]:10.3f} {numbers[2]:11.3f}")

# %%
left = {name: float(world.kl(policy, best)) for name, policy in trained.items()}
fixed_point = world.kl_loss_optimum(ref, 0.8)
print(f"KL(fixed point of the KL loss, pi*) = {world.kl(fixed_point, best):.3f}")
assert left["k3 in the reward"] > 0.4 and left["full in the reward"] > 0.8
assert 0.1 < left["full in the loss"] < 0.35
assert world.kl(trained["full in the loss"], fixed_point) < 0.06
for name in ("k3 in the reward", "full in the reward"):
    assert world.kl(trained[name], ref) > 2 * world.kl(best, ref)
at_best = [name for name, distance in left.items() if distance < 0.03]
print("ends at pi*:", at_best)
assert at_best == ["kl in the reward"]

# %% [markdown]
# `k3` and `full` in the reward do not hold the policy back: with either, the policy ends more than
# twice as far from the reference as $\pi^*$ is. The KL loss does hold it, but elsewhere: near the
# *fixed point* printed above, the policy at which its gradient and that of the score cancel, 0.2
# nats from $\pi^*$.
#
# So the two terms in "$L_{policy} + c_1 L_{value} + c_2 L_{KL}$ and a KL in the reward" are not one
# thing counted twice. Either is a choice one can defend. They end at different policies, and their
# coefficients cannot be compared. `PPOConfig` takes the first with `kl_coef` and `kl_estimator`,
# the second with `kl_loss_coef` and `kl_loss_estimator`, where it refuses `kl` and `abs`:

# %%
try:
    PPOConfig(kl_loss_coef=0.1, kl_loss_estimator="kl")
except ValueError as error:
    print(error)

# %% [markdown]
# ## Break it: a KL below zero
#
# A single `kl` may be negative. Its *mean over many answers* may not, beyond noise. If it is, then
# the log-probabilities are not those of the policy that sampled. Call the distribution that really
# sampled $q$, the one whose log-probabilities are written down $p$, and the reference $r$:
#
# $$\mathbb{E}_{y \sim q} \left[ \log p(y) - \log r(y) \right] = KL(q, r) - KL(q, p)$$
#
# (Add and subtract $\log q(y)$.) With $q = p$ the second term is 0. With any mismatch it is
# subtracted, and if the samples are nearer to the reference than to what was written down, the
# result is negative. In the oracle, $q$ the reference and $p$ the policy halfway:

# %%
q, p, r = ref, half, ref
mean = (world.response_logprobs(q).exp() * costs("kl", p, r).sum(1)).sum()
explained = world.kl(q, r) - world.kl(q, p)
print(f"mean of kl {mean:.3f}, KL(q, r) - KL(q, p) = {explained:.3f}")
assert torch.isclose(mean, explained)

# %% [markdown]
# Now with the tiny GPT-2 and real prompts. In the first two of these mistakes whoever samples and
# the reference are the same, so the KL should be 0; in the third the policy has moved, so it should
# be positive:
#
# 1. **Position ids.** The policy's log-probabilities come from a forward pass that forgot them, so
#    left padding moved every token away from the place where the model learned to read it.
# 2. **Temperature.** Answers are sampled at 0.5 and the reference divides its logits by 0.5 as
#    well, the policy's forward pass does not.
# 3. **Top-k.** Only the 5 likeliest tokens may be sampled, but the log-probabilities are those of
#    all tokens. This policy has become flatter than its reference (its logits divided by 1.3).
#
# `Sampler` stands between a model and the sampling and changes its logits.

# %%
from minippo import Policy, encode_prompt, generate, left_pad, load_tokenizer, response_logits
from minippo.checks import mine
from minippo.worlds.tinyhh.rows import prompt_rows

response_mask = mine("response_mask")  # of notebook 03
tokenizer, sft = load_tokenizer("sft"), Policy.from_pretrained("sft")
rows = prompt_rows("validation", 100)
prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
prompts = [prompt for prompt in prompts if len(prompt) <= 64]
query, query_mask = left_pad(prompts, tokenizer.pad_token_id)
print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {query.shape[1]} tokens")


# %%
class Sampler(torch.nn.Module):
    """Divides the logits of a model by `temperature`; keeps only the `k` largest if k is given."""

    def __init__(self, model, temperature=1.0, k=None):
        super().__init__()
        self.model, self.temperature, self.k = model, temperature, k

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = output.logits / self.temperature
        if self.k is not None:
            least = output.logits.topk(self.k).values[..., -1:]
            output.logits = output.logits.masked_fill(output.logits < least, -torch.inf)
        return output


# %%
def sample(model):
    """response (B, R) and mask (B, R): one answer to each prompt."""
    ids = tokenizer.eos_token_id, tokenizer.pad_token_id
    response = generate(model, query, query_mask, 48, *ids, seed=1)
    return response, response_mask(response, ids[0])


@torch.no_grad()
def token_table(model, response, mask, forget_positions=False):
    """Log-probabilities (B, R, V) of every token at each place of the responses."""
    tokens, seen = torch.cat([query, response], 1), torch.cat([query_mask, mask], 1)
    if forget_positions:
        logits = model(input_ids=tokens, attention_mask=seen.long()).logits
        logits = logits[:, query.shape[1] - 1 : -1]
    else:
        logits = response_logits(model, tokens, seen, response.shape[1])
    return logits.log_softmax(-1)


# %% [markdown]
# `measure` samples with `sampler`, writes down the `kl` of each answer as a training would, and
# beside it both terms of the identity, which `kl_full` sums over the vocabulary at the sampled
# places. The **standard error** says how far the two may be apart by luck, with so few answers.


# %%
def measure(sampler, policy, reference, **forgotten):
    """Means per answer: kl, the standard error, KL(q, r), KL(q, p)."""
    response, mask = sample(sampler)
    q, r = (token_table(model, response, mask) for model in (sampler, reference))
    p, chosen = token_table(policy, response, mask, **forgotten), response[..., None]
    logprobs, ref_logprobs = (x.gather(-1, chosen).squeeze(-1) for x in (p, r))
    terms = kl_k1(logprobs, ref_logprobs), kl_full(q, r), kl_full(q, p)
    kl, first, second = (term.masked_fill(~mask, 0).sum(1) for term in terms)
    error = (kl - first + second).std() / math.sqrt(len(kl))
    return [float(x) for x in (kl.mean(), error, first.mean(), second.mean())]


# %%
cool, flat, cut = Sampler(sft, 0.5), Sampler(sft, 1.3), Sampler(sft, 1.3, k=5)
cases = {
    "nothing wrong": measure(sft, sft, sft),
    "no position ids": measure(sft, sft, sft, forget_positions=True),
    "temperature forgotten": measure(cool, sft, cool),
    "flatter, no top-k": measure(flat, flat, sft),
    "flatter, top-k 5": measure(cut, flat, sft),
}
print("nats per answer             kl   error   KL(q, r)  KL(q, p)  difference")
for name, (kl, error, first, second) in cases.items():
    print(f"{name:22s} {kl:+7.3f} {error:7.3f} {first:10.3f} {second:9.3f} {first - second:+11.3f}")

# %%
for kl, error, first, second in cases.values():
    assert abs(kl - (first - second)) < 3 * error + 1e-4
wrong = [cases[name][0] for name in cases if name not in ("nothing wrong", "flatter, no top-k")]
assert abs(cases["nothing wrong"][0]) < 1e-4 < 0.1 < cases["flatter, no top-k"][0]
assert max(wrong) < -0.1 and min(wrong) > -1.5
print(f"each mistake made the mean KL negative: {', '.join(f'{x:.2f}' for x in wrong)}")

# %% [markdown]
# The first column is what a log would show, the last what the identity predicts. They agree within
# three standard errors. Nothing crashed, and what a log would show is less than a nat per answer.
#
# Why is it worse than a wrong number in a log? It is in the reward. A negative KL *pays* the
# policy, and what it is paid for is the mismatch. **Rule:** before the first update policy and
# reference are the same, so the mean KL is 0 up to rounding, not just small. Look at that number
# first. It finds forward passes that differ, as in 1 and 2. It does not find a sampler that differs
# from both, as in 3: with $p = r$ the identity gives 0 for every $q$. For that, compare the
# log-probabilities with those that the sampler itself used.
#
# ## Exercise 6: `adapt_kl_coef`
#
# Difficulty 2 of 5 · importance 3 of 5 · 5 minutes
#
# How large should $\beta$ be? Often it is easier to say how far the policy may go, in nats. An
# adaptive controller then moves $\beta$ after every rollout:
#
# $$e = \mathrm{clip}\left(\frac{KL}{target} - 1,\; -0.2,\; 0.2\right), \qquad
# \beta' = \beta \left(1 + e \, \frac{B}{horizon}\right)$$
#
# $B$ is the number of answers in the rollout. The **horizon** says over how many answers $\beta$
# reacts. All arguments are plain Python numbers here.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Too much KL must make $\beta$ larger. By how much at most, with $B = horizon$?
#
# </details>
# <details><summary>Hint 2: the tool</summary>
#
# Clipping a number: `min(max(error, -0.2), 0.2)`.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# The error is `kl_per_sequence / target_kl - 1`, clipped; the new coefficient is the old one times
# one plus error times `batch_size / horizon`.
#
# </details>


# %%
def adapt_kl_coef(kl_coef, kl_per_sequence, target_kl, horizon, batch_size):
    """All numbers; returns the next kl_coef."""
    ### BEGIN SOLUTION
    error = min(max(kl_per_sequence / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * batch_size / horizon)
    ### END SOLUTION


# %%
from minippo.checks import check_adapt_kl_coef

adapt_kl_coef = check_adapt_kl_coef(adapt_kl_coef)

# %% [markdown]
# **The unit.** This controller takes the KL *per sequence*: summed over the tokens of an answer,
# averaged over answers. Some projects feed it the mean *per token*. With answers of twenty tokens
# the two differ by a factor of twenty, and so do sensible targets. A target of 4 nats per answer,
# and the two ways to feed it:

# %%
for name, kl in (("per sequence", 6.0), ("per token", 6.0 / 20)):
    kl_coef = 0.1
    for _ in range(50):
        kl_coef = adapt_kl_coef(kl_coef, kl, target_kl=4.0, horizon=10_000, batch_size=512)
    print(f"answers at 6.0 nats, fed {name:12s}: kl_coef 0.1 -> {kl_coef:.3f}")
assert kl_coef < 0.1

# %% [markdown]
# The policy is too far away, and fed per token the controller sets it free.
#
# Fixed against adaptive, in the oracle's world. All three runs begin with the same $\beta$, which
# is too small. The second has a target of half a nat, the third one of 0.02, as if it were copied
# from a project that counts per token.

# %% tags=["nbval-ignore-output"]
slow = dict(steps=60, lr=0.1, value_lr=0.1, ppo_epochs=2, kl_coef=0.4, kl_horizon=400)
runs = {
    "fixed": dict(),
    "target 0.5": dict(target_kl=0.5),
    "target 0.02": dict(target_kl=0.02),
}
histories = {name: train(**slow, **settings)[1] for name, settings in runs.items()}
figure, axes = plt.subplots(1, 2, figsize=(10.8, 3.2), layout="constrained")
for name, history in histories.items():
    axes[0].plot([row["objective/kl_per_sequence"] for row in history], label=name)
    axes[1].plot([row["objective/kl_coef"] for row in history], label=name)
axes[0].set(xlabel="step", ylabel="KL, nats per response", title="what the policy does")
axes[1].set(xlabel="step", ylabel="kl_coef", yscale="log", title="what the controller does")
axes[0].axhline(0.5, color="black", lw=0.8)
axes[0].legend(frameon=False)
plt.show()

# %% tags=["nbval-ignore-output"]
print("             KL: highest  at the end   kl_coef: least  most  at the end")
for name, history in histories.items():
    names = "objective/kl_per_sequence", "objective/kl_coef"
    kls, coefs = ([row[key] for row in history] for key in names)
    print(f"{name:12s} {max(kls):11.2f} {sum(kls[-10:]) / 10:11.2f} {min(coefs):16.2f}", end="")
    print(f" {max(coefs):5.2f} {coefs[-1]:11.2f}")

# %%
last = {name: history[-10:] for name, history in histories.items()}
reached = {n: sum(h["objective/kl_per_sequence"] for h in rows) / 10 for n, rows in last.items()}
peak = {n: max(row["objective/kl_coef"] for row in history) for n, history in histories.items()}
assert reached["fixed"] > 1.5 and peak["fixed"] == 0.4
assert 0.15 < reached["target 0.5"] < 1.0 and reached["target 0.02"] < 0.15
assert peak["target 0.02"] > 2 * peak["target 0.5"] > 6 * peak["fixed"]
print("fixed: stays far away; target 0.5: between 0.15 and 1; target 0.02: back at the reference")

# %% [markdown]
# Look at the run with the target of half a nat, the black line. Training begins at the reference,
# so at first the KL is below the target, and the controller halves $\beta$ just while the policy
# sets off. When the KL crosses the line, $\beta$ comes from too low, and each rollout of 192
# answers moves it by at most $0.2 \cdot 192 / 400$, about 10%: the KL goes to a multiple of the
# target. Then $\beta$ overshoots as well: it still grows while the KL is on its way down. After
# sixty steps the KL is about half the target and $\beta$ is still on its way back. In the third run
# $\beta$ grows until nothing is left of what was learned.
#
# ## Claims
#
# What the text says, asserted:

# %%
for policy in (near, best):
    exact_kl = float(world.kl(policy, ref))
    means = {name: exact_stats(name, policy, ref, policy)[0] for name in NAMES}
    assert all(math.isclose(means[name], exact_kl, rel_tol=1e-6) for name in ("kl", "k3", "full"))
    assert means["abs"] > 1.5 * exact_kl and means["mse"] < 0.995 * exact_kl
    print({name: round(mean / exact_kl, 3) for name, mean in means.items()})
assert exact_stats("abs", near, ref, near)[0] > 10 * world.kl(near, ref)
assert math.isclose(exact_stats("kl", best, ref, ref)[0], -world.kl(ref, best), rel_tol=1e-6)
assert min(exact_stats("kl", policy, ref, policy)[4] for policy in (near, best)) > 0.15

# %% [markdown]
# ## Quiz
#
# 1. The log shows `kl` of one answer as $-0.8$. Is something broken?
# 2. The log shows a *mean* KL of $-0.8$ over 512 answers. Is something broken?
# 3. `k3` is unbiased and never negative. Why is it not the default in the reward?
# 4. Why does `kl` as a loss do nothing?
# 5. You copy `target_kl=0.1` from another project and the policy stops learning. What do you check?
#
# <details><summary>Answers</summary>
#
# 1. No. One sample of `kl` may be negative; it says that the reference likes this answer more than
#    the policy does.
# 2. Almost surely. The mean over answers of the policy is a KL, and the noise of 512 answers is
#    small. The log-probabilities do not belong to the distribution that sampled: temperature,
#    top-k, position ids, dropout.
# 3. A reward is never differentiated; what matters is the gradient of its *mean*, through what is
#    sampled. Only `kl` in the reward has the gradient of $KL(\pi, \pi_{ref})$. `k3` has another one
#    and leads elsewhere, and far from the reference its tail is huge.
# 4. Its gradient at a sampled token is $\nabla \log \pi$ of that token, and the mean of that over
#    samples of $\pi$ is 0. What remains is noise.
# 5. The unit. There it may be nats per token; here it is nats per sequence.
#
# </details>
#
# **Next:** the rewards are there, one per token, and nearly all of them are tiny but the last.
# Which token deserves the credit? Values and advantages, in notebook 06. How many are solved here:

# %%
from minippo.checks import scored

scored()
