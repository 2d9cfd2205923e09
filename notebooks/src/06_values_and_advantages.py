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
# # 06 · Values and advantages: which token deserves the credit?
#
# **Promise.** You write what turns rewards into a signal for every token: the advantage of a whole
# answer, generalized advantage estimation, and whitening. You hold GAE against exact advantages in
# a world where they are known, train two critics, and see what $\lambda$ does to one real answer.
# **Needs.** Notebooks 00 and 05: rewards per token and the mask. **Time.** 75 minutes, of which the
# computer needs less than one. Three exercises.
#
# ## The question
#
# An answer got a score. PPO wants to make its good tokens more likely and its bad ones less. But
# the score is one number for twenty tokens, and whether 0.9 is good depends on the question: for an
# easy one it may be below average. **Compared with what was to be expected, how much did each
# token help?**

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import matplotlib.pyplot as plt
import torch

# %% [markdown]
# ## The formula
#
# The **value** of a state is the reward that is still to come from there, on average over what the
# policy may say. A state is the prompt and the part of the answer written so far. The **advantage**
# of a token is how much better things turned out than the value had said. The **critic**, or value
# model, is the network that predicts values.
#
# $$A(x, y) = R(x, y) - V(x) \qquad \text{one number for the whole answer}$$
#
# $$\delta_t = r_t + \gamma V_{t+1} - V_t, \qquad
# \hat A_t = \delta_t + \gamma \lambda \hat A_{t+1} \qquad \text{one for each token: GAE}$$
#
# | symbol | variable | shape | function |
# |---|---|---|---|
# | $R(x, y)$ of $K$ answers to a prompt | `scores` | `(B, K)` | the reward model |
# | $V(x)$, the mean of them | `values` | `(B,)` | `prompt_values` |
# | $R(x, y) - V(x)$ | `advantages` | `(B,)` | `simple_advantages` |
# | $r_t$ | `rewards` | `(B, R)` | `per_token_rewards` |
# | $V_t$, *before* token $t$ | `values` | `(B, R)` | `ValueModel` |
# | $\delta_t$, the TD error | `delta` | `(B, R)` | `gae` with $\lambda = 0$ |
# | $\hat A_t$ | `advantages` | `(B, R)` | `gae` |
# | $G_t = \hat A_t + V_t$, the **return**, the critic's target | `returns` | `(B, R)` | `gae` |
# | $\gamma$, the discount of what comes later | `gamma` | 1 for answers | an argument of `gae` |
# | $\lambda$ | `lam` | 0 to 1 | an argument of `gae` |
# | advantages with mean 0 and variance 1 | `advantages` | `(B, R)` | `masked_whiten` |
#
# $R$ in a shape is the number of positions, $R(x, y)$ the reward of an answer.
#
# Some notes say that $R - V$ "is GAE". It is not, in general. When the two agree is shown below.
#
# ## The value of a prompt
#
# **By hand.** Two prompts, three answers to each, scored by a reward model:
#
# ```text
#             answer 1   answer 2   answer 3     mean = V(x)
# prompt 1      0.90       0.75       0.60         0.75
# prompt 2     -1.00       0.00       0.40        -0.20
# ```
#
# The first answer to prompt 1 has the advantage $0.90 - 0.75 = 0.15$. The best answer to prompt 2
# has a lower score than any answer to prompt 1, and a larger advantage: $0.40 + 0.20 = 0.60$.
#
# The mean over the answers to a prompt is `prompt_values`, which you wrote in notebook 02. `mine`
# hands it out again, or minippo's own if you have not written it.
# %%
from minippo.checks import mine
from minippo.plots import COLOURS

prompt_values = mine("prompt_values")

# %% [markdown]
# ## Exercise 1: `simple_advantages`
#
# Difficulty 1 of 5 · importance 3 of 5 · 2 minutes
#
# $R(x, y) - V(x)$: positive if the answer did better than expected.
#
# <details><summary>Hint 1: a nudge</summary>
#
# An answer that is exactly as good as expected has advantage 0.
#
# </details>
# <details><summary>Hint 2: the shapes</summary>
#
# `(B,)` and `(B,)` to `(B,)`. Each answer has the value of its own prompt; no mean over the batch.
#
# </details>
# <details><summary>Hint 3: nearly the line</summary>
#
# Score first, value taken off.
#
# </details>


# %%
def simple_advantages(scores, values):
    """scores: (B,), values: (B,) -> (B,)."""
    ### BEGIN SOLUTION
    return scores - values
    ### END SOLUTION


# %%
from minippo.checks import check_simple_advantages

simple_advantages = check_simple_advantages(simple_advantages)

# %%
paper_scores = torch.tensor([[0.90, 0.75, 0.60], [-1.00, 0.00, 0.40]])
paper_values = prompt_values(paper_scores)
print("V(x):", paper_values)
best_answers = simple_advantages(paper_scores.amax(1), paper_values)
print("advantage of the best answer to each:", best_answers)
assert torch.allclose(best_answers, torch.tensor([0.15, 0.60]))

# %% [markdown]
# ## Real answers, real scores
#
# 144 prompts of TinyHH, four answers of the SFT model to each, scored by the shipped reward model.
# Scores are standardised: 0 is an average answer of the SFT model, 1 is one standard deviation
# better.

# %%
from minippo import (
    Encoded,
    Policy,
    RewardModel,
    ValueModel,
    encode_prompt,
    generate_many,
    load_tokenizer,
)
from minippo.worlds.tinyhh.rows import prompt_rows

tokenizer, sft = load_tokenizer("sft"), Policy.from_pretrained("sft")
reward_model = RewardModel.from_pretrained("reward")
TRAIN, HELD_OUT, K = 96, 48, 4
rows = prompt_rows("ppo", TRAIN + HELD_OUT)
prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
repeated = [prompt for prompt in prompts for _ in range(K)]
answers = generate_many(sft, repeated, tokenizer, 48, seed=3)
print(f"{len(answers)} answers of {min(map(len, answers))} to {max(map(len, answers))} tokens")

# %%
from minippo import join_query_response, standardize_scores

tokens, attention_mask, _ = join_query_response(repeated, answers, tokenizer.pad_token_id)
with torch.no_grad():
    scores = reward_model(tokens, attention_mask)
scores = standardize_scores(scores, reward_model.mean, reward_model.std).view(-1, K)
values = prompt_values(scores)
for row, line, value in zip(rows[:3], scores, values):
    scored_as = " ".join(f"{x:+.2f}" for x in line.tolist())
    print(f"V {value:+.2f} from {scored_as}: {row['instruction']}")

# %% [markdown]
# The mean of four is itself a guess. These means differ from prompt to prompt. How much of that is
# only the luck of four samples? The variance of a mean of $K$ is the variance of one answer divided
# by $K$:

# %%
luck = scores.var(dim=1).mean() / K
print(f"variance of the means {values.var():.3f}, of which luck {luck:.3f}")
print(f"so luck is {luck / values.var():.0%} of it")
assert 0.3 < luck / values.var() < 0.9

# %% [markdown]
# So even a perfect critic could explain only the rest of it.
#
# ## Critic warm-up
#
# Before PPO begins, the critic can be trained on these means, its **warm-up**: the network of the
# reward model with a fresh head is told to predict $V(x)$. `train_value_model` does that.
# **Explained variance** is one minus the squared error over the variance of the target, here on
# prompts that were held out: 1 is perfect, 0 is as good as always saying the mean.

# %%
from minippo import ValueConfig, prompt_explained_variance, train_value_model

pad_id = tokenizer.pad_token_id
data = [Encoded(i, *pair) for i, pair in enumerate(zip(repeated, ([a] for a in answers)))]
by_prompt, means, many = data[::K], values.repeat_interleave(K).tolist(), TRAIN * K
warm = ValueModel.from_reward_model(reward_model)
unseen = by_prompt[TRAIN:], values[TRAIN:].tolist()
before = prompt_explained_variance(warm, *unseen, pad_id)
config = ValueConfig(batch_size=32, lr=1e-3, epochs=2)
_ = train_value_model(warm, data[:many], means[:many], config, pad_id=pad_id)
after = prompt_explained_variance(warm, *unseen, pad_id)
print(f"explained variance of V(x), held-out prompts: fresh {before:.2f}, warmed up {after:.2f}")
assert after > before and after > 0

# %% [markdown]
# Little, but better than nothing, from 96 prompts in seconds. The target is the value *at the
# prompt*: the warm-up asks for that same number at every token of the answer. But halfway through a
# rude answer one could know better.
#
# ## A value at every token
#
# What is still to come after token $t$ of *this* answer is its own score, not the mean over other
# answers. Training on that, for every token, is nearly what PPO does to its critic all along (whose
# returns also count the KL penalties and, for $\lambda < 1$, the critic's own later values). We do
# it here with the same function, the same answers and another target: each answer's own score.

# %%
critic = ValueModel.from_reward_model(reward_model)
own_scores = scores.flatten().tolist()
_ = train_value_model(critic, data[:many], own_scores[:many], config, pad_id=pad_id)
print(f"trained on {many} answers, {len(data) - many} are held out")

# %%
from minippo import answered, response_values

held_out = answered(repeated[many:], answers[many:], pad_id)
target = torch.tensor(own_scores[many:])


def explained_along(model, shares):
    """Explained variance of an answer's score by V after each share of the answer."""
    with torch.no_grad():
        found = response_values(model, held_out)
    places = [((held_out.mask.sum(1) - 1) * share).round().long() for share in shares]
    guesses = [found[torch.arange(len(found)), place] for place in places]
    return [float(1 - (g - target).square().mean() / target.var(unbiased=False)) for g in guesses]


shares = [0.0, 0.25, 0.5, 0.75, 1.0]
along = {"prompt means": explained_along(warm, shares)}
along["own scores"] = explained_along(critic, shares)
for name, line in along.items():
    print(f"{name:12s}", " ".join(f"{x:+.2f}" for x in line))

# %% tags=["nbval-ignore-output"]
figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
for (name, line), marker in zip(along.items(), "os"):
    axis.plot(shares, line, marker=marker, label=f"trained on {name}")
axis.axhline(0, color="black", lw=0.8)
axis.set(xlabel="share of the answer that the critic has read")
axis.set(ylabel="explained variance of its score", title="192 held-out answers")
axis.legend(frameon=False)
plt.show()

# %%
blind = max(along["own scores"][0], along["prompt means"][0]) < 0.15
lead = along["own scores"][1] - along["prompt means"][1]
print("at the prompt both know little:", blind)
print(f"a quarter into the answer the critic of own scores is ahead by {lead:.2f}")
assert blind and lead > 0.1

# %% [markdown]
# ## From values to credit: the TD error
#
# A critic that changes its mind while it reads an answer says where something happened. After token
# $t$ it has seen $r_t$ come in and expects $V_{t+1}$ more. Before, it had expected $V_t$. The
# difference is the **TD error** (temporal difference):
#
# $$\delta_t = r_t + \gamma V_{t+1} - V_t$$
#
# After the last token nothing is still to come: $V$ is 0 there. **By hand**, with $\gamma = 1$, for
# two answers; the last position of the second is padding:
#
# ```text
#                 answer 1              answer 2
# r_t          0     0     1          0     1     -
# V_t        0.5   0.25  0.5        0.5   0.75    -
# δ_t      -0.25   0.25  0.5       0.25   0.25    -
# ```
#
# In answer 1 the first token made the critic expect less, $0 + 0.25 - 0.5$; the second repaired it;
# the end was better than expected, $1 + 0 - 0.5$.
#
# ## From TD errors to GAE
#
# $\delta_t$ is an estimate of the advantage of token $t$, and believes the critic about everything
# that comes after. One may wait longer before asking the critic: $n$ rewards, then its opinion.
# The sum telescopes into TD errors: each $V$ in the middle is added once and taken off once.
#
# $$A_t^{(1)} = r_t + \gamma V_{t+1} - V_t = \delta_t$$
# $$A_t^{(2)} = r_t + \gamma r_{t+1} + \gamma^2 V_{t+2} - V_t = \delta_t + \gamma \delta_{t+1}$$
# $$A_t^{(n)} = \delta_t + \gamma \delta_{t+1} + \dots + \gamma^{n-1} \delta_{t+n-1}$$
#
# Small $n$ trusts the critic, large $n$ trusts the luck of this one answer. **GAE** takes all of
# them, each $\lambda$ times as important as the one before. The weights
# $(1 - \lambda) \lambda^{n-1}$ add up to 1. $\delta_{t+l}$ occurs in every $A_t^{(n)}$ with
# $n > l$, and those have the weight $\lambda^l$ in total. So
#
# $$\hat A_t = (1 - \lambda) \sum_{n \ge 1} \lambda^{n-1} A_t^{(n)}
# = \sum_{l \ge 0} (\gamma \lambda)^l \, \delta_{t+l} = \delta_t + \gamma \lambda \, \hat A_{t+1}$$
#
# The last form is the recursion that one writes, from the last token to the first. On paper, with
# $\lambda = \tfrac12$:
#
# ```text
# δ_t      -0.25    0.25   0.5        0.25   0.25   -
# A_t       0       0.5    0.5        0.375  0.25   -
# A_t + V_t 0.5     0.75   1.0        0.875  1.0    -
# ```

# %%
T, F = True, False
paper_rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 9.0]])
paper_values = torch.tensor([[0.5, 0.25, 0.5], [0.5, 0.75, 9.0]])
paper_mask = torch.tensor([[T, T, T], [T, T, F]])
delta = torch.tensor([-0.25, 0.25, 0.5])
lam, weights = 0.5, torch.tensor([0.5, 0.25, 0.25])  # after the end nothing changes: the rest
n_step = delta.cumsum(0)
print("n-step advantages of the first token:", n_step)
print(f"their weighted mean: {(weights * n_step).sum():.3f}")
print(f"sum of lam^l delta:  {(lam ** torch.arange(3) * delta).sum():.3f}")
assert (weights * n_step).sum() == (lam ** torch.arange(3) * delta).sum() == 0

# %% [markdown]
# ## Exercise 2: `gae`
#
# Difficulty 4 of 5 · importance 5 of 5 · 20 to 30 minutes
#
# Advantages and returns for all tokens that count. What is asked:
#
# - a loop over $t$ from the last column to the first;
# - nothing of what stands at masked positions gets in, not even NaN;
# - the mask may have holes. $t + 1$ is then the next token *that counts*: masked positions are
#   stepped over as if they were absent;
# - `returns` are advantages plus values; both are 0 where the mask is False.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Carry two things from right to left: the advantage and the value of the next token that counts.
# Both begin at 0. At a masked position neither changes.
#
# </details>
# <details><summary>Hint 2: the tools</summary>
#
# First `masked_fill(~mask, 0)` on rewards and values. `torch.where(mask[:, t], new, old)` keeps the
# old one where the column is masked. Collect columns in a list, and `torch.stack` them with `dim=1`
# in the right order at the end.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# In the loop: `delta = rewards[:, t] + gamma * next_value - values[:, t]`; then
# `advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)`; then the same
# for `next_value` with `values[:, t]`. The columns come out last first: `[::-1]`. Fill masked
# positions of the result with 0.
#
# </details>


# %%
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """rewards, values: (B, R), mask: (B, R) bool -> advantages (B, R), returns (B, R)."""
    ### BEGIN SOLUTION
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantage = next_value = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1).masked_fill(~mask, 0)
    return advantages, advantages + values
    ### END SOLUTION


# %%
from minippo.checks import check_gae

gae = check_gae(gae)

# %%
advantages, returns = gae(paper_rewards, paper_values, paper_mask, lam=0.5)
print(advantages, returns, sep="\n")
assert torch.equal(advantages, torch.tensor([[0.0, 0.5, 0.5], [0.375, 0.25, 0.0]]))
assert torch.equal(returns, torch.tensor([[0.5, 0.75, 1.0], [0.875, 1.0, 0.0]]))

# %% [markdown]
# ## Is this right? Exact advantages
#
# The oracle's world of notebook 05: five words, 85 responses, every value known. The policy stands
# halfway between the reference and the best one. `world.values` gives the exact $V$ of each state
# and the exact advantage of each token there, the KL penalty counted in. Averaged over all that may
# come after a token, does GAE give its exact advantage?

# %%
from minippo.worlds.oracle import feelings_world

kl_k1, per_token_rewards = mine("kl_k1"), mine("per_token_rewards")  # of notebook 05
BETA = 0.8
world, ref = feelings_world()
best, _ = world.optimum(ref, BETA)
half = (ref + 0.5 * (best - ref)).log_softmax(-1)
exact_values, _, exact_advantages = world.values(half, ref, BETA)
kl = kl_k1(world.token_logprobs(half), world.token_logprobs(ref))
rewards = per_token_rewards(world.scores, kl, world.mask, BETA)


def along_responses(of_states):
    """A number for each state (S,) -> before each token of each response (Y, R)."""
    return of_states[world.before].masked_fill(~world.mask, 0)


# %%
sampled = world.response_logprobs(half).exp()


def mean_after(x, words):
    """The mean of x[:, t] over the responses that begin with these words, t the last of them."""
    t = len(words) - 1
    begins = torch.tensor([world.text(y)[: t + 1] == words for y in world.responses])
    return float((sampled * begins * x[:, t]).sum() / (sampled * begins).sum())


found, _ = gae(rewards, along_responses(exact_values), world.mask, lam=0.95)
exact = exact_advantages[world.before, world.response]
for words in (("good",), ("bad",), ("not", "bad"), ("very", "good")):
    pair = mean_after(found, words), mean_after(exact, words)
    name = f"advantage of {words[-1]!r} in {' '.join(words)!r}"
    print(f"{name:35s} GAE {pair[0]:+.4f}  exact {pair[1]:+.4f}")
    assert abs(pair[0] - pair[1]) < 1e-9

# %% [markdown]
# *not bad* is better than a bare *not* had promised: there *bad* has a positive advantage.
#
# ## What $\lambda$ trades
#
# With the exact critic every $\lambda$ is right on average. Critics are never exact. We take three:
# the exact one; the one that a perfect warm-up gives, $V(x)$ at every token; and one that says 0.
# The **policy gradient** is the sum over tokens of advantage times $\nabla \log \pi$ of the token.
# Its mean over samples should be the exact gradient of the objective (`world.gradient` would give
# it). **Bias** is how far the mean is off, **noise** the standard deviation over single answers,
# both relative to the length of the exact gradient.

# %%
from torch.nn.functional import one_hot


def bias_and_noise(advantages, exact=None):
    """Mean gradient (S, V), and bias and noise relative to the exact one if it is given."""
    push = one_hot(world.response, len(world.words)) - half[world.before].exp()  # of each logit
    each = torch.zeros(len(sampled), *half.shape, dtype=torch.float64)
    rows = torch.arange(len(sampled))[:, None]
    each = each.index_put((rows, world.before), advantages[..., None] * push, accumulate=True)
    mean = torch.tensordot(sampled, each, 1)
    exact = mean if exact is None else exact
    noise = (sampled * (each - mean).square().sum((1, 2))).sum().sqrt()
    return mean, float((mean - exact).norm() / exact.norm()), float(noise / exact.norm())


leaf = half.clone().requires_grad_()
objective = world.objective(leaf.log_softmax(-1), ref, BETA)
exact_gradient = torch.autograd.grad(objective, leaf)[0]
assert torch.allclose(bias_and_noise(exact.masked_fill(~world.mask, 0))[0], exact_gradient)

# %%
critics = {"exact V": exact_values, "V(x) at every token": exact_values[0].expand(len(ref))}
critics["0 at every token"] = torch.zeros(len(ref), dtype=torch.float64)
table = {}
print("critic               lambda    bias   noise")
for name, of_states in critics.items():
    for lam in (0.0, 0.5, 0.95, 1.0):
        estimate, _ = gae(rewards, along_responses(of_states), world.mask, lam=lam)
        _, bias, noise = bias_and_noise(estimate, exact_gradient)
        table[name, lam] = bias, noise
        print(f"{name:20s} {lam:6.2f} {bias:7.3f} {noise:7.2f}")

# %% [markdown]
# - With the exact critic there is no bias, and the smaller $\lambda$ the less noise.
# - With a wrong critic only $\lambda = 1$ is unbiased. At $\lambda = 0$ the warm-up's critic gives
#   a gradient whose error is larger than the gradient: it never heard what a later token is worth.
# - $\lambda = 0.95$ accepts a little bias, for a little less noise than $\lambda = 1$ has. That is
#   the usual choice.
#
# This is why $V(x)$ is the *beginning* of a critic and not the whole of it.
#
# ## $R - V$ beside GAE
#
# At $\gamma = \lambda = 1$ the TD errors of an answer telescope completely. For the first token
# what remains is everything that was paid, less $V(x)$: exactly $R(x, y) - V(x)$, if $R$ counts the
# KL penalties. For later tokens GAE takes off the value *there* and no longer counts what was paid
# before; $R - V$ gives every token the same number. Both have the right mean.

# %%
on_path = along_responses(exact_values)
full, _ = gae(rewards, on_path, world.mask, lam=1.0)
whole = simple_advantages(rewards.sum(1), on_path[:, 0])
same_for_all = whole[:, None] * world.mask
print("R - V equals GAE at lambda 1 on the first token:", torch.allclose(whole, full[:, 0]))
print("and on the second:", torch.allclose(same_for_all[:, 1], full[:, 1]))
for name, estimate in (("R - V", same_for_all), ("GAE, lambda 1", full)):
    _, bias, noise = bias_and_noise(estimate, exact_gradient)
    print(f"{name:14s} bias {bias:.3f} noise {noise:.2f}")
    table[name] = bias, noise
assert torch.allclose(whole, full[:, 0]) and table["R - V"][1] > table["GAE, lambda 1"][1]

# %% [markdown]
# A little more noise, for answers of at most three tokens. Does one see it in training? PPO from
# samples alone, small batches, its own critic, three seeds each; the distance to the best policy
# is exact.
#
# > **Predict.** Will the curves of $R - V$ and of GAE be far apart?
#
# <details><summary>Answer</summary>
#
# No. The noise of one gradient differs by little, and three seeds differ by more.
#
# </details>

# %%
from minippo import PPOConfig, frozen_copy, train_ppo
from minippo.worlds.oracle import TabularPolicy, TabularValue

SETTINGS = dict(batch_size=32, minibatch_size=32, micro_batch_size=32, lr=0.1, value_lr=0.1)
SETTINGS |= dict(ppo_epochs=1, kl_coef=BETA, whiten_advantages=False, missing_eos_penalty=0.0)
SETTINGS |= dict(steps=50, value_clip_range=1e6, max_response_tokens=3)


def train(seed, **settings):
    """Metrics of each step, and KL(policy, best) at the end."""
    config = PPOConfig(**(SETTINGS | settings))
    policy, value_model = TabularPolicy(world, ref), TabularValue(world)
    models = policy, frozen_copy(policy), value_model
    history = train_ppo(*models, world.score_fn, world.prompts(32), world, config, seed=seed)
    return history, float(world.kl(world.logprobs_all(policy).detach(), best))


# %% tags=["nbval-ignore-output"]
kinds = {"R - V": dict(advantage="simple"), "GAE, lambda 0.95": dict(advantage="gae", lam=0.95)}
runs = {name: [train(seed, **kind) for seed in range(3)] for name, kind in kinds.items()}
figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
for name, found in runs.items():
    curves = torch.tensor([[row["objective/rewards"] for row in history] for history, _ in found])
    axis.plot(curves.mean(0), label=name)
    axis.fill_between(range(50), curves.amin(0), curves.amax(0), alpha=0.15)
axis.set(xlabel="step", ylabel="score less KL penalties", title="mean and range of three seeds")
axis.legend(frameon=False)
plt.show()
print({name: [round(left, 3) for _, left in found] for name, found in runs.items()})

# %%
left = {name: sum(distance for _, distance in found) / 3 for name, found in runs.items()}
start = float(world.kl(ref, best))
close = all(distance < start / 4 for distance in left.values())
alike = abs(left["R - V"] - left["GAE, lambda 0.95"]) < 0.1 * start
print(f"KL(ref, best) was {start:.2f} nats; both are left with less than a quarter of it: {close}")
print(f"they differ by less than a tenth of it: {alike}")
assert close and alike

# %% [markdown]
# In this world it makes no difference: with three tokens there is hardly any credit to divide.
# $R - V$ is a sound method (REINFORCE with a baseline), not a mistake. With longer answers and a
# good critic GAE should add more; that is not shown here.
#
# ## See it: $\lambda$ on one real answer
#
# A **rollout** of the tiny GPT-2 with the critic trained above. Policy and reference are both the
# SFT model, so all KL penalties are 0, and the only reward is the score at the last token. Of 24
# answers to new prompts we take the best, and the one that disappointed the critic most: its score
# is furthest below what the critic expected at some point on the way.

# %%
from minippo import collect_rollout, decode_response

new_rows = [row for row in prompt_rows("validation", 60) if not row["history"]][:24]
new_prompts = [encode_prompt(tokenizer, r["instruction"], r["history"]) for r in new_rows]
config = PPOConfig(whiten_advantages=False)
stats = reward_model.mean, reward_model.std
models = sft, frozen_copy(sft), critic, reward_model
rollout = collect_rollout(*models, new_prompts, tokenizer, config, score_stats=stats, seed=1)
good = int(rollout.scores.argmax())
bad = int((rollout.scores - rollout.values.amax(1)).argmin())
for row in (good, bad):
    print(f"{float(rollout.scores[row]):+.2f} {new_rows[row]['instruction']}")
    print(f"      {decode_response(tokenizer, rollout.response[row])}")

# %%
one = rollout.rows([bad])
length = int(one.mask.sum())
lambdas = [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0]
picture = torch.cat([gae(one.rewards, one.values, one.mask, lam=lam)[0] for lam in lambdas])
picture = picture[:, :length]
for name, line in (("V", one.values[0, :length]), ("lambda 0", picture[0])):
    print(f"{name:9s}", " ".join(f"{x:+.2f}" for x in line.tolist()))
print("lambda 1 ", " ".join(f"{x:+.2f}" for x in picture[-1].tolist()))
assert torch.allclose(picture[-1], one.scores - one.values[0, :length], atol=1e-5)
assert torch.allclose(picture[0, :-1], one.values[0, :length].diff(), atol=1e-5)

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(2, 1, figsize=(10.8, 4.6), sharex=True, layout="constrained")
axes[0].plot(range(length), one.values[0, :length], marker="o", label="V before the token")
axes[0].axhline(float(one.scores), color=COLOURS[1], ls="--", label="the score")
axes[0].set(ylabel="value", title="what the critic expects")
axes[0].legend(frameon=False)
limit = float(picture.abs().max())
shown = axes[1].imshow(picture, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
axes[1].set_yticks(range(len(lambdas)), lambdas)
words = [tokenizer.decode([t]).strip() for t in one.response[0, :length].tolist()]
words = [word.replace("<|endoftext|>", "EOS") for word in words]
axes[1].set_xticks(range(length), words, rotation=60, ha="right")
axes[1].set(ylabel="lambda", title="advantages, for seven values of lambda")
figure.colorbar(shown, ax=axes[1], label="advantage")
plt.show()

# %% [markdown]
# The answer is about a road, not about volcanoes, and ends in the middle of a sentence. This critic
# noticed neither: it grew hopeful at the full stop after *Glad you asked* and at *You*, and stayed
# so. Nearly all of the disappointment comes with the score. Each row of the lower picture is one
# $\lambda$. At 0 a token gets only the step that the critic's opinion made at it, and most of the
# blame stays with the last. At 1 it gets the score less what was expected before it: every token is
# blamed, *Glad you asked* for what came later. Between the two, blame flows from right to left and
# fades on the way.
#
# Look at the good answer, too: "In the end the I hope that helps." It broke in the middle, and the
# reward model gave it the highest score of all 24. What follows can only be as good as the score.
#
# ## Coloured text
#
# The same advantages ($\lambda = 0.95$) on the text of both answers. Each token stands over its
# advantage, purple for better than expected and orange for worse; below it all that the rollout
# knows of it.

# %% tags=["nbval-ignore-output"]
from minippo import xray

xray(rollout, good, tokenizer)

# %% tags=["nbval-ignore-output"]
xray(rollout, bad, tokenizer)

# %%
for name, row in (("best", good), ("disappointing", bad)):
    table_of_tokens = xray(rollout, row, tokenizer)
    shown = [x for x in table_of_tokens.column("advantage") if x is not None]
    above = sum(x > 0 for x in shown)
    print(f"{name} answer: {above} of {len(shown)} tokens have an advantage above 0")
    assert (above > len(shown) / 2) == (name == "best")

# %% [markdown]
# So which token deserves the credit? At $\lambda = 0.95$ all tokens of the good answer, its broken
# sentence included, and none of the other. The surprise at the end is two to five times as large as
# the largest step on the way, and twenty tokens earlier a third of it is left ($0.95^{20} = 0.36$).
# The *sign* comes from the answer as a whole; only the *size* tells one token from another. Over
# many answers that is enough to learn from: a token that stands in good and in bad ones is pushed
# both ways. To divide the credit within one answer takes a better critic than this one.

# %% [markdown]
# ## Exercise 3: `masked_whiten`
#
# Difficulty 2 of 5 · importance 4 of 5 · 10 minutes
#
# The scale of advantages depends on the reward model and on how far training has come. Most
# implementations **whiten** them once per rollout: take off the mean and divide by the standard
# deviation, both over the tokens that count.
#
# $$z = \frac{x - mean}{\sqrt{var + 10^{-8}}}$$
#
# With `unbiased=True` the variance is the sum of squares divided by $n - 1$, else by $n$. Masked
# positions (which may hold NaN) get 0.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Count the tokens. Mean and variance are sums over the mask, divided by counts.
#
# </details>
# <details><summary>Hint 2: the tools</summary>
#
# `x.masked_fill(~mask, 0)` first. After taking off the mean, masked positions are no longer 0: fill
# again before you square and sum.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `count = mask.sum()`, `mean = x.sum() / count`,
# `centred = (x - mean).masked_fill(~mask, 0)`,
# `var = centred.square().sum() / (count - 1 if unbiased else count)`. Then divide by the root of
# `var + 1e-8`.
#
# </details>


# %%
def masked_whiten(x, mask, unbiased=True):
    """x: (B, R), mask: (B, R) bool -> (B, R), 0 where mask is False."""
    ### BEGIN SOLUTION
    count = mask.sum()
    mean = x.masked_fill(~mask, 0).sum() / count
    centred = (x - mean).masked_fill(~mask, 0)
    var = centred.square().sum() / (count - 1 if unbiased else count)
    return centred / (var + 1e-8).sqrt()
    ### END SOLUTION


# %%
from minippo.checks import check_masked_whiten

masked_whiten = check_masked_whiten(masked_whiten)

# %% [markdown]
# ## Break it: returns after whitening
#
# The critic learns from `returns`, advantages plus values. They have to be made *before* whitening.
# In the other order the critic is told numbers on another scale, with the mean taken off:

# %%
mask = rollout.mask
advantages, right = gae(rollout.rewards, rollout.values, mask)
white = masked_whiten(advantages, mask)
wrong = (white + rollout.values).masked_fill(~mask, 0)
for name, x in (("advantages", advantages), ("whitened", white), ("returns", right)):
    print(f"{name:17s} mean {x[mask].mean():+z.3f}, std {x[mask].std():.3f}")
print(f"{'returns, too late':17s} mean {wrong[mask].mean():+z.3f}, std {wrong[mask].std():.3f}")
error = (wrong - right)[mask].abs().max()
print(f"largest error of a target: {error:.2f} standard deviations of the score")
assert abs(white[mask].mean()) < 1e-5 and abs(white[mask].std() - 1) < 1e-4 and error > 0.5

# %% [markdown]
# Nothing crashes, and the critic learns what it is told. But what it is told is not the reward
# still to come, and so the next TD errors are wrong.
#
# ## Break it: the sign, the shift, the mask
#
# Three slips in GAE, judged by the oracle: the cosine of the angle between their gradient and the
# exact one (1 is the same direction, -1 the opposite). The critic is exact, $\lambda = 0.95$.
#
# - *Sign*: the value is added where it is to be taken off.
# - *Shift*: the value *after* a token stands where the one before it belongs.
# - *Mask*: positions after the end count, and the critic says something there (here 1).

# %%
everywhere = torch.ones_like(world.mask)
shifted = torch.cat([on_path[:, 1:], torch.zeros(len(on_path), 1)], 1)
after_the_end = torch.where(world.mask, on_path, 1.0)
slips = {
    "right": gae(rewards, on_path, world.mask),
    "sign of the values": gae(rewards, -on_path, world.mask),
    "sign, lambda 1": gae(rewards, -on_path, world.mask, lam=1.0),
    "values shifted": gae(rewards, shifted, world.mask),
    "no mask": gae(rewards, after_the_end, everywhere),
}
cosines = {}
for name, (estimate, _) in slips.items():
    mean, bias, noise = bias_and_noise(estimate.masked_fill(~world.mask, 0), exact_gradient)
    cosines[name] = float((mean * exact_gradient).sum() / mean.norm() / exact_gradient.norm())
    length = float(mean.norm() / exact_gradient.norm())
    print(f"{name:19s} cosine {cosines[name]:+.3f}  length {length:.2f}", end="")
    print(f"  bias {bias:.3f}  noise {noise:.2f}")
assert cosines["right"] > 0.9999 and cosines["values shifted"] < 0 < cosines["sign of the values"]

# %% [markdown]
# - The shift is fatal: each token gets the credit that belongs to the next one, and here the
#   gradient points away from where it should.
# - The sign is not, and so lives long. At $\lambda = 1$ one may take off any number that was fixed
#   before the token was chosen, $V$ or $-V$, and the gradient stays unbiased; at 0.95 the gradient
#   is a quarter shorter and hardly turned. But the noise has more than doubled: the critic does
#   harm.
# - Without the mask the bias is small, because answers here are cut soon. It is a bias all the
#   same, and grows with the padding and with what the critic says there.
#
# With the wrong sign, or without the mask, the gradient still points uphill, with a cosine above
# 0.99: on average such a training climbs, and nothing warns you. How much worse it goes is not
# shown here.
#
# ## Claims
#
# What the text says, asserted:

# %%
for lam in (0.0, 0.5, 0.95, 1.0):
    assert table["exact V", lam][0] < 1e-9
assert table["exact V", 0.0][1] < table["exact V", 0.95][1] < table["exact V", 1.0][1]
for name in ("V(x) at every token", "0 at every token"):
    assert table[name, 1.0][0] < 1e-9 < 0.05 < table[name, 0.95][0] and table[name, 0.0][0] > 1
_, _, at_best = world.values(best, ref, BETA)
assert at_best.abs().max() < 1e-9
print("unbiased: every lambda with exact V, only lambda 1 with a wrong one")
print("at the best policy every advantage is 0: a better score is paid for by its KL penalty")

# %% [markdown]
# ## Quiz
#
# 1. An answer has the score 0.4, another 0.6. Which has the larger advantage?
# 2. Why is the value of the state *after* the last token 0?
# 3. The critic says 0 everywhere. Which $\lambda$ do you choose, and what do you pay?
# 4. Is $R(x, y) - V(x)$ the same as GAE?
# 5. At the best policy all advantages are 0. What does whitening do there?
#
# <details><summary>Answers</summary>
#
# 1. It cannot be told. An advantage compares with the value, which depends on the prompt.
# 2. No reward is still to come. If the critic's output at a padding position is used instead, its
#    error flows back into every token of the answer.
# 3. $\lambda = 1$: the only one without bias when the critic is wrong. The price is noise.
# 4. Only for the first token at $\gamma = \lambda = 1$, with the KL penalties counted in $R$. For
#    later tokens both have the right mean, but GAE takes off what was known by then, and so has
#    less noise if the critic is any good.
# 5. It divides by a standard deviation that is nearly 0: what is left of the noise is blown up to
#    variance 1. A learning rate that falls to 0 takes care of that.
#
# </details>
#
# **Next:** each token has its advantage. How far may one update follow it? The ratio, the clip and
# the sum of the losses, in notebook 07. How many exercises are solved:

# %%
from minippo.checks import scored

scored()
