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
# # 07 · The PPO losses: ratio, clip, value clip, and their sum
#
# **Promise.** You write the two losses that PPO minimises, draw what the clip does in each of its
# six cases, check the gradient against the exact one, and see what happens when a rollout is used
# for too long. **Needs.** Notebooks 05 and 06: log-probabilities, the KL, advantages and returns.
# **Time.** 60 minutes, of which the computer needs less than one. Two exercises.
#
# ## The question
#
# Notebook 06 ended with a number for each token of an answer: its **advantage** $\hat A_t$, how
# much better the answer went on from there than the critic expected. Tokens with a positive one
# shall become more likely, tokens with a negative one less likely.
#
# Sampling answers is the expensive part of PPO. So each **rollout** (a batch of answers, with all
# that the models said about them) is used for several steps of gradient descent. After the first
# step the policy is no longer the one that sampled. **How far can a policy move on answers that an
# older version of it gave, and what keeps it from going further?**

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from minippo.plots import COLOURS, STYLES

# %% [markdown]
# ## The formula
#
# $$\rho_t = \frac{\pi(y_t \mid x, y_{<t})}{\pi_{old}(y_t \mid x, y_{<t})}
# \qquad
# L_{policy} = \operatorname{mean}_t \max\bigl(-\hat A_t \rho_t,\;
# -\hat A_t \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)\bigr)$$
#
# $$L_{value} = \tfrac12 \operatorname{mean}_t \max\bigl((V_t - G_t)^2,\;
# (\operatorname{clip}(V_t, V^{old}_t \pm \epsilon_V) - G_t)^2\bigr)$$
#
# $$L_{PPO} = L_{policy} + c_1 L_{value} + c_2 L_{KL}$$
#
# | symbol | variable | shape | function |
# |---|---|---|---|
# | $\log \pi(y_t \mid x, y_{<t})$, now | `logprobs` | `(B, R)` | `gather_logprobs` |
# | $\log \pi_{old}$, in the rollout | `old_logprobs` | `(B, R)` | `Rollout.logprobs` |
# | $\rho_t$, the **ratio** | `ratio` | `(B, R)` | inside `policy_loss` |
# | $\hat A_t$, $G_t$ (the **return**) | `advantages`, `returns` | `(B, R)` | `gae` |
# | $V_t$ now, $V^{old}_t$ | `values`, `old_values` | `(B, R)` | `ValueModel` |
# | does the token count? | `mask` | `(B, R)` bool | `response_mask` |
# | $\epsilon$, $\epsilon_V$ | `clip_range`, `value_clip_range` | numbers | `PPOConfig`, both 0.2 |
# | $L_{policy}$, $L_{value}$ | `loss` | `()` | `policy_loss`, `value_loss` |
# | $L_{KL}$, policy against reference | `kl_loss` | `()` | `masked_mean` of `kl_full` |
# | $c_1$, $c_2$ | `vf_coef`, `kl_loss_coef` | numbers | `PPOConfig`, 1 and 0 |
# | $L_{PPO}$ | | `()` | `ppo_objective` |
#
# $\operatorname{clip}(z, a, b)$ is $z$, but at least $a$ and at most $b$. All means are over the
# tokens that count. Three policies occur in this course. Do not mix them up: $\pi$ is being
# trained, $\pi_{old}$ is the same network when the rollout was made, and $\pi_{ref}$ is the SFT
# model, which never changes. The ratio compares with *old*, the KL with *ref*.
#
# ## By hand
#
# Two answers, five tokens that count, $\epsilon = 0.2$. The last position of the second answer is
# padding; what stands there is an accident.
#
# ```text
# ratio       1.0   0.5   1.5       advantage    1    -1     2       mask   1  1  1
#             1.1   0.5   9.0                   -1     1     9              1  1  0
#
# -A ratio            -1.0   0.5  -3.0           -A clip(ratio)     -1.0   0.8  -2.4
#                      1.1  -0.5                                     1.1  -0.8
#
# the larger one      -1.0   0.8  -2.4
#                      1.1  -0.5
# ```
#
# The sum is $-2.0$, the loss $-2.0 / 5 = -0.4$. In two of five tokens the clipped term was chosen:
# the second and the third of the first answer. This share is called `clip_frac`, here 0.4.

# %%
ratio = torch.tensor([[1.0, 0.5, 1.5], [1.1, 0.5, 9.0]])
advantages = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 1.0, 9.0]])
mask = torch.tensor([[True, True, True], [True, True, False]])
chosen = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
print(chosen)
print(f"loss {chosen[mask].mean():.3f}")
assert torch.isclose(chosen[mask].mean(), torch.tensor(-0.4))

# %% [markdown]
# ## Exercise 1: `policy_loss`
#
# Difficulty 3 of 5 · importance 5 of 5 · 15 to 20 minutes
#
# The first formula, from log-probabilities. Return the loss and a dict of three numbers that one
# watches while training. They are masked means and carry no gradient (`.detach()`):
#
# - `"approx_kl"`: the KL of *old* against *now*, estimated by `kl_k3(old_logprobs, logprobs)`. The
#   old policy sampled, so it comes first.
# - `"clip_frac"`: the share of tokens in which the clipped term is strictly larger.
# - `"ratio"`: the mean ratio.
#
# NaN at a masked position must reach neither loss nor gradient: fill the three tensors with 0
# there before you compute with them.
#
# <details><summary>Hint 1: a nudge</summary>
#
# You have logarithms. The ratio of two numbers is the exponential of the difference of their
# logarithms.
#
# </details>
# <details><summary>Hint 2: the tools</summary>
#
# `ratio.clamp(low, high)` clips, `torch.maximum(a, b)` takes the larger one of each pair,
# `masked_mean(x, mask)` averages. A comparison gives bools; `.to(ratio.dtype)` makes 0 and 1.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `unclipped` is minus advantage times ratio, `clipped` is minus advantage times the clamped ratio.
# The loss is the masked mean of their maximum, `clip_frac` that of `clipped > unclipped`.
#
# </details>

# %%
from minippo.checks import mine

kl_k3, masked_mean = mine("kl_k3"), mine("masked_mean")  # of notebooks 05 and 01


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_range):
    """logprobs, old_logprobs, advantages, mask: (B, R) -> loss (), stats {name: ()}."""
    ### BEGIN SOLUTION
    both = logprobs, old_logprobs, advantages
    logprobs, old_logprobs, advantages = (x.masked_fill(~mask, 0) for x in both)
    ratio = (logprobs - old_logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    is_clipped = (clipped > unclipped).to(ratio.dtype)
    seen = {"approx_kl": kl_k3(old_logprobs, logprobs), "clip_frac": is_clipped, "ratio": ratio}
    stats = {name: masked_mean(x, mask).detach() for name, x in seen.items()}
    return masked_mean(torch.maximum(unclipped, clipped), mask), stats
    ### END SOLUTION


# %%
from minippo.checks import check_policy_loss

policy_loss = check_policy_loss(policy_loss)

# %%
loss, stats = policy_loss(ratio.log(), torch.zeros(2, 3), advantages, mask, 0.2)
print(f"loss {loss:.3f}", {name: round(value.item(), 3) for name, value in stats.items()})
assert torch.isclose(loss, torch.tensor(-0.4))
assert torch.isclose(stats["clip_frac"], torch.tensor(0.4))

# %% [markdown]
# ## The six cases of the clip
#
# The advantage has a sign, and the ratio is below, inside or above the range. That makes six cases.
# What matters is the gradient: it is what moves the policy.
#
# > **Predict.** In which of the six is the gradient zero?
#
# <details><summary>Answer</summary>
#
# In two: where the advantage is positive and the ratio above the range, and where it is negative
# and the ratio below. There the token has gone far enough in the direction in which it should.
#
# </details>


# %%
def loss_and_slope(ratio, advantage):
    """The loss of one token and its derivative with respect to the ratio."""
    ratio = torch.tensor([[ratio]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, _ = policy_loss(ratio.log(), 0 * one, advantage * one, one.bool(), 0.2)
    (slope,) = torch.autograd.grad(loss, ratio)
    return loss.item(), slope.item()


cases = [(r, a) for a in (1.0, -1.0) for r in (0.6, 1.05, 1.4)]
print("case  advantage  ratio    loss   slope")
for number, (r, a) in enumerate(cases, 1):
    loss, slope = loss_and_slope(r, a)
    print(f"{number:4d}  {a:+9.0f}  {r:5.2f}  {loss:+6.2f}  {slope + 0.0:+6.2f}")

# %% [markdown]
# It is zero in cases 3 and 4 only. In words:
#
# | case | the token is | it has become | so |
# |---|---|---|---|
# | 1 | good | much less likely | it is pushed up: a mistake must be mended |
# | 2 | good | about as likely as before | it is pushed up |
# | 3 | good | much more likely | enough; no gradient until the next rollout |
# | 4 | bad | much less likely | enough; no gradient until the next rollout |
# | 5 | bad | about as likely as before | it is pushed down |
# | 6 | bad | much more likely | it is pushed down: a mistake must be mended |
#
# Taking the *larger* loss makes this happen. The clip alone would stop cases 1 and 6 too, and a
# token that went the wrong way would never come back. Taking the *smaller* loss would stop only
# cases 1 and 6: the worst of both.

# %% tags=["nbval-ignore-output"]
grid = torch.linspace(0.3, 1.8, 301)
figure, panels = plt.subplots(1, 2, figsize=(10.8, 3.2), layout="constrained")
for axis, sign, first in zip(panels, (1.0, -1.0), (1, 4)):
    axis.plot(grid, [loss_and_slope(r.item(), sign)[0] for r in grid], lw=2.2, label="clipped")
    axis.plot(grid, -sign * grid, lw=1, label="unclipped")
    axis.axvspan(0.8, 1.2, color="0.92", zorder=0)
    for number, place in zip(range(first, first + 3), (0.55, 1.0, 1.5)):
        y = loss_and_slope(place, sign)[0]
        axis.text(place, y + 0.12, f"case {number}", ha="center")
    axis.set(xlabel="ratio", ylabel="loss of the token", title=f"advantage {sign:+.0f}")
    axis.legend(frameon=False, loc="upper right" if sign > 0 else "upper left")
plt.show()

# %%
flat = [n for n, (r, a) in enumerate(cases, 1) if loss_and_slope(r, a)[1] == 0]
print("cases without a gradient:", flat)
assert flat == [3, 4]

# %% [markdown]
# Grey is the range from 0.8 to 1.2. The loss is flat to the right of it for a good token, to the
# left of it for a bad one. Note what the clip is not: it does not hold the ratio inside the range.
# It stops pushing once the ratio is outside. Other tokens, and the momentum of the optimizer, may
# carry it on.
#
# ## The gradient, against the exact one
#
# At the first step $\pi = \pi_{old}$, every ratio is 1, and nothing is clipped. The gradient of
# $-\hat A_t \rho_t$ is $-\hat A_t \rho_t \nabla \log \pi$, at $\rho_t = 1$ just
# $-\hat A_t \nabla \log \pi$: the policy gradient of REINFORCE, by which the expected reward rises.
#
# Is that so? The **oracle** of notebook 05 is a world in which all 85 answers are listed. There the
# objective
#
# $$J = E_y\left[r(y) - \beta \log \frac{\pi(y)}{\pi_{ref}(y)}\right]$$
#
# is a finite sum, and autograd gives its exact gradient. We give your loss each answer once,
# weighted by its probability, with the exact advantages.

# %%
from minippo import response_logits
from minippo.worlds.oracle import TabularPolicy, TabularValue, feelings_world

gather_logprobs = mine("gather_logprobs")  # of notebook 03
world, ref = feelings_world()
beta = 0.5
generator = torch.Generator().manual_seed(0)
oracle_policy = TabularPolicy(world, ref + 0.3 * torch.randn(ref.shape, generator=generator))


def table_logprobs(model, samples):
    """(B, R): what a model says of the tokens of some answers."""
    length = samples.response.shape[1]
    logits = response_logits(model, samples.tokens, samples.attention_mask, length)
    return gather_logprobs(logits, samples.response)


# %%
logprobs = table_logprobs(oracle_policy, world)
with torch.no_grad():
    logprobs_all = world.logprobs_all(oracle_policy)
    probability = world.response_logprobs(logprobs_all).exp()
    exact_values, _, exact = world.values(logprobs_all, ref, beta)
    exact_advantages = exact[world.before, world.response].masked_fill(~world.mask, 0)
print(len(probability), f"answers; their probabilities add up to {probability.sum():.4f}")

# %%
total = 0.0
for y, row in enumerate(world.mask):
    one = logprobs[y : y + 1], exact_advantages[y : y + 1], world.mask[y : y + 1]
    loss, _ = policy_loss(one[0], one[0].detach(), one[1], one[2], 0.2)
    total = total + probability[y] * row.sum() * loss  # a sum over tokens, not their mean

(found,) = torch.autograd.grad(total, oracle_policy.logits)
(rising,) = world.gradient(oracle_policy, ref, beta)
error, size = (found + rising).abs().max().item(), rising.abs().max().item()
print(f"gradient of J: largest entry {size:.3f}")
print(f"gradient of your loss plus gradient of J: largest entry {error:.6f}")
assert error < 1e-5 < size

# %% [markdown]
# The gradient of the loss is *minus* the gradient of $J$: going down in the one is going up in the
# other. The note prints $L_{policy} = E[\min(\ldots)]$ without the sign; that is the objective, to
# be maximised, and the loss is its negative.
#
# ## Ratio 1 at the first step, and why not later
#
# Now the tiny GPT-2. One rollout of 32 answers, and four steps on it.

# %%
from minippo import (
    Policy,
    PPOConfig,
    RewardModel,
    ValueModel,
    collect_rollout,
    encode_prompt,
    frozen_copy,
    load_tokenizer,
)
from minippo.worlds.tinyhh.rows import prompt_rows

tokenizer, policy = load_tokenizer("sft"), Policy.from_pretrained("sft")
ref_policy, value_model = frozen_copy(policy), ValueModel.from_pretrained("value")
reward_model = frozen_copy(RewardModel.from_pretrained("reward"))
rows = prompt_rows("ppo", 32)
prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
print(len(prompts), "prompts, the first:", rows[0]["instruction"])

# %%
models = policy, ref_policy, value_model, reward_model
score_stats = reward_model.mean, reward_model.std
rollout = collect_rollout(*models, prompts, tokenizer, PPOConfig(), score_stats=score_stats)
print(tuple(rollout.mask.shape), "of which count", int(rollout.mask.sum()))


# %%
@torch.no_grad()
def log_ratios():
    return (table_logprobs(policy, rollout) - rollout.logprobs)[rollout.mask]


print(f"largest |log ratio| before any step: {log_ratios().abs().max():.4f}")
assert log_ratios().abs().max() < 1e-4

# %%
from minippo import adamw, optimizer_step

optimizer, history = adamw({"policy": policy}, {"policy": 3e-4}), [log_ratios().exp()]
print("step    loss  mean ratio  smallest  largest  clip_frac  approx_kl")
for step in range(4):
    now = table_logprobs(policy, rollout)
    loss, stats = policy_loss(now, rollout.logprobs, rollout.advantages, rollout.mask, 0.2)
    loss.backward()
    optimizer_step(optimizer, max_grad_norm=1.0)
    low, high = history[-1].min().item(), history[-1].max().item()
    line = f"{step:4d} {loss.item():+z7.3f} {stats['ratio']:11.3f} {low:9.3f} {high:8.1f}"
    print(f"{line} {stats['clip_frac']:10.3f} {stats['approx_kl']:10.3f}")
    history.append(log_ratios().exp())

# %% [markdown]
# Three things to read off.
#
# - At step 0 all ratios are 1. The loss is 0, since whitened advantages have mean 0, but its
#   *gradient* is not. A loss of 0 says nothing here; do not watch it.
# - From step 1 on the policy has moved, the answers have not. So the ratios spread.
# - The mean ratio stays near 1, whatever the ratios do. Tokens were sampled from $\pi_{old}$, and
#   $\sum_a \pi_{old}(a) \, \pi(a) / \pi_{old}(a) = \sum_a \pi(a) = 1$. Watch the largest
#   $|\log \rho|$, `clip_frac` and `approx_kl` instead.

# %% tags=["nbval-ignore-output"]
figure, axis = plt.subplots(figsize=(10.8, 3.0), layout="constrained")
edges = torch.linspace(-1.5, 1.5, 61).exp()
for step, seen in list(enumerate(history))[1:4]:
    look = {"color": COLOURS[step - 1], "linestyle": STYLES[step - 1], "lw": 1.8}
    axis.hist(seen.clamp(edges[0], edges[-1]), edges, histtype="step", label=f"step {step}", **look)
axis.axvspan(0.8, 1.2, color="0.92", zorder=0)
axis.set(xscale="log", yscale="log", xlabel="ratio", ylabel="tokens")
axis.set_title("ratios before steps 1, 2, 3; before step 0 all are 1")
inner = [0.4, 0.6, 0.8, 1, 1.2, 1.5, 2, 3]
ends = [f"{edges[0]:.2f}\nor less", f"{edges[-1]:.2f}\nor more"]
axis.set_xticks([edges[0], *inner, edges[-1]], [ends[0], *map(str, inner), ends[1]])
axis.minorticks_off()
axis.legend(frameon=False)
plt.show()

# %%
outside = [((seen - 1).abs() > 0.2).double().mean().item() for seen in history]
print("share of ratios outside 0.8 to 1.2:", [f"{share:.3f}" for share in outside])
assert outside[0] == 0 and outside[1] < outside[4] and outside[4] > 0.05

# %% [markdown]
# Compare with `clip_frac` in the table. It cannot be larger, for it counts cases 3 and 4 alone. It
# is hardly smaller, since nearly all tokens that left the range went the way they were pushed.
# Which tokens moved most?

# %%
moved = log_ratios()
order = moved.argsort()
words, goodness = rollout.response[rollout.mask], rollout.advantages[rollout.mask]
before = rollout.logprobs[rollout.mask].exp()
print(" ratio  advantage  probability before")
for index in [*order[:4].tolist(), *order[-4:].tolist()]:
    word = repr(tokenizer.decode([words[index]]))
    print(f"{moved[index].exp():6.3f}  {goodness[index]:+9.1f}  {before[index]:18.4f}  {word}")

# %% [markdown]
# Each moved the way its advantage points: the four that fell are bad, the four that rose are good.
# And the three that moved most had been unlikely. A step of the logits can change the probability
# of a rare token by a large factor; a token that was sure to come can hardly rise. So the end of
# one answer, at first a matter of 1 in 370, is 18 times as likely after four steps.
#
# The note's ratio is that of a whole *answer*: the product of the ratios of its tokens. One token
# that moved far takes the answer along, and so do many small moves:

# %%
each = (table_logprobs(policy, rollout).detach() - rollout.logprobs).masked_fill(~rollout.mask, 0)
ratios = {"tokens": each[rollout.mask].exp(), "whole answers": each.sum(1).exp()}
for name, seen in ratios.items():
    away = ((seen - 1).abs() > 0.2).double().mean()
    print(f"{name:13s} smallest {seen.min():.4f}  largest {seen.max():8.1f}  outside {away:.0%}")

# %% [markdown]
# One token in nine has left the range, and nine answers in ten. Wherever that is the side to which
# the advantage points, the whole answer would be stopped, with all its tokens. So the ratio is
# taken token by token, and clipped token by token.
#
# ## Why stop at all? What a rollout promises, and what it keeps
#
# In the oracle's world we can afford to do it badly: 60 steps on one rollout, with the clip and
# without. At each step two numbers, both as means over six rollouts:
#
# - what the rollout **promises**: the sum of $(\rho_t - 1) \hat A_t$ per answer, the gain that the
#   unclipped objective claims;
# - what is **true**: the gain in $J$, computed exactly.
#
# We do it with rollouts of 4 answers and of 16.
#
# > **Predict.** Which of the two sizes needs the clip more?
#
# <details><summary>Answer</summary>
#
# Four answers. They say less about all the others, so a policy that believes them is misled more.
#
# </details>

# %%
settings = dict(kl_coef=beta, lam=1.0, whiten_advantages=False, missing_eos_penalty=0.0)
oracle_config = PPOConfig(**settings, max_response_tokens=world.length)
start, critic = TabularPolicy(world, ref), TabularValue(world)
start_values, _, _ = world.values(ref, ref, beta)
critic.values.data = start_values.clone()
most = world.objective(world.optimum(ref, beta)[0], ref, beta) - start_values[0]
print(f"J of the reference {start_values[0]:.3f}, which is its value at the start of an answer")
print(f"the best policy gains {most:.2f}")


# %%
def oracle_rollout(seed, size):
    models = start, start, critic, world.score_fn
    return collect_rollout(*models, world.prompts(size), world, oracle_config, seed=seed)


@torch.no_grad()
def true_gain(model):
    """J of a policy minus J of the reference, exactly."""
    now, before = (world.objective(world.logprobs_all(m), ref, beta) for m in (model, start))
    return now - before


# %%
def use_up(rollout, loss_fn, steps=60):
    """Many steps on one rollout: promised gain (steps,), true gain (steps,), the policy."""
    model, promised, true = TabularPolicy(world, ref), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    old, good, mask = rollout.logprobs, rollout.advantages, rollout.mask
    for _ in range(steps):
        logprobs = table_logprobs(model, rollout)
        promise = ((logprobs - old).exp() - 1) * good
        promised.append(promise.detach().masked_fill(~mask, 0).sum() / len(mask))
        true.append(true_gain(model))
        loss_fn(logprobs, old, good, mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(promised), torch.stack(true), model


# %%
def averaged(loss_fn, size, seeds=6):
    """Promised and true gain (2, steps), and KL(old, new), as means over rollouts of some size."""
    runs = [use_up(oracle_rollout(seed, size), loss_fn) for seed in range(seeds)]
    with torch.no_grad():
        moved = [world.kl(ref, world.logprobs_all(model)).item() for _, _, model in runs]
    return torch.stack([torch.stack(run[:2]) for run in runs]).mean(0), sum(moved) / seeds


# %%
losses = {
    "clip_range 0.2": lambda *rollout: policy_loss(*rollout, 0.2)[0],
    "no clip": lambda *rollout: policy_loss(*rollout, math.inf)[0],
}
gains = {(size, name): averaged(losses[name], size) for size in (4, 16) for name in losses}
print("answers  loss            promised  true: best  at the end  KL(old, new)")
for (size, name), ((promised, true), moved) in gains.items():
    truth = f"{true.max():10.2f}  {true[-1]:10.2f}"
    print(f"{size:7d}  {name:14s}  {promised[-1]:8.2f}  {truth}  {moved:12.2f}")

# %% tags=["nbval-ignore-output"]
figure, panels = plt.subplots(1, 2, figsize=(10.8, 3.0), layout="constrained", sharey=True)
for axis, name in zip(panels, losses):
    promised, true = gains[4, name][0]
    axis.plot(promised, lw=1.8, label="promised by the rollout")
    axis.plot(true, lw=1.8, label="true gain in J")
    axis.set(xlabel="step on the same rollout", ylabel="gain over the start")
    axis.set_title(f"{name}, rollouts of 4 answers")
    axis.grid()
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Both runs promise much more than they keep. Without the clip the policy learns its four answers by
# heart: the promise grows, and of the true gain hardly anything is left. With the clip it stops
# early and keeps what it had by then.
#
# The clip is caution, not a better way up. From sixteen answers there is more to learn, and there
# the run without it gains more at its best, and at the end as much as the clipped one. It is only
# much further away, at 7 nats where the clipped one is at 0.4. Outside an oracle nobody knows where
# the best step was, or whether the rollout was large enough. So PPO takes the small gain that is
# sure, and the next rollout tells the truth again.
#
# ## Exercise 2: `value_loss`
#
# Difficulty 2 of 5 · importance 4 of 5 · 10 minutes
#
# The critic shall predict the return. Its loss is half the squared error, and it has a clip too:
# a value that has moved by more than $\epsilon_V$ towards its return is left alone until the next
# rollout. Again the larger one counts. By hand, with old value 1 and $\epsilon_V = 0.2$:
#
# ```text
# value   return   error²   clipped value   its error²   larger   gradient of half of it
# 1.0     3.0      4.00     1.0             4.00         4.00     1.0 - 3.0 = -2
# 2.0     3.0      1.00     1.2             3.24         3.24     0: far enough
# 2.0     0.0      4.00     1.2             1.44         4.00     2.0 - 0.0 = +2
# ```
#
# Half the mean is $\frac12 (4 + 3.24 + 4) / 3 = 1.873$. Return the loss and two detached numbers:
# `"clip_frac"`, the share of tokens whose clipped error is strictly larger, and `"error"`, the
# masked mean of the plain squared error.
#
# <details><summary>Hint 1: a nudge</summary>
#
# The same shape as exercise 1: two versions, the larger one per token, a masked mean. What is
# clipped is the value, not a ratio.
#
# </details>
# <details><summary>Hint 2: the tool</summary>
#
# `values.clamp(low, high)` takes tensors as limits too. Fill masked positions with 0 first, in
# `values`, `old_values` and `returns`.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `clipped = values.clamp(old_values - clip_range, old_values + clip_range)`. Square both errors,
# take `torch.maximum`, then the masked mean, then half of it.
#
# </details>


# %%
def value_loss(values, old_values, returns, mask, clip_range):
    """values, old_values, returns, mask: (B, R) -> loss (), stats {name: ()}."""
    ### BEGIN SOLUTION
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    is_clipped = (clipped_error > error).to(error.dtype)
    seen = {"clip_frac": is_clipped, "error": error}
    stats = {name: masked_mean(x, mask).detach() for name, x in seen.items()}
    return 0.5 * masked_mean(torch.maximum(error, clipped_error), mask), stats
    ### END SOLUTION


# %%
from minippo.checks import check_value_loss

value_loss = check_value_loss(value_loss)

# %%
values = torch.tensor([[1.0, 2.0, 2.0]], requires_grad=True)
returns, all_count = torch.tensor([[3.0, 3.0, 0.0]]), torch.ones(1, 3).bool()
loss, stats = value_loss(values, torch.ones(1, 3), returns, all_count, 0.2)
(slopes,) = torch.autograd.grad(3 * loss, values)
print(f"loss {loss:.3f}, clip_frac {stats['clip_frac']:.3f}, 3 x gradient {slopes.tolist()}")
assert torch.isclose(loss, torch.tensor(11.24 / 6))
assert slopes.tolist() == [[-2.0, 0.0, 2.0]]

# %% [markdown]
# The value clip has a price as well. It is an absolute distance, so it depends on the scale of the
# rewards. A critic that starts at 0 while the returns are 3 has its gradient taken away in each
# rollout as soon as it has moved by 0.2:


# %%
def critic_after(rollouts, clip_range, steps=10):
    """One value, returns of 3, a few steps on each rollout; the value after each rollout."""
    value, path = nn.Parameter(torch.zeros(1, 1)), [0.0]
    optimizer = torch.optim.SGD([value], lr=0.05)
    for _ in range(rollouts):
        old = value.detach().clone()
        for _ in range(steps):
            optimizer.zero_grad()
            loss, _ = value_loss(value, old, torch.full((1, 1), 3.0), all_count[:, :1], clip_range)
            loss.backward()
            optimizer.step()
        path.append(value.item())
    return path


# %%
paths = {clip: critic_after(12, clip) for clip in (0.2, math.inf)}
for clip, path in paths.items():
    print(f"clip_range {clip}: after 1, 4 and 12 rollouts", [f"{path[n]:.2f}" for n in (1, 4, 12)])

# %% tags=["nbval-ignore-output"]
figure, panels = plt.subplots(1, 2, figsize=(10.8, 3.0), layout="constrained")
grid = torch.linspace(0, 3.5, 141)
one, aim = torch.ones(1, 1), torch.full((1, 1), 3.0)
squares = [value_loss(v.view(1, 1), one, aim, one.bool(), 0.2)[0] for v in grid]
panels[0].plot(grid, squares, lw=2.2, label="clipped")
panels[0].plot(grid, (grid - 3).square() / 2, lw=1, label="unclipped")
panels[0].axvspan(0.8, 1.2, color="0.92", zorder=0)
panels[0].set(xlabel="value now (old value 1, return 3)", ylabel="loss", title="the value clip")
for clip, path in paths.items():
    panels[1].plot(path, lw=1.8, marker="o", ms=3, label=f"clip_range {clip}")
panels[1].set(xlabel="rollout", ylabel="value", title="a critic that starts at 0, returns of 3")
for axis in panels:
    axis.legend(frameon=False)
plt.show()

# %%
slow, fast = paths[0.2][4], paths[math.inf][4]
print(f"after four rollouts: {slow:.2f} with the clip, {fast:.2f} without")
assert slow < fast - 0.5 and paths[0.2][12] > slow

# %% [markdown]
# So scores are standardised before PPO, to a spread of 1, and the critic is warmed up (notebook
# 06): then 0.2 is a fair share of what is left to learn. Where neither is done, widen
# `value_clip_range`.
#
# ## The sum
#
# $$L_{PPO} = L_{policy} + c_1 L_{value} + c_2 L_{KL}$$
#
# The gradient of each term, for one token, where it is not clipped:
#
# | term | with respect to | gradient |
# |---|---|---|
# | $L_{policy}$ | $\log \pi(y_t)$ | $-\hat A_t \rho_t$ |
# | $L_{policy}$ | the logit of token $a$ | $-\hat A_t \rho_t (\mathbb 1[a = y_t] - \pi(a))$ |
# | $L_{value}$ | $V_t$ | $V_t - G_t$ |
# | $L_{KL}$ (`full`) | the logit of token $a$ | $\pi(a) (\log \frac{\pi(a)}{\pi_{ref}(a)} - KL)$ |
#
# Autograd agrees on those of a logit:

# %%
from minippo import ppo_objective

kl_full = mine("kl_full")  # of notebook 05
logits = torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
old, reference = torch.tensor([0.6, 0.0, -1.0]).log_softmax(0), torch.zeros(3).log_softmax(0)
now, one = logits.log_softmax(0), all_count[:, :1]
policy_term, _ = policy_loss(now[:1][None], old[:1][None], torch.full((1, 1), 2.0), one, 0.2)
kl_term = kl_full(now.view(1, 1, 3), reference.view(1, 1, 3)).squeeze()
print(f"policy loss {policy_term.item():.3f}, KL {kl_term.item():.3f}")

# %%
p, rho = now.detach().exp(), (now[0] - old[0]).exp().detach()
by_formula = -2.0 * rho * (torch.tensor([1.0, 0.0, 0.0]) - p), p * (p.log() - reference - kl_term)
for name, term, wanted in zip(("policy", "KL"), (policy_term, kl_term), by_formula):
    (found,) = torch.autograd.grad(term, logits, retain_graph=True)
    print(f"{name:6s} autograd {found}  formula {wanted.detach()}")
    assert torch.allclose(found, wanted, atol=1e-6)

# %% [markdown]
# ## $c_1$: when it does nothing, and when it does
#
# The policy loss has no gradient for the critic, the value loss none for the policy. So if the two
# share no weights, $c_1$ only scales the gradient of the critic. And Adam divides each gradient by
# its own size: ten times the gradient makes the same step.
#
# Is that so, and what of other set-ups? Three steps on half of the rollout with the real policy and
# the real critic, in four ways:
#
# - with Adam, as in minippo, but without its clips of values and norms: only $c_1$ shall differ;
# - with plain gradient descent (SGD);
# - with SGD, where one norm of *all* gradients is clipped, policy's and critic's together;
# - with Adam, where both share a **trunk**: one network, whose last layer feeds the policy's logits
#   and a critic's head. The formula comes from that time. (The head was trained on another trunk,
#   so its first values are off; a trained one would pull less.)
#
# Each with $c_1$ = 0.1, 1 and 10. "Moves" is the mean size of the change of a log-probability or a
# value. "Off" compares all changes with those at $c_1 = 1$: the length of the difference, divided
# by the length of the latter; 0% means the same change.
#
# > **Predict.** In which of the four does $c_1$ change what the *policy* does?
#
# <details><summary>Answer</summary>
#
# In the last two. Elsewhere no gradient of the value loss, and nothing computed from one, reaches a
# weight of the policy.
#
# </details>


# %%
half = rollout.rows(slice(16))
print("answers:", len(half.mask), "· tokens that count:", int(half.mask.sum()))


# %%
def moves(c1, optimizer_of, one_norm=math.inf, shared=False):
    """What three steps change: log-probabilities and values of the tokens that count."""
    policy, critic = Policy.from_pretrained("sft"), ValueModel.from_pretrained("value")
    if shared:
        critic.classifier.transformer = policy.transformer
    weights = list(dict.fromkeys([*policy.parameters(), *critic.parameters()]))  # each once
    optimizer, path = optimizer_of(weights), []
    seen, mask = (half.tokens, half.attention_mask, half.mask.shape[1]), half.mask
    for _ in range(4):  # what is seen before each step; the fourth step is not seen
        logprobs, values = table_logprobs(policy, half), critic(*seen)
        path.append([x.detach()[mask] for x in (logprobs, values)])
        first, _ = policy_loss(logprobs, half.logprobs, half.advantages, mask, 0.2)
        second, _ = value_loss(values, half.values, half.returns, mask, math.inf)
        optimizer.zero_grad()
        ppo_objective(first, second, 0.0, vf_coef=c1, kl_loss_coef=0.0).backward()
        nn.utils.clip_grad_norm_(weights, one_norm)  # an infinite norm clips nothing
        optimizer.step()
    return [after - before for before, after in zip(path[0], path[-1])]


# %%
def adam(weights):
    return torch.optim.Adam(weights, lr=1e-4, eps=1e-5)


def sgd(weights):
    return torch.optim.SGD(weights, lr=1e-3)


ways = {
    "Adam": (adam,),
    "SGD": (sgd,),
    "SGD, one norm clipped": (sgd, 0.5),
    "Adam, shared trunk": (adam, math.inf, True),
}
found = {(name, c1): moves(c1, *way) for name, way in ways.items() for c1 in (0.1, 1.0, 10.0)}

# %%
off = {}
print("                         c1   policy moves   off c1 = 1   critic moves   off c1 = 1")
for (name, c1), changes in found.items():
    line = f"{name:22s} {c1:4.1f}"
    for kind, change, usual in zip(("policy", "critic"), changes, found[name, 1.0]):
        off[name, c1, kind] = ((change - usual).norm() / usual.norm()).item()
        line += f"{change.abs().mean():15.5f} {off[name, c1, kind]:12.0%}"
    print(line)
for c1 in (0.1, 10.0):
    assert max(off["Adam", c1, "policy"], off["SGD", c1, "policy"]) < 1e-6
assert off["Adam", 10.0, "critic"] < 0.1 < 0.5 < off["SGD", 0.1, "critic"]
assert min(off[name, 10.0, "policy"] for name in list(ways)[2:]) > 0.3

# %% [markdown]
# - **Separate critic.** The policy does the same to the last digit (within a rollout; the next one
#   has advantages from another critic). Under SGD $c_1$ is a factor of the critic's learning rate:
#   a tenth as far with 0.1, 7 times as far with 10, since the gradient shrinks on the way. Under
#   Adam, with 10, the critic moves 4% further; with 0.1, 16% less far: the gradient is then so
#   small that the `eps` in Adam's denominator counts. A hundred times the $c_1$, 23% more. This is
#   minippo's case, and the knob that works is the critic's learning rate, `value_lr`.
# - **One norm.** At 0.1 the limit is not reached, and both models move as far as under plain SGD.
#   At 1 the *policy* moves 27% as far, at 10 hardly: the value loss uses up the norm. minippo clips
#   each model's gradients on their own.
# - **A shared trunk.** Both losses pull at the same weights, and $c_1$ says how hard the second one
#   pulls: at 10 the policy moves 60% as far.

# %% [markdown]
# ## $c_2$: the KL as a term of the loss
#
# minippo has the KL in the reward (notebook 05) and $c_2 = 0$. With $c_2 > 0$ the third term pulls
# the policy back to the reference at every step. The smallest world that shows it: one token, three
# choices, a reference and an old policy that give each a third, advantages $1, 0, -1$. Nothing is
# clipped, so nothing else holds the policy. The three choices are a rollout of three rows, and the
# loss is $-\sum_a \pi(a) A(a) + c_2 KL(\pi, \pi_{ref})$. Its minimum is known on paper:
# $\pi(a) \propto \pi_{ref}(a) \exp(A(a) / c_2)$.
#
# We also try the KL as the note prints it, $\sum_a \pi_{ref}(a) \log(\pi(a) / \pi_{ref}(a))$, with
# the weights of the *reference*.

# %%
third = torch.full((3,), 1 / 3).log()
three_good, three = torch.tensor([[1.0], [0.0], [-1.0]]), torch.ones(3, 1).bool()


def full_kl(now):
    """KL of three log-probabilities from those of the reference."""
    return kl_full(now.view(1, 1, 3), third.view(1, 1, 3)).squeeze()


# %%
def settled(c2, printed=False, steps=400):
    """Probabilities and KL term after many steps on the three choices."""
    logits = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        now = logits.log_softmax(0)
        kl = (third.exp() * (now - third)).sum() if printed else full_kl(now)
        first, _ = policy_loss(now[:, None], third[:, None], three_good, three, math.inf)
        ppo_objective(first, torch.zeros(()), kl, 1.0, c2).backward()
        optimizer.step()
    return now.detach().exp(), kl.item()


# %%
print("c2                probabilities            on paper                 KL term")
for c2, printed in ((0.0, False), (0.5, False), (1.0, False), (1.0, True)):
    found, kl = settled(c2, printed)
    paper = (three_good[:, 0] / c2).softmax(0).tolist() if c2 and not printed else []
    texts = (" ".join(f"{x:.3f}" for x in row) for row in (found.tolist(), paper))
    print("{:17s} {:24s} {:24s} {:+.2f}".format(f"{c2}{' as printed' * printed}", *texts, kl))
    if paper:
        assert torch.allclose(found, torch.tensor(paper), atol=0.01)

# %% [markdown]
# Larger $c_2$, closer to the reference; and exactly where paper says. As printed the term is
# $-KL(\pi_{ref}, \pi)$: negative, and minimising it pushes the policy *away* from the reference, as
# far as it goes.
#
# The KL in the reward and the KL in the loss are not the same term, though. With one token they end
# at the same policy. With more, a KL loss does not see that a token leads to places where KL will
# cost more; notebook 05 measures it.
#
# ## Break it
#
# **The sign.** The objective, minimised as if it were a loss, on the oracle's rollouts of 4 and of
# 16 answers. Also the smaller loss in place of the larger:


# %%
def smaller(logprobs, old, good, mask):
    ratio = (logprobs - old).exp()
    return masked_mean(torch.minimum(-good * ratio, -good * ratio.clamp(0.8, 1.2)), mask)


losses = {
    "right": lambda *rollout: policy_loss(*rollout, 0.2)[0],
    "sign turned": lambda *rollout: -policy_loss(*rollout, 0.2)[0],
    "smaller loss": smaller,
}
broken = {}
for name, loss_fn in losses.items():
    for size in (4, 16):
        (_, true), moved = averaged(loss_fn, size)
        broken[name, size] = true[-1]
        print(f"{name:12s} {size:2d} answers: true gain {true[-1]:+5.2f}, KL(old, new) {moved:.2f}")
assert broken["right", 4] > max(0.1, broken["smaller loss", 4] + 0.1)
assert broken["smaller loss", 16] > broken["right", 16] > 0
assert max(broken["sign turned", size] for size in (4, 16)) < -1

# %% [markdown]
# The turned sign is seen in the score. The smaller loss is not always: on the larger rollouts it
# even gains more than the right one. That is no merit. It stops only tokens that went the wrong
# way, and lets the others run on, so the policy runs about as far as without any clip, five to
# seven nats, and with four answers the gain is lost. Watch the KL, not the score alone.
#
# **The mask.** A mean over all positions, padding counted in. There the log-probabilities are 0 in
# old and new, so the ratio is 1 and the advantage 0:

# %%
now = table_logprobs(policy, rollout).detach()
everywhere = torch.ones_like(rollout.mask)
spread = [x.masked_fill(~rollout.mask, 0) for x in (now, rollout.logprobs, rollout.advantages)]
results = {"masked": policy_loss(*spread, rollout.mask, 0.2)}
results["with padding"] = policy_loss(*spread, everywhere, 0.2)
for name, (loss, stats) in results.items():
    print(f"{name:13s} loss {loss:+.4f}", {k: round(v.item(), 4) for k, v in stats.items()})

# %%
share = rollout.mask.double().mean().item()
quotient = (results["with padding"][0] / results["masked"][0]).item()
print(f"share of positions that count {share:.4f}, quotient of the losses {quotient:.4f}")
assert abs(share - quotient) < 1e-3

# %% [markdown]
# Loss, `clip_frac`, `approx_kl` and the ratio's distance from 1 are all multiplied by the share of
# tokens that count. That share differs from batch to batch: the longest answer of a batch decides
# how much the batch weighs. And the alarms sound later than they should.
#
# **The shift, the temperature, the positions.** Each of these makes the update see other
# log-probabilities than the rollout did. The test is one line, before any step: is every ratio 1?

# %%
from minippo import token_logits

fresh = Policy.from_pretrained("sft")
length, ids = rollout.response.shape[1], rollout.attention_mask
with torch.no_grad():
    window = response_logits(fresh, rollout.tokens, ids, length)
    late = token_logits(fresh, rollout.tokens, ids)[:, -length:]
    unplaced = fresh(rollout.tokens, attention_mask=ids.long()).logits[:, -length - 1 : -1]
ways = {"right": (window, 1.0), "one place late": (late, 1.0)}
ways |= {"temperature 0.7": (window, 0.7), "no position ids": (unplaced, 1.0)}
print("logits of the response window:", tuple(window.shape))

# %%
alarm = {}
print("                  mean ratio   largest |log ratio|")
for name, (seen, temperature) in ways.items():
    again = gather_logprobs(seen, rollout.response, temperature)
    off = (again - rollout.logprobs)[rollout.mask]
    alarm[name] = off.abs().max().item()
    print(f"{name:17s} {off.exp().mean():10.3f}   {alarm[name]:19.4f}")
assert alarm.pop("right") < 1e-4 and min(alarm.values()) > 0.1

# %% [markdown]
# With the wrong temperature the *mean* ratio is still near 1. Look at the largest deviation.
#
# ## What the note says, and what is meant
#
# | as printed | as meant | shown |
# |---|---|---|
# | $L_{policy} = E[\min(\ldots)]$ | that is the objective; the loss is minus it | "The gradient" |
# | the ratio of whole answers | of tokens, in practice | "Ratio 1" |
# | $R_t$, "the actual reward" | the return, here $G_t$: advantage + old value | exercise 2 |
# | $\sum \pi_{ref} \log(\pi / \pi_{ref})$ | the weights are $\pi$ | "$c_2$" |
# | the KL of "policy and optimised model" | of policy and reference | "$c_2$" |
#
# ## Claims
#
# What the text says, asserted with room to spare:

# %%
for size in (4, 16):
    (promised, true), far = gains[size, "no clip"]
    (_, held), near = gains[size, "clip_range 0.2"]
    assert promised[-1] > 2 * true.max() and true[-1] < true.max() - 0.1
    assert near < far / 4 and held[-1] > held.max() - 0.1
    print(f"{size} answers: ends at {held[-1]:.2f} with the clip, at {true[-1]:.2f} without")
assert gains[4, "no clip"][0][1, -1] < gains[4, "clip_range 0.2"][0][1, -1] - 0.1
assert gains[16, "no clip"][0][1].max() > gains[16, "clip_range 0.2"][0][1].max() + 0.2

# %% [markdown]
# ## Quiz
#
# 1. A token has advantage $-2$ and ratio 0.5. What is its gradient, and why?
# 2. At the first step of a rollout the policy loss is 0.0000. Is something broken?
# 3. `ppo_epochs=1` and one minibatch per rollout. What does the clip do?
# 4. The mean ratio is 1.00 all through training. Does that show that the policy hardly moves?
# 5. Your critic is separate, the optimizer is Adam, and the critic learns too slowly. You set
#    `vf_coef` from 1 to 10. What happens?
#
# <details><summary>Answers</summary>
#
# 1. 0. The token is bad, and it is already much less likely than in the rollout: case 4. Pushing on
#    would rely on an old measurement.
# 2. No. All ratios are 1 and whitened advantages have mean 0. The gradient
#    $-\hat A_t \nabla \log \pi$ is not 0.
# 3. Nothing. There is one step, at ratio 1, and then new answers. PPO is then REINFORCE with a
#    critic.
# 4. No. In expectation the mean of $\pi / \pi_{old}$ over tokens of $\pi_{old}$ is 1 whatever
#    $\pi$ is. Look at `approx_kl`, `clip_frac` or the largest deviation.
# 5. Hardly anything: Adam divides by the size of the gradient. Raise `value_lr`, and see whether
#    the value clip holds it back.
#
# </details>
#
# **Next:** all pieces are written. Notebook 08 puts them together, and trains.

# %%
from minippo.checks import scored

scored()
