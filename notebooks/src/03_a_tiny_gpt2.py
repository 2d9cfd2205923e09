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
# # 03 · A tiny GPT-2: tokens, the shift, log-probabilities
#
# **Promise.** You write the four short functions that stand between a language model and every
# formula of PPO: which tokens count, which outputs predict them, what their log-probabilities are,
# and at which position each token stands. You check them against the model read one token at a
# time, against `transformers`, and in a world where the probabilities of all answers must add up to
# one. Then you train a policy on answers only, and see which copy of a policy is a reference.
# **Needs.** Notebook 00; softmax and logarithm; `lm_loss` of notebook 01 is used. **Time.** 45
# minutes, of which the computer needs less than one. Four exercises.
#
# ## The question
#
# PPO never looks at an answer as text. It looks at one number per token: the logarithm of the
# probability that the model gave to this token when it was its turn. The model returns far more
# numbers than that, and none of them carries a label. **Which number of the output belongs to which
# token of the answer?** Numbers taken one place too late still have the right shape and look
# plausible, and the model that is trained on them learns something else.

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch

# %% [markdown]
# ## Text becomes tokens
#
# A **token** is a piece of text with a number, its *id*; the list of all of them is the
# **vocabulary**. The **query** is what the model reads: the question in the format of HH-RLHF,
# which ends in `Assistant:`. The **response** is what it writes. It ends in **EOS**, the
# end-of-sequence token, printed as `<|endoftext|>`. Mind the blanks: ` red` and `red` are different
# tokens.
# %%
from minippo import Policy, encode_prompt, encode_response, load_tokenizer
from minippo.plots import COLOURS

tokenizer = load_tokenizer("sft")
policy = Policy.from_pretrained("sft")
query = encode_prompt(tokenizer, "How do I grow sweet tomatoes?")
response = encode_response(tokenizer, "You can give the plants rich soil.")
for name, ids in (("query", query), ("response", response)):
    print(f"{name}: {len(ids)} tokens, ids {ids}")
    print([tokenizer.decode([token]) for token in ids])

# %% [markdown]
# ## What the model returns
#
# The **policy** is a GPT-2 as you know it from `transformers`, only smaller: two blocks of width
# 120 instead of twelve of width 768. For every position it returns one number for each token of the
# vocabulary, the **logits**. Softmax makes probabilities of them: those of the *next* token.

# %%
tokens = torch.tensor([query + response])
with torch.no_grad():
    logits = policy(tokens).logits
Q, R = len(query), len(response)
B, T, V = logits.shape
print(type(policy).__name__, "with", sum(p.numel() for p in policy.parameters()), "parameters")
print(f"n_layer = {policy.config.n_layer} blocks of width n_embd = {policy.config.n_embd}")
print(f"B = {B}, Q = {Q}, R = {R}, T = Q + R = {T}, V = {V}")
print("tokens", tuple(tokens.shape), "-> logits", tuple(logits.shape))
assert T == Q + R and V == len(tokenizer)

# %% [markdown]
# ## The shift, drawn
#
# The logits at position $t$ come from a model that has read the tokens up to and including $t$.
# They say what comes at $t + 1$. So the first token of the response is predicted by the *last token
# of the query*, and the logits at the last position, after EOS, predict nothing that we have.

# %%
labels = [repr(tokenizer.decode([token])) for token in tokens[0].tolist()]
probabilities = logits[0].softmax(-1)
next_probability = probabilities[torch.arange(T - 1), tokens[0, 1:]].tolist()
print("position  reads              predicts            with probability")
for t in range(Q - 3, T - 1):
    mark = "  in the window" if Q - 1 <= t < T - 1 else ""
    print(f"{t:8d}  {labels[t]:17s}  {labels[t + 1]:17s}  {next_probability[t]:15.3f}{mark}")

# %% tags=["nbval-ignore-output"]
figure, axis = plt.subplots(figsize=(10.8, 2.8), layout="constrained")
window = f"grey: the response window, positions Q - 1 = {Q - 1} to T - 2 = {T - 2}"
for t in range(Q - 3, T):
    colour = COLOURS[0] if t < Q else COLOURS[1]
    box = {"boxstyle": "round", "fc": "white", "ec": colour}
    axis.text(t, 1, labels[t].strip("'").replace("<|endoftext|>", "EOS"), ha="center", bbox=box)
    axis.text(t, 0, f"logits[{t}]", ha="center", fontsize=9)
    if t < T - 1:
        arrow = {"arrowstyle": "->", "color": "black" if t >= Q - 1 else "0.7"}
        axis.annotate("", (t + 0.9, 0.85), (t, 0.2), arrowprops=arrow)
        axis.text(t + 0.62, 0.45, f"{next_probability[t]:.3f}", fontsize=9)
axis.axvspan(Q - 1.4, T - 1.5, 0.12, 0.28, color="0.9", zorder=0)
axis.set(xlim=(Q - 3.6, T - 0.3), ylim=(-0.3, 1.3), title=window)
axis.axis("off")
plt.show()

# %% [markdown]
# Query tokens are blue, response tokens orange. The number at an arrow is the probability that the
# model gave to the token it points to, the same as in the table. The grey stretch is the
# **response window**: the `R` positions whose logits predict the `R` tokens of the response.
#
# ## The formula
#
# $$\log \pi(y \mid x) = \sum_{t=0}^{R-1} m_t \, \log \pi(y_t \mid x, y_{<t})
# \qquad
# \log \pi(y_t \mid x, y_{<t}) = z_t[y_t] / \tau - \log \sum_{v=0}^{V-1} \exp(z_t[v] / \tau)$$
#
# | symbol | variable | shape | function |
# |---|---|---|---|
# | $x$, $y$ | `query`, `response` | `(B, Q)`, `(B, R)` | `left_pad`, `right_pad` |
# | $z_t$ | `logits`, cut to the window | `(B, R, V)` | `response_window` |
# | $m_t$: does token $t$ count? | `mask` | `(B, R)` bool | `response_mask` |
# | $\log \pi(y_t \mid x, y_{<t})$ | `logprobs` | `(B, R)` | `gather_logprobs` |
# | $\tau$, the temperature | `temperature` | a number, here 1 | an argument of `gather_logprobs` |
# | the place of each token | `position_ids` | `(B, T)` | `position_ids` |
#
# One index $t$ serves everything that PPO computes later: `logprobs[:, t]`, the value before the
# token, its reward and its advantage. All of them share one mask.
#
# The code quoted in many notes on PPO says that `gather` "returns the probability". It returns the
# *log*-probability, if what it gathers from went through `log_softmax`.
#
# ## By hand
#
# A vocabulary of two: token 0 is a word, token 1 is EOS. Two responses, three positions. With
# logits $(\log 3, 0)$ the probabilities are $3 : 1$, so $\tfrac34$ and $\tfrac14$. What stands
# after the first EOS is padding and does not count.
#
# ```text
# response         window logits                      probability of the token   mask
# 0  0  1          (log 3, 0) (log 3, 0) (0, log 3)   3/4  3/4  3/4              1 1 1
# 0  1  0          (0, 0)     (0, log 3) (9, 9)       1/2  3/4   -               1 1 0
# ```
#
# So $\log \pi(y \mid x)$ is $3 \log \tfrac34 = -0.863$ for the first and
# $\log \tfrac12 + \log \tfrac34 = -0.981$ for the second.

# %%
L = math.log(3)
paper_response = torch.tensor([[0, 0, 1], [0, 1, 0]])
paper_logits = torch.tensor([[[L, 0.0], [L, 0.0], [0.0, L]], [[0.0, 0.0], [0.0, L], [9.0, 9.0]]])
print(paper_logits.softmax(-1)[0], paper_logits.softmax(-1)[1], sep="\n")
print(f"{3 * math.log(3 / 4):.3f} {math.log(1 / 2) + math.log(3 / 4):.3f}")

# %% [markdown]
# ## Exercise 1: `response_mask`
#
# Difficulty 2 of 5 · importance 5 of 5 · 5 to 10 minutes
#
# True for every token up to *and with* the first EOS, False after it. EOS counts: it is the token
# by which the model says that it has finished, and it has to be learned like any other. A response
# without EOS was cut at the length limit; all of it counts. What follows the first EOS may be
# anything, another EOS too. (In many projects the padding *is* EOS. A mask made of "not equal to
# the padding" then loses the EOS, and the model never learns to stop.)
#
# <details><summary>Hint 1: a nudge</summary>
#
# For each position count the EOS tokens *strictly before* it. Where does the token count?
#
# </details>
# <details><summary>Hint 2: the tool</summary>
#
# `cumsum(dim=1)` of `response == eos_id` counts the EOS tokens up to and with each position.
# Take off the position's own.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `is_eos = (response == eos_id).long()`, then `is_eos.cumsum(dim=1) - is_eos`. The mask is True
# where this is 0.
#
# </details>


# %%
def response_mask(response, eos_id):
    """response: (B, R) int -> (B, R) bool."""
    ### BEGIN SOLUTION
    is_eos = (response == eos_id).long()
    return is_eos.cumsum(dim=1) - is_eos == 0
    ### END SOLUTION


# %%
from minippo.checks import check_response_mask

response_mask = check_response_mask(response_mask)

# %%
paper_mask = response_mask(paper_response, 1)
print(paper_mask)
assert paper_mask.sum() == 5

# %% [markdown]
# ## Exercise 2: `response_window`
#
# Difficulty 1 of 5 · importance 5 of 5 · 5 minutes
#
# Cut any `(B, T, ...)` output of a model down to the `R` positions that predict the response. Look
# at the grey stretch of the figure: it begins at the last token of the query, position $Q - 1$, and
# ends before the last position, $T - 1$.
#
# <details><summary>Hint 1: a nudge</summary>
#
# You know `R` and the length of `x` along its second axis. What is $Q$ then?
#
# </details>
# <details><summary>Hint 2: the shapes</summary>
#
# The result has `R` positions. Its last one is position $T - 2$, so the slice ends at $T - 1$
# (which Python leaves out).
#
# </details>
# <details><summary>Hint 3: nearly the line</summary>
#
# With `last = x.shape[1] - 1` the slice along the second axis is `last - response_length : last`.
#
# </details>


# %%
def response_window(x, response_length):
    """x: (B, T, ...) -> (B, response_length, ...)."""
    ### BEGIN SOLUTION
    last = x.shape[1] - 1
    return x[:, last - response_length : last]
    ### END SOLUTION


# %%
from minippo.checks import check_response_window

response_window = check_response_window(response_window)

# %% [markdown]
# What does each position of the window see last? The position before "its" token:

# %%
read_last = response_window(tokens, R)[0].tolist()
for before, token in zip(read_last, response):
    print(f"{tokenizer.decode([before])!r:12s} predicts {tokenizer.decode([token])!r}")
assert read_last == [query[-1], *response[:-1]]

# %% [markdown]
# ## Exercise 3: `gather_logprobs`
#
# Difficulty 2 of 5 · importance 5 of 5 · 10 minutes
#
# The second half of the formula: from logits to the log-probability of each given token. No shift
# here: the logits have been cut already, `logits[:, t]` predicts `tokens[:, t]`. The
# **temperature** $\tau$ is what the logits are divided by before the softmax when tokens are
# sampled; below 1 it makes likely tokens likelier. (The $\tau$ of notebook 02 is another one: the
# annotator's noise.) Whoever samples with it has to compute the log-probabilities with it, too.
# Probabilities can be too small for a float: 200 nats below the best, and `softmax` gives 0 in
# float32; in the float64 of these lessons it does at 750. (A *nat* is the unit of the natural
# logarithm.)
#
# <details><summary>Hint 1: a nudge</summary>
#
# Two steps: normalise over the vocabulary, then pick one entry per position. The logarithm of a
# softmax has a function of its own, which does not go through the tiny probabilities.
#
# </details>
# <details><summary>Hint 2: the shapes</summary>
#
# `torch.log_softmax(..., dim=-1)` is `(B, R, V)`. `gather` along the last axis wants an index with
# as many axes: `tokens.unsqueeze(-1)` is `(B, R, 1)`.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# `log_softmax` of `logits / temperature`; `.gather(-1, tokens.unsqueeze(-1))`; `.squeeze(-1)`. Do
# not write `logits /= temperature`: that would change the model's own output.
#
# </details>


# %%
def gather_logprobs(logits, tokens, temperature=1.0):
    """logits: (B, R, V), tokens: (B, R) int -> (B, R)."""
    ### BEGIN SOLUTION
    logprobs_all = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs_all.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ### END SOLUTION


# %%
from minippo.checks import check_gather_logprobs

gather_logprobs = check_gather_logprobs(gather_logprobs)

# %% [markdown]
# Held against the numbers on paper:

# %%
paper_logprobs = gather_logprobs(paper_logits, paper_response).masked_fill(~paper_mask, 0)
print(paper_logprobs)
print("log-probability of each response:", paper_logprobs.sum(1))
on_paper = torch.tensor([3 * math.log(3 / 4), math.log(1 / 2) + math.log(3 / 4)])
assert torch.allclose(paper_logprobs.sum(1), on_paper)

# %% [markdown]
# ## Is this right? The model, one token at a time
#
# `gather_logprobs` of the `response_window` gives the log-probabilities of the real answer from one
# pass over all tokens. Here is a slow way to the same numbers without any shift: give the model the
# query and the first $t$ tokens of the response, look at the *last* logits, and read off token $t$.

# %%
answer = torch.tensor([response])
logprobs = gather_logprobs(response_window(logits, R), answer)[0]
slow = []
for t in range(R):
    with torch.no_grad():
        last = policy(torch.tensor([query + response[:t]])).logits[0, -1]
    slow.append(float(last.softmax(-1)[response[t]].log()))
for token, fast, by_hand in zip(response, logprobs.tolist(), slow):
    print(f"{tokenizer.decode([token])!r:16s} {fast:8.3f} {by_hand:8.3f}")
assert torch.allclose(logprobs, torch.tensor(slow), atol=1e-4)

# %% [markdown]
# A second witness is `transformers`: a model that gets `labels` returns the mean loss of the tokens
# whose label is not -100, and makes the shift itself.

# %%
labels_of_answer = torch.tensor([[-100] * Q + response])
policy.loss_type = "ForCausalLM"  # transformers asks which of its losses
with torch.no_grad():
    theirs = policy(tokens, labels=labels_of_answer).loss
print(f"transformers {float(theirs):.4f}, minus the mean of ours {float(-logprobs.mean()):.4f}")
assert abs(float(theirs + logprobs.mean())) < 1e-4

# %% [markdown]
# ## Is this right? A world where everything can be added up
#
# In `minippo.worlds.oracle` there are worlds so small that all answers can be listed: five words
# (the first is the end), at most three tokens, 85 responses. Whatever model we take, the
# probabilities of all responses must add up to exactly one. Shift, gather and mask all have to be
# right for that. Here is a GPT-2 with random weights in such a world. The prompt is one token, so
# $Q = 1$.

# %%
from minippo import tiny_gpt2
from minippo.worlds.oracle import feelings_world

world, _ = feelings_world()
small = tiny_gpt2(len(world.words), n_layer=1, n_embd=16, n_head=2, n_positions=8, eos_id=0)
with torch.no_grad():
    for parameter in small.parameters():
        parameter.mul_(5)  # larger weights, so that it has strong opinions
    world_logits = small(world.tokens, attention_mask=world.attention_mask.long()).logits
world_mask = response_mask(world.response, 0)
print(len(world.responses), "responses, such as", *map(world.text, world.responses[3:6]))
print("world.response", tuple(world.response.shape), "logits", tuple(world_logits.shape))
assert torch.equal(world_mask, world.mask)

# %% [markdown]
# ## Break it: the shift and the mask
#
# Three mistakes beside the right way. None of them raises an error, and all have the right shape.

# %%
length = world.length
windows = {"right": response_window(world_logits, length), "no shift": world_logits[:, -length:]}
masks = {
    "right": world_mask,
    "EOS dropped": world_mask & (world.response != 0),
    "padding counted": torch.ones_like(world_mask),
}
totals = {}
for name, (window, mask) in {
    "all right": ("right", "right"),
    "no shift": ("no shift", "right"),
    "EOS dropped": ("right", "EOS dropped"),
    "padding counted": ("right", "padding counted"),
}.items():
    token_logprobs = gather_logprobs(windows[window], world.response)
    sequence_logprobs = token_logprobs.masked_fill(~masks[mask], 0).sum(1)
    totals[name] = float(sequence_logprobs.exp().sum())
    print(f"{name:16s} the 85 probabilities add up to {totals[name]:.4f}")

# %% [markdown]
# Without its EOS, an answer is only a beginning, and a beginning is at least as likely as any of
# its endings: the sum is too large. With the padding counted, answers pay for tokens that they do
# not have: too small.
#
# On the real model the missing shift looks like this:

# %%
unshifted = gather_logprobs(logits[:, Q:], answer)[0]
for name, row in (("right", logprobs), ("no shift", unshifted)):
    print(f"{name:8s}", *(f"{x:6.2f}" for x in row.tolist()), f" mean {float(row.mean()):.2f}")
assert unshifted.mean() < logprobs.mean() - 5
assert abs(totals["all right"] - 1) < 1e-5
assert min(abs(total - 1) for name, total in totals.items() if name != "all right") > 0.05

# %% [markdown]
# ## Left padding, and the places of the tokens
#
# Queries in a batch differ in length. They are filled up on the **left**, so that every response
# begins in the same column and the sampler can append to all of them. The `attention_mask` is
# False at the padding, and the model does not look there. That is not enough. GPT-2 adds to each
# token a learned vector for its **position**, and if nobody says otherwise the positions are
# $0, 1, 2 \ldots$ from the left edge: padding is counted.
#
# ```text
# tokens           pad  pad  How  do   I
# attention_mask    0    0    1    1   1
# counted from 0    0    1    2    3   4      wrong: the same query, moved
# position_ids      0    0    0    1   2      right: as without padding
# ```

# %% [markdown]
# ## Exercise 4: `position_ids`
#
# Difficulty 1 of 5 · importance 4 of 5 · 5 minutes
#
# The position of a real token is the number of real tokens before it. Padding on the left gets 0
# (any valid position would do, since nobody looks there; -1 is not valid). Padding on the right
# repeats the position of the last real token. The mask may hold bools or integers.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Count the real tokens from the left, and start at 0 and not at 1.
#
# </details>
# <details><summary>Hint 2: the tool</summary>
#
# `attention_mask.long().cumsum(-1)` counts up to and with each position.
#
# </details>
# <details><summary>Hint 3: nearly the line</summary>
#
# Take off 1, then `clamp(min=0)` for the padding on the left.
#
# </details>


# %%
def position_ids(attention_mask):
    """attention_mask: (B, T) -> (B, T) int."""
    ### BEGIN SOLUTION
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    ### END SOLUTION


# %%
from minippo.checks import check_position_ids

position_ids = check_position_ids(position_ids)

# %% [markdown]
# ## Break it: forget the position ids
#
# New questions with demonstrated answers. A **demonstration** is an answer that somebody wrote.
# Minus the mean of its log-probabilities says how little the model expected it: 0 is best. That is
# the loss of SFT. `lm_loss` is the one you wrote in notebook 01 (minippo's own if you did not). Its
# `loss_mask` runs over all tokens of a row, query included; we let it be True on the response only.
# `join_query_response` pads queries left and responses right.
#
# > **Predict.** What do 16 columns of padding cost if the position ids are forgotten, in nats per
# > token? And 64?
#
# <details><summary>Answer</summary>
#
# 16 cost next to nothing, 64 more than two and a half.
#
# </details>

# %%
from minippo import encode_rows, join_query_response
from minippo.checks import mine
from minippo.worlds.tinyhh.rows import demonstrations

lm_loss = mine("lm_loss")
pad_id = tokenizer.pad_token_id


def batch_of(rows):
    """Encoded rows -> tokens, attention_mask, loss_mask, each (B, T)."""
    prompts, answers = [row.prompt for row in rows], [row.responses[0] for row in rows]
    tokens, attention_mask, mask = join_query_response(prompts, answers, pad_id)
    in_query = torch.zeros(len(rows), tokens.shape[1] - mask.shape[1]).bool()
    return tokens, attention_mask, torch.cat([in_query, mask], 1)


# %%
few, _ = encode_rows(demonstrations("validation", 32), tokenizer, 64, 48, ("answer",))
batch = batch_of(few)
row = min(range(len(few)), key=lambda i: few[i].length)
for token, real, learned in zip(*(x[row].tolist() for x in batch)):
    if real:
        print(f"{tokenizer.decode([token])!r:15s} {'learned' if learned else 'read only'}")
print("and", int((~batch[1][row]).sum()), "padding tokens; rows in the batch:", len(few), end=", ")
print(32 - len(few), "of 32 are too long")

# %%
from torch.nn.functional import pad


@torch.no_grad()
def loss_with_padding(extra, how):
    tokens = pad(batch[0], (extra, 0), value=pad_id)
    attention_mask, loss_mask = (pad(mask, (extra, 0)) for mask in batch[1:])
    if how == "no mask at all":
        attention_mask = torch.ones_like(attention_mask)
    options = {"position_ids": position_ids(attention_mask)} if how == "position ids" else {}
    logits = policy(tokens, attention_mask=attention_mask.long(), **options).logits
    return float(lm_loss(logits, tokens, loss_mask))


widths = [0, 4, 16, 32, 64, 96]
ways = ("position ids", "no position ids", "no mask at all")
losses = {how: [loss_with_padding(extra, how) for extra in widths] for how in ways}
print(f"{'extra columns':16s}", *(f"{extra:6d}" for extra in widths))
for how in ways:
    print(f"{how:16s}", *(f"{loss:6.3f}" for loss in losses[how]))

# %% tags=["nbval-ignore-output"]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for how in ways:
    axis.plot(widths, losses[how], marker="o", label=how)
axis.set(xlabel="extra columns of padding on the left", ylabel="loss, nats per token")
axis.set_title(f"the same {len(few)} answers", loc="left")
axis.legend(frameon=False)
axis.grid()
plt.show()

# %%
right, wrong = (torch.tensor(losses[how]) for how in ways[:2])
print(f"with position ids the loss moves by {float(right.max() - right.min()):.4f}")
at = dict(zip(widths, (wrong - right).tolist()))
print(f"without: {at[16]:+.3f} at 16 extra columns, {at[96]:+.3f} at 96")
assert right.max() - right.min() < 1e-3 and at[16] < 0.1 and at[96] > 1

# %% [markdown]
# Without any mask the padding is read as well, and the loss tells at once. With the
# mask but without position ids next to nothing happens at first, and that is the danger. (The 0.02
# at 0 extra columns are the padding that the shorter queries have anyway.) Then a batch with one
# long query comes, the short ones move to the right, and the model falls apart. Why there? Look at
# how long the texts were that it was pretrained on:

# %%
from minippo.worlds.tinyhh.rows import pretrain_texts

text_lengths = torch.tensor([len(tokenizer.encode(text)) for text in pretrain_texts(1000)])
print(f"of 1,000 texts half have up to {int(text_lengths.median())} tokens", end=", ")
print(f"{float((text_lengths > 100).double().mean()):.1%} more than 100, none more than", end=" ")
print(int(text_lengths.max()))
print(f"the rows here have {batch[0].shape[1]} columns, and up to 96 more")

# %% [markdown]
# The vectors of the positions behind that were hardly ever trained. A query moved by a few places
# still stands where other texts have stood; moved by a hundred it stands nowhere. Another model
# breaks elsewhere. The only safe way is to pass the position ids wherever rows are padded on the
# left, as all of minippo does.
#
# ## Training: the loss on the response only
#
# **SFT** (supervised fine-tuning) makes demonstrated answers likelier:
#
# $$L_{SFT} = -\frac{\sum_t m_t \log \pi(y_t \mid x, y_{<t})}{\sum_t m_t}$$
#
# The query $x$ is read, not learned: the policy will never have to write questions. `lm_loss` makes
# the shift inside. We start from the *base* model, which has only been pretrained on text, and take
# 24 steps in three ways: as it should be; with the query and the response learned alike; and with
# the shift forgotten.
#
# > **Predict.** Which of the three training losses falls most?
#
# <details><summary>Answer</summary>
#
# That without the shift.
#
# </details>

# %%
from minippo import token_logits

STEPS = 24
rows, _ = encode_rows(demonstrations("sft", 1000), tokenizer, 32, 32, ("answer",))
batches = [batch_of(rows[16 * step : 16 * step + 16]) for step in range(STEPS)]
print(len(rows), "demonstrations that fit,", STEPS * 16, "of them used")


# %%
def sft_loss(logits, tokens, attention_mask, loss_mask):
    return lm_loss(logits, tokens, loss_mask)


def loss_on_everything(logits, tokens, attention_mask, loss_mask):
    return lm_loss(logits, tokens, attention_mask)


def loss_without_shift(logits, tokens, attention_mask, loss_mask):
    return -gather_logprobs(logits, tokens)[loss_mask].mean()


@torch.no_grad()
def held_out_loss(model):
    tokens, attention_mask, loss_mask = batch
    return float(lm_loss(token_logits(model, tokens, attention_mask), tokens, loss_mask))


# %%
def train(loss_function):
    """Base -> SFT model: the training loss of each step, and the held-out loss now and then."""
    model, history, checks = Policy.from_pretrained("base"), [], []
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-5, weight_decay=0.0)
    for step, (tokens, attention_mask, loss_mask) in enumerate(batches):
        if step % 6 == 0:
            checks.append(held_out_loss(model))
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 - step / STEPS)  # falls to 0
        logits = token_logits(model, tokens, attention_mask)
        loss = loss_function(logits, tokens, attention_mask, loss_mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(loss.detach()))
    return history, [*checks, held_out_loss(model)]


# %%
kinds = {
    "response only": sft_loss,
    "query too": loss_on_everything,
    "no shift": loss_without_shift,
}
trained = {name: train(loss_function) for name, loss_function in kinds.items()}
print("nats per token  its own training loss   held-out loss of the response")
for name, (history, checks) in trained.items():
    print(f"{name:14s} {history[0]:9.2f} -> {history[-1]:.2f}", end="")
    print(f"{checks[0]:15.2f} -> {checks[-1]:.2f}")

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(1, 2, figsize=(10.8, 3), layout="constrained")
places = range(STEPS), range(0, STEPS + 1, 6)
for part, title in enumerate(("its own training loss", "held-out loss of the response")):
    for name, curves in trained.items():
        axes[part].plot(places[part], curves[part], label=name, marker="o" if part else None)
    axes[part].set(xlabel="step", ylabel="nats per token", title=title)
    axes[part].grid()
axes[0].axhline(math.log(V), color="0.5", linestyle=":", label="knows nothing: log V")
axes[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Without the shift the training loss falls most, as if this model learned best. It reads token $t$
# and is asked for token $t$. (Trained for longer it learns to copy, as in notebook 01.) The right
# picture tells: after six steps nothing shows, then it forgets how to predict the next token. The
# left one could have told at its very first step. A model that knows nothing gives every token the
# probability $1/V$ and has a loss of $\log V$. A *pretrained* model above that is being asked the
# wrong question.
#
# With the right loss there is little left to learn in 24 steps: one hundredth of a nat. Learning
# the query too does no harm here. It is left out because the policy never has to write a query, not
# because it hurts.

# %%
(history, _), before = trained["no shift"], trained["no shift"][1][0]
after = {name: checks[-1] for name, (_, checks) in trained.items()}
print(f"log V = {math.log(V):.2f}; first loss without the shift {history[0]:.2f}")
assert history[0] > math.log(V) + 3 and history[-1] < history[0] - 3
assert after["response only"] < before and after["no shift"] > before + 0.3
assert abs(after["query too"] - after["response only"]) < 0.05
checks = trained["no shift"][1]
print("held-out loss without the shift, every 6 steps:", [round(loss, 2) for loss in checks])
print("lower than before with the response only, much higher without the shift")

# %% [markdown]
# ## The reference: a frozen copy
#
# PPO compares the policy with the model it started from, the **reference** $\pi_{ref}$, token by
# token: $\log \pi(y_t) - \log \pi_{ref}(y_t)$, notebook 05 is about it. The reference has to stay
# what it was. "Keep a second name for it" is not enough, and neither is a shallow copy: both share
# their weights with the policy and move along. We take five steps that make our one answer
# likelier. They show which of the three stays what it was:

# %%
from minippo import frozen_copy

student = Policy.from_pretrained("sft")
references = {
    "frozen_copy(policy)": frozen_copy(student),
    "the same object": student,
    "copy.copy(policy)": copy.copy(student),
}


def answer_logprobs(model):
    return gather_logprobs(response_window(model(tokens).logits, R), answer)


@torch.no_grad()
def log_ratio(model, ref_model):
    return float((answer_logprobs(model) - answer_logprobs(ref_model)).sum())


print("before:", [round(log_ratio(student, ref), 3) for ref in references.values()])

# %%
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4)
for _ in range(5):
    (-answer_logprobs(student).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
drift = {name: log_ratio(student, ref) for name, ref in references.items()}
for name, moved in drift.items():
    print(f"{name:20s} log π(y|x) - log π_ref(y|x) = {moved:.2f}")
asking = sum(p.requires_grad for p in references["frozen_copy(policy)"].parameters())
print("parameters of the frozen copy that ask for gradients:", asking)

# %% [markdown]
# With a reference that moves along, the penalty of PPO is 0 for ever, and the curve of the KL looks
# wonderful: nothing drifts.
#
# ## Claims
#
# What the text says, asserted:

# %%
assert torch.allclose(logprobs, torch.tensor(slow), atol=1e-4)
print("one pass gives the log-probabilities of the model read token by token")
assert abs(totals["all right"] - 1) < 1e-5 and abs(totals["no shift"] - 1) > 1
print("the probabilities of all 85 responses add up to 1, and not without the shift")
assert max(losses["position ids"]) - min(losses["position ids"]) < 1e-3
print("with position ids up to 96 more columns of left padding change nothing")
assert drift["frozen_copy(policy)"] > 1 and drift["the same object"] == 0
assert drift["copy.copy(policy)"] == 0
print("only a real copy of the weights is a reference")

# %% [markdown]
# ## Quiz
#
# 1. The query has 12 tokens, the response 5. Which logits (by position) give the log-probabilities
#    of the response?
# 2. Padding and EOS are the same token in many tokenizers. Why is a mask made of
#    `response != pad_id` harmful then?
# 3. Right padding needs no position ids, left padding does. Why?
# 4. You sampled with temperature 0.7 and compute log-probabilities without it. Which of the checks
#    in this notebook would notice?
# 5. The base model is good, and the first SFT loss is 15 nats with a vocabulary of 2,896. It falls
#    nicely. What do you look at first?
#
# <details><summary>Answers</summary>
#
# 1. Positions 11 to 15: from the last token of the query ($Q - 1$) to the last but one ($T - 2$,
#    with $T = 17$).
# 2. It is False at the EOS that ends an answer. Nothing is ever learned at that token: not in SFT,
#    where the model does not learn to stop, and not in PPO, where the score is given there.
# 3. Positions are counted from the left, and attention looks only to the left. Padding on the right
#    comes after everything real, so it moves nothing and nobody sees it.
# 4. None that compares with the model at temperature 1: those numbers are right for *another*
#    distribution than the one that sampled. The sum over all responses is 1 for any temperature,
#    too. What shows it is a comparison with the sampler: how often is each token drawn? Notebook 05
#    makes a negative KL of this mistake.
# 5. At the shift. Guessing blindly costs $\log 2896 = 8$ nats, so a trained model with 15 is
#    confident of something else: it predicts the next token and is asked for the last one it read.
#
# </details>
#
# **Next:** the policy can be read now. Notebook 04 trains the model that judges it: a reward model,
# from nothing but comparisons.

# %%
from minippo.checks import scored

scored()
