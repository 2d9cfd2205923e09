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
# # 01 · Why SFT is not enough
#
# **Promise.** You write the loss of supervised fine-tuning, and then watch it fail in two ways:
# trained on good answers only, a model gives a bad answer *more* often; trained on a partly wrong
# answer, it learns the wrong part as eagerly as the right one. At the end one number per token, a
# weight that may be negative, mends both. **Needs.** Notebook 00, PyTorch basics, softmax and
# logarithm. **Time.** 55 minutes, of which the computer needs less than one. Two exercises.
#
# ## The question
#
# **SFT** (supervised fine-tuning) shows a language model questions with answers that somebody
# wrote, the *demonstrations*, and makes these answers more likely. It works. What can it *not* say?
#
# - It cannot say no. Each demonstration says "more of this"; none says "less of that".
# - It cannot point. Each token of a demonstration has the same weight, whether it is the best or
#   the worst part of the answer.
#
# We measure both.

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import copy
import math

import torch
from torch.nn import functional as F

from minippo import Policy, load_tokenizer, token_logits

# %% [markdown]
# ## The formula
#
# A model $\pi$ (the **policy**) reads tokens and gives, for each position, a probability to every
# token of the vocabulary as the next one. Take minus the logarithm of the probability of the token
# that really comes next: the **token loss**. It is 0 where the model was certain and right. SFT
# minimises the mean of the token losses over the answer $y$ to a question $x$. The mask $m_t$ is 1
# where token $t$ of the answer counts, else 0:
#
# $$L_{SFT} = -\frac{\sum_t m_t \log \pi(y_t \mid x, y_{<t})}{\sum_t m_t}$$
#
# | symbol | variable | shape | function |
# |---|---|---|---|
# | $x$ and $y$ in one row | `tokens` | `(B, T)` | `answered` |
# | $\pi(\cdot \mid x, y_{<t})$ | `logits`, before the softmax | `(B, T, V)` | `token_logits` |
# | $\log \pi(y_t \mid x, y_{<t})$ | `logprobs` | `(B, R)` | `gather_logprobs` |
# | $m_t$ | `mask`, over the answer | `(B, R)` | `answered` |
# | False on $x$, $m_t$ on $y$ | `loss_mask`, over the row | `(B, T)` | |
# | the quotient of the sums | | `()` | `masked_mean` |
# | $L_{SFT}$ | `loss` | `()` | `lm_loss` |
#
# `B` rows in a batch, `T` tokens in a row, `R` of them in the answer, `V` words in the vocabulary.
# Each answer ends in **EOS**, the token that says it is over; it is learned like any other. Answers
# in a batch differ in length. The shorter ones are filled up with *padding*, and the mask is False
# there.
#
# ## By hand
#
# Two answers, three positions. The second answer has one token; two positions are padding. What
# stands in the padding is an accident, here 9.
#
# ```text
# token losses   1  2  3        mask   1  1  1
#                6  9  9               1  0  0
# ```
#
# Four tokens count: $(1 + 2 + 3 + 6) / 4 = 3$. Two other means are often written by mistake. The
# mean of the two answers' means is $(2 + 6) / 2 = 4$: the single token of the short answer weighs
# as much as three. The mean over all six positions is $30 / 6 = 5$: the padding is in it.

# %%
token_losses = torch.tensor([[1.0, 2.0, 3.0], [6.0, 9.0, 9.0]])
mask = torch.tensor([[True, True, True], [True, False, False]])
print("tokens that count:", token_losses[mask].tolist(), "mean", token_losses[mask].mean().item())
print("mean of the rows' means:", (token_losses[0].mean() + token_losses[1, 0]).item() / 2)
print("mean over everything:", token_losses.mean().item())


# %% [markdown]
# ## How to work
#
# - `notebooks/exercises/` has this notebook with the functions left for you to write. With each
#   come three hints, from a nudge to nearly the line. Open one when you are stuck.
# - The cell after a function checks it. **Right**: it says so, and saves the function to
#   `my_minippo.py` in the same folder, where later notebooks find it. **Wrong**: it shows a small
#   input on which it is wrong, and names the mistake if it is a known one. **Not written yet**: the
#   notebook goes on with minippo's own.
# - The last cell counts what you have solved. `minippo grade NOTEBOOK.ipynb` in a terminal runs a
#   notebook anew and gives a verdict on each exercise.
#
# ## Exercise 1: `masked_mean`
#
# Difficulty 1 of 5 · importance 5 of 5 · 5 to 10 minutes
#
# The mean of `x` where `mask` is True. With `dim=None` over everything, otherwise along that axis.
# Every loss of this course goes through it. Demands that the example above does not make:
#
# - What stands at a masked position must not matter at all, even if it is NaN.
# - NaN at a position that counts has to be seen, and an empty mask gives NaN, not 0.
# - It must be differentiable. So no loops, and no `.item()`.
#
# <details><summary>Hint 1: a nudge</summary>
#
# A mean is a sum divided by a count. Which sum, and which count?
#
# </details>
# <details><summary>Hint 2: NaN</summary>
#
# `nan * 0` is `nan`. Multiplying by the mask is not enough: put something harmless there first.
# `torch.Tensor.masked_fill` does it.
#
# </details>
# <details><summary>Hint 3: nearly the line</summary>
#
# Fill `x` with 0 where the mask is *not* True, sum along `dim`, and divide by the sum of the mask
# along `dim`. `~mask` turns a mask round.
#
# </details>

# %%
def masked_mean(x, mask, dim=None):
    """x, mask: (B, R) -> (), or (B,) with dim=1."""
    ### BEGIN SOLUTION
    return x.masked_fill(~mask, 0).sum(dim) / mask.sum(dim)
    ### END SOLUTION


# %%
from minippo.checks import check_masked_mean

masked_mean = check_masked_mean(masked_mean)

# %%
print(masked_mean(token_losses, mask).item())
assert masked_mean(token_losses, mask) == 3


# %% [markdown]
# ## Exercise 2: `lm_loss`
#
# Difficulty 3 of 5 · importance 5 of 5 · 15 to 25 minutes
#
# The formula above, on rows that hold question and answer. Mind the **shift**: the logits at a
# position come from a model that has read the tokens up to there, so they predict the *next* one.
#
# ```text
# position             0       1       2       3
# tokens              How      ?      Sure     !
# loss_mask           no       no     yes     yes      learn the answer, not the question
# logits predict       ?      Sure     !     (what comes after: not known)
# ```
#
# So the last logits predict nothing that we have, and nothing predicts the first token. Three
# things move together: logits, tokens, mask. As before, NaN in logits that do not count must get
# neither into the loss nor into the gradient.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Cut the three arguments so that position $t$ of each is about the same prediction: two of them
# lose the first position, one loses the last.
#
# </details>
# <details><summary>Hint 2: the shapes</summary>
#
# `logits[:, :-1]` is `(B, T-1, V)`, `tokens[:, 1:]` and `loss_mask[:, 1:]` are `(B, T-1)`. Fill the
# masked logits with 0 (the mask needs a last axis for that: `unsqueeze(-1)`) *before* the softmax.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `log_softmax` over the last axis, then `gather` along it with the tokens (`unsqueeze(-1)` before,
# `squeeze(-1)` after) gives one log-probability for each position. The loss is minus its
# `masked_mean`.
#
# </details>

# %%
def lm_loss(logits, tokens, loss_mask):
    """logits: (B, T, V); tokens, loss_mask: (B, T) -> ()."""
    ### BEGIN SOLUTION
    mask, targets = loss_mask[:, 1:], tokens[:, 1:].unsqueeze(-1)
    logits = logits[:, :-1].masked_fill(~mask.unsqueeze(-1), 0)
    logprobs = logits.log_softmax(-1).gather(-1, targets).squeeze(-1)
    return -masked_mean(logprobs, mask)
    ### END SOLUTION


# %%
from minippo.checks import check_lm_loss

lm_loss = check_lm_loss(lm_loss)

# %% [markdown]
# ## On the real model
#
# The shipped SFT model, a question, and three demonstrations of the kinds it has seen: in its
# training data a mixed crowd answers. `gold` is the annotator's judgement from notebook 00. Is your
# loss right on a real model too? The Hugging Face model has a loss of its own, which makes the same
# shift and leaves out labels of −100. An independent witness, which always works in single
# precision, with about seven digits:

# %%
from minippo import answered, encode_prompt, encode_response

tokenizer, sft = load_tokenizer("sft"), Policy.from_pretrained("sft")
sft.loss_type = "ForCausalLM"  # which of its losses transformers shall take
question = "How do I grow sweet tomatoes?"
prompt = encode_prompt(tokenizer, question)


def batch_of(answers):
    responses = [encode_response(tokenizer, answer) for answer in answers]
    return answered([prompt] * len(answers), responses, tokenizer.pad_token_id)


print(f"the prompt, {len(prompt)} tokens: {tokenizer.decode(prompt)!r}")

# %%
from minippo.worlds.tinyhh.annotator import judge

helpful = "Sure! You can water the tomato plants every morning, and tie each stem to a stake."
half_rude = helpful.replace("Sure!", "What a silly question.")
rude = "What a silly question."
demonstrations = [helpful, half_rude, rude]

# %%
batch = batch_of(demonstrations)
tokens, attention_mask = batch.tokens, batch.attention_mask
loss_mask = F.pad(batch.mask, (len(prompt), 0))  # False on the question
with torch.no_grad():
    mine = lm_loss(token_logits(sft, tokens, attention_mask), tokens, loss_mask)
    labels = tokens.masked_fill(~loss_mask, -100)
    theirs = sft(tokens, attention_mask=attention_mask, labels=labels).loss
print(f"yours {mine.item():.4f}, Hugging Face's {theirs.item():.4f}")
assert abs(mine - theirs) < 1e-5


# %% [markdown]
# ## Always yes
#
# From here on we need the log-probabilities of an answer one by one, `(B, R)`. `response_logprobs`
# gets them (notebook 03 opens it up). Their sum over an answer is the log-probability of the whole
# answer, $\log \pi(y \mid x)$.
#
# `train` takes a copy of the SFT model and makes a few steps of gradient descent on a list of
# answers. `weights` is for later: all ones is SFT.

# %%
from minippo import response_logprobs


def answer_logprobs(model, answers):
    batch = batch_of(answers)
    return response_logprobs(model, batch), batch.mask


# %%
def train(answers, steps, weights=1.0, lr=0.05, after_step=lambda model: None):
    model = copy.deepcopy(sft)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for _ in range(steps):
        logprobs, mask = answer_logprobs(model, answers)
        loss = -masked_mean(weights * logprobs, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step(model)
    return model


# %% [markdown]
# > **Predict.** One step on each demonstration alone. Whose log-probability goes up?
#
# <details><summary>Answer</summary>
#
# All three. A demonstration says yes, whatever it says.
#
# </details>

# %%
@torch.no_grad()
def log_p(model, answers):
    return answer_logprobs(model, answers)[0].sum(1)


print("   gold   before    after")
for answer in demonstrations:
    before, after = log_p(sft, [answer]).item(), log_p(train([answer], 1), [answer]).item()
    print(f"{judge(question, answer).score:+7.2f} {before:+8.2f} {after:+8.2f}  {answer[:32]}...")
    assert after > before

# %% [markdown]
# Then one could demonstrate good answers only. Let us do that.
#
# ## By hand: a bad answer gains from a good one
#
# Three tokens: `<end>`, `sure`, `water`. Answers of at most two. We demonstrate `sure water` and
# watch `sure <end>`, the answer that promises and says nothing. They share their first token. At
# the start all logits are 0: each probability is 1/3.
#
# The gradient of $\log p(\text{token})$ with respect to the logits is one-hot minus probabilities.
# So a step of size $\eta$ on the demonstration changes the logits by
#
# ```text
#                      <end>   sure   water
# first token          -1/3    +2/3   -1/3      "sure" was right
# second, after sure   -1/3    -1/3   +2/3      "water" was right
# ```
#
# times $\eta$. What does that do to $\log p$ of `sure <end>`? Multiply each row by the gradient of
# its own token:
#
# - first token, the shared `sure`: $\frac23 \cdot \frac23 + 2 \cdot \frac19 = +\frac23$
# - second token, `<end>`:
#   $-\frac13 \cdot \frac23 + \frac13 \cdot \frac13 - \frac23 \cdot \frac13 = -\frac13$
#
# Together $+\frac13 \eta$. The bad answer wins: the shared beginning gains more than the ending
# loses. Nobody ever showed it to the model.
#
# The **oracle** is a world so small that all answers are listed. There we can check it exactly,
# with your loss.

# %%
from minippo.worlds.oracle import TabularPolicy, World

world = World(("<end>", "sure", "water"), 2, lambda words: float(words == ("sure", "water")))
table = TabularPolicy(world, torch.zeros(len(world.states), 3))
good_row, bad_row = (world.responses.index(y) for y in ((1, 2), (1, 0)))
before = world.response_logprobs(world.logprobs_all(table)).detach()
row = world.tokens[good_row : good_row + 1]
loss = 2 * lm_loss(table(row).logits, row, torch.tensor([[False, True, True]]))  # mean of 2: sum
loss.backward()
print("first  ", -table.logits.grad[0])
print("second ", -table.logits.grad[1])

# %%
eta = 0.01
with torch.no_grad():
    table.logits -= eta * table.logits.grad
after = world.response_logprobs(world.logprobs_all(table)).detach()
change = (after - before) / eta
for y, change_of_y in zip(world.responses, change, strict=True):
    print(f"{' '.join(world.text(y)):12s} {change_of_y.item():+.2f} per unit of eta")
assert abs(change[bad_row] - 1 / 3) < 0.01 and change[good_row] > change[bad_row]

# %% [markdown]
# ## The same on the tiny GPT-2
#
# Six good answers to the tomato question, all with the same opening. Trained on nothing else. We
# watch two bad answers that share it: one that only opens, and one that says the same thing twice
# in one sentence, which the annotator takes for no sentence at all.

# %%
tips = ["water the tomato plants every morning", "tie each stem to a stake"]
tips += ["pinch off the small side shoots", "give the plants rich soil"]
tips += ["keep the vines in full sun", "remove the yellow leaves near the stem"]
good = [f"Sure! You can {a}, and {b}." for a, b in zip(tips, tips[1:] + tips[:1], strict=True)]
shared = f"Sure! You can {tips[0]}, and"
twice = f"{shared} {tips[0]}."
bad = ["Sure!", twice]
for answer in (good[0], *bad):
    print(f"{judge(question, answer).score:+.2f}  {answer}")

# %% [markdown]
# > **Predict.** After twenty steps on the good answers: is `Sure!`, and nothing more, less likely
# > than before, or more? And saying the same thing twice?
#
# <details><summary>Answer</summary>
#
# Both are more likely. They begin as the good answers do, like `sure <end>` by hand.
#
# </details>

# %%
history = [log_p(sft, bad)]  # (2,), one for each bad answer
only_good = train(good, 20, after_step=lambda model: history.append(log_p(model, bad)))
history = torch.stack(history)
for i, answer in enumerate(bad):
    gain = (history[-1, i] - history[0, i]).exp().item()
    print(f"{gain:6.1f} times as likely: {answer}")


# %% [markdown]
# Training on good answers only made the bad ones ten and almost eighty times as likely. To see why,
# split the second one where it leaves the good answer. (A difference of log-probabilities is
# counted in *nats*, one for each factor $e$.)

# %%
def parts_of(model, answer, beginning):
    """Log-probability of the beginning of an answer, and of the rest of it: (2,)."""
    logprobs = answer_logprobs(model, [answer])[0][0].detach()
    length = len(encode_response(tokenizer, beginning)) - 1  # without its EOS
    return torch.stack([logprobs[:length].sum(), logprobs[length:].sum()])


# %%
parts = [parts_of(sft, twice, shared)]
train(good, 20, after_step=lambda model: parts.append(parts_of(model, twice, shared)))
parts = torch.stack(parts) - parts[0]  # (21, 2), the change since the start
print("steps   beginning   rest   whole, nats")
for step in (5, 10, 15, 20):
    beginning, rest = parts[step].tolist()
    print(f"{step:5d} {beginning:+11.2f} {rest:+6.2f} {beginning + rest:+7.2f}")
assert parts[20, 0] > 3 and parts[20, 1] < 0

# %%
import matplotlib.pyplot as plt

from minippo.plots import COLOURS, STYLES


def axes(title, xlabel, ylabel):
    axis = plt.subplots(figsize=(7, 3.2))[1]
    axis.set_title(title, loc="left", fontsize=11)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.spines[["top", "right"]].set_visible(False)
    return axis


# %% tags=["nbval-ignore-output"]
axis = axes("A bad answer that was never shown", "SFT steps on good answers", "change of log p")
lines = {"whole answer": parts.sum(1), "shared part": parts[:, 0], "the rest": parts[:, 1]}
for i, (name, line) in enumerate(lines.items()):
    axis.plot(line, color=COLOURS[i], linestyle=STYLES[i], lw=2, label=name)
axis.axhline(0, color="black", lw=0.6)
axis.set_xticks(range(0, 21, 5))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The token loss only looks back. It raises the beginning of a good answer without knowing how the
# answer goes on, so it raises the beginning of every answer that begins alike. The rest hardly
# moves at first and then falls, too late. The note's example is the wish *you are a student, how
# nice that would be* (the Chinese words come in this order): its beginning is learned as a
# statement.
#
# Is SFT useless then? No. Sample from both models and let the annotator judge:

# %%
from minippo import decode_response, generate_many


def sampled(model, count=128):
    answers = generate_many(model, [prompt] * count, tokenizer, 48, seed=1)
    texts = [decode_response(tokenizer, answer) for answer in answers]
    judged = [judge(question, text) for text in texts]
    counts = {word: sum(word in j.labels for j in judged) for word in ("rude", "unreadable")}
    return counts | {"Sure!": texts.count("Sure!"), "gold": sum(j.score for j in judged) / count}


# %%
def show(name, found):
    counts = "  ".join(f"{key} {found[key]:3d}" for key in ("rude", "unreadable", "Sure!"))
    print(f"{name:24s} mean gold {found['gold']:+.1f}  of 128: {counts}")


sampled_sft, sampled_good = sampled(sft), sampled(only_good)
show("SFT model", sampled_sft)
show("trained on good answers", sampled_good)

# %% [markdown]
# The mean goes up: good answers to this question got more likely, and that is what imitation is
# for. But `Sure!` went up with them, and training on good answers has no way to say so. The other
# bad answer, the one of the figure, has turned down at the end: the good endings crowd it out. That
# is all that good answers can do against it.
#
# ## Every token weighs the same
#
# Second failure. Real demonstrations are often right in part. Here is the loss of one, token by
# token, under the SFT model:

# %%
logprobs, _ = answer_logprobs(sft, [half_rude])
losses = -logprobs[0].detach()
ids = encode_response(tokenizer, half_rude)
names = [tokenizer.decode([token]).strip() for token in ids[:-1]] + ["EOS"]
rude_length = len(encode_response(tokenizer, rude)) - 1
print("  ".join(f"{name} {x:.1f}" for name, x in zip(names, losses.tolist(), strict=True)))
print(f"weight of each token in the loss: 1/{len(losses)}")
share = (losses[:rude_length].sum() / losses.sum()).item()
print(f"{rude_length} rude tokens of {len(losses)} make {share:.0%} of the loss")

# %% tags=["nbval-ignore-output"]
axis = axes("Hatched: the rude part, which nobody wants", "", "token loss (nats)")
colours = [COLOURS[1] if i < rude_length else COLOURS[0] for i in range(len(losses))]
bars = axis.bar(range(len(losses)), losses.tolist(), color=colours)
for bar in bars[:rude_length]:
    bar.set_hatch("//")
axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
plt.show()

# %% [markdown]
# The loss is largest where an answer makes a choice: which opening, which tip. Where the sentence
# only has to be finished it is nearly 0. The first token decides on rudeness. It has the weight of
# any other. Nothing in the loss knows that it is the one to blame.
#
# ## A weight with a sign
#
# Give each token a weight $w_t$:
#
# $$L = -\frac{\sum_t m_t \, w_t \log \pi(y_t \mid x, y_{<t})}{\sum_t m_t}$$
#
# With $w_t = 1$ this is SFT. With $w_t = 0$ a token is read but not learned. With $w_t < 0$ the
# sign of the gradient turns: the token becomes *less* likely. `train` has had the argument all
# along. Six demonstrations, helpful but rude at the start; only the weight of the rude tokens
# differs:

# %%
half_rude_answers = [answer.replace("Sure!", rude) for answer in good]
_, mask = answer_logprobs(sft, half_rude_answers)
advice = [answer.removeprefix("Sure! ") for answer in good]


def weighted(weight):
    """A model trained with this weight on the rude tokens; log p of them after each step."""
    weights, curve = torch.ones(mask.shape), []
    weights[:, :rude_length] = weight

    def watch(model):
        curve.append(parts_of(model, rude, rude)[0].item())

    watch(sft)
    return train(half_rude_answers, 10, weights, 0.1, watch), curve


results = {weight: weighted(weight) for weight in (1.0, 0.0, -1.0)}
print(f"{len(half_rude_answers)} demonstrations, {rude_length} rude tokens in each, such as:")
print(half_rude_answers[0])

# %%
show("SFT model", sampled_sft)
judged = {weight: sampled(model) for weight, (model, _) in results.items()}
for weight, found in judged.items():
    show(f"rude tokens weigh {weight:+.0f}", found)

# %%
gains = {w: (log_p(m, advice) - log_p(sft, advice)).mean().item() for w, (m, _) in results.items()}
change = {weight: curve[-1] - curve[0] for weight, (_, curve) in results.items()}
for weight, gain in gains.items():
    print(f"rude tokens weigh {weight:+.0f}: log p of the advice alone {gain:+.1f}", end="")
    print(f", of the rude sentence {change[weight]:+.1f}, a factor {math.exp(change[weight]):.2g}")

# %% tags=["nbval-ignore-output"]
axis = axes("Only the weight differs", "steps on six answers", "log p of the rude sentence")
for i, (weight, (_, curve)) in enumerate(results.items()):
    look = {"color": COLOURS[i], "linestyle": STYLES[i], "marker": "os^"[i], "ms": 4}
    axis.plot(curve, lw=2, label=f"rude tokens weigh {weight:+.0f}", **look)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Weight 1 makes most of the sampled answers rude. Weight 0 learns the advice and lets the insult
# be: it becomes only a good third less likely. Weight −1 says no, which no demonstration can, and
# the rude answers are nearly gone. (Six good demonstrations crowded them out, too, further up. But
# those had to be written; these six are all rude.)
#
# And the first failure? `Sure!` begins well and ends too early. With a sign that can be said: once
# more the six good answers and `Sure!` beside them, its words with weight 0 and its EOS with −1.

# %%
with_no, end = [*good, "Sure!"], len(encode_response(tokenizer, "Sure!")) - 1
weights = torch.ones(answer_logprobs(sft, with_no)[1].shape)
weights[-1, :end], weights[-1, end] = 0, -1
show("trained on good answers", sampled_good)
sampled_no = sampled(train(with_no, 20, weights))
show("and not to end there", sampled_no)
assert sampled_no["Sure!"] < sampled_good["Sure!"] / 2

# %% [markdown]
# `Sure!` alone falls from 11 to 3 of 128, and the mean gold score stays.
#
# A weight with a sign for each token: that is the whole idea of the course. PPO keeps this loss,
# nearly; its weight is called the **advantage** $A_t$: how much better it went than expected. The
# rest is about where the weights come from (preferences, a reward model, a critic) and how to keep
# the steps small.
#
# ## Break it
#
# **A negative weight alone.** Say no to the whole of the rude answers, and yes to nothing.

# %%
log_good = [log_p(sft, good).mean().item()]
note = lambda model: log_good.append(log_p(model, good).mean().item())  # noqa: E731
only_no = train(half_rude_answers, 8, -1.0, 0.1, note)
print(f"log p of the good answers: before {log_good[0]:.1f}, after 3 steps {log_good[3]:.1f}")
print("after 8 steps below -100:", log_good[-1] < -100)
three_steps = train(half_rude_answers, 3, -1.0, 0.1)
split = [parts_of(three_steps, x, "Sure!") - parts_of(sft, x, "Sure!") for x in good]
first, rest = torch.stack(split).mean(0).tolist()
print(f"after 3 steps: opening {first:+.1f}, the shared rest {rest:+.1f}")
print("unreadable, of 128 samples:", sampled(only_no)["unreadable"])
assert log_good[-1] < -100


# %% [markdown]
# The mirror image of the first failure: what the good answers share with the rude
# ones, all but the opening, goes down with them. And while $-\log p$ has a floor at 0,
# $+\log p$ has none: there is always more to gain. The model is destroyed within a few steps. A
# negative signal needs a *baseline* (the weights of the answers to one question add up to about 0),
# small steps (PPO's clip) and a leash (the KL to the reference). Each of these gets its notebook.
#
# **The shift forgotten.** Compare the logits at a position with the token *at* that position. It
# runs, the loss falls nicely, and the model gets worse:

# %%
from minippo import gather_logprobs


def unshifted(logits, tokens, loss_mask):
    return -masked_mean(gather_logprobs(logits, tokens), loss_mask)


# %%
batch = batch_of(good)
loss_mask = F.pad(batch.mask, (len(prompt), 0))
model = copy.deepcopy(sft)
optimizer = torch.optim.SGD(model.parameters(), 0.05)
wrong, right = [], []
for _ in range(31):
    logits = token_logits(model, batch.tokens, batch.attention_mask)
    loss = unshifted(logits, batch.tokens, loss_mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    wrong.append(loss.item())
    right.append(lm_loss(logits, batch.tokens, loss_mask).item())

# %%
print(f"loss without the shift {wrong[0]:5.2f} -> {wrong[30]:5.2f}")
print(f"lm_loss                {right[0]:5.2f} -> {right[30]:5.2f}")
assert wrong[30] < wrong[0] / 2 and right[30] > right[0] + 1

# %% [markdown]
# What it learned: repeat the token you have just read. A falling loss proves nothing but that
# something is being minimised.
#
# **The mask forgotten.** The same batch with eight columns of padding more:

# %%
logprobs, mask = answer_logprobs(sft, good)
token_losses = -logprobs.detach()
longer, longer_mask = F.pad(token_losses, (0, 8)), F.pad(mask, (0, 8), value=False)
means = masked_mean(token_losses, mask), masked_mean(longer, longer_mask)
print(f"masked_mean  {means[0]:.3f} -> {means[1]:.3f}")
print(f"plain mean   {token_losses.mean():.3f} -> {longer.mean():.3f}")
assert torch.isclose(*means)
assert longer.mean() < token_losses.mean()

# %% [markdown]
# With the plain mean, how much a token counts depends on the longest answer beside it in the batch.
#
# **The sign forgotten.** One step with all weights $-1$:

# %%
wrong_sign = train(good, 1, weights=-1.0)
fall = (log_p(wrong_sign, good) - log_p(sft, good)).mean().item()
print(f"sign turned: after one step log p of the demonstrations {fall:+.2f}")
assert fall < 0

# %% [markdown]
# ## What the note says, and what is meant
#
# You have just measured the main points of its first chapter. Three of its sentences are loose:
#
# | as printed | as meant |
# |---|---|
# | each step learns a triple (question, winner, loser) | the *reward model* does; PPO sees scores |
# | the loss is a weighted mean over tokens | the weight is the token's advantage; it has a sign |
# | PPO optimises the policy, not the output distribution | for a language model they are the same |
#
# ## Claims
#
# What the text says, asserted with room to spare:

# %%
more_likely = bool((history[-1] > history[0] + 1).all())
begun = {"Sure!": "Sure!", twice: shared}  # each bad answer and its shared beginning
moved = torch.stack([parts_of(only_good, *pair) - parts_of(sft, *pair) for pair in begun.items()])
by_beginning = bool((moved[:, 0] > 1).all() and (moved[:, 1] < 0).all())
mean_rose = sampled_good["gold"] > sampled_sft["gold"] + 1
print("bad answers more likely after SFT on good ones:", more_likely)
print("in the end by their shared beginning, not by the rest:", by_beginning)
print("the mean gold score rose nevertheless:", mean_rose)
assert more_likely and by_beginning and mean_rose

# %%
print("log p of the rude sentence, weights +1, 0, -1:", [f"{x:+.1f}" for x in change.values()])
print("rude, of 128 samples:", [found["rude"] for found in judged.values()])
assert change[1.0] > 1 > abs(change[0.0]) and change[-1.0] < -5 and gains[-1.0] > 1
assert judged[1.0]["rude"] > 60 > 40 > judged[0.0]["rude"] and judged[-1.0]["rude"] < 10

# %% [markdown]
# ## Quiz
#
# 1. `Sure!` was in no demonstration as a whole answer. Why did it get more likely?
# 2. What would happen to the curve of the bad answer if you trained for very long?
# 3. Two answers in a batch, of 3 and of 30 tokens. How much of `lm_loss` comes from each, if all
#    token losses are equal? And with a mean of row means?
# 4. With $w_t = 0$ on the rude tokens the insult lost 0.4 nats, with $w_t = -1$ it lost 8. Why did
#    the good advice after it hardly help against it?
# 5. Why can a loss with negative weights fall without end?
#
# <details><summary>Answers</summary>
#
# 1. Its first two tokens were in all of them. The gain of the shared beginning was larger than the
#    loss of the ending.
# 2. It would come down further, as the figure begins to show: the good endings use up the
#    probability after the shared beginning. It never gets a push of its own, and it comes down only
#    as far as the data crowd it out.
# 3. 3/33 and 30/33, since each token counts once. With a mean of row means one half each: a token
#    of the short answer would weigh ten times as much.
# 4. The loss of the advice is that of a *continuation*: $\log \pi$ of the advice, given the insult.
#    It says what should follow the insult. It does not say that the insult should not have come.
# 5. $-w \log p$ with $w < 0$ is smallest where $\log p \to -\infty$, and a logarithm has no lower
#    bound.
#
# </details>
#
# **Next:** a weight needs somebody who judges. People compare answers more reliably than they
# grade them. Notebook 02 takes such comparisons apart: preference data, and the odd rows in it.

# %%
from minippo.checks import scored

scored()
