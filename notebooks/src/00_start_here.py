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
# # 00 · Start here: the four models
#
# **Promise.** In a few minutes you meet every part of RLHF with PPO, on models so small that you
# can read all of their numbers. **Needs.** You have seen the words policy, reward and KL; PyTorch
# basics. **Time.** 15 minutes to read, less than one to run.
#
# **The question.** A language model has learned to imitate a mixed crowd: helpful people, rude
# people, people who help with anything. We can *judge* answers, but we cannot write the
# perfect one
# for each question. How do we turn judgements into a better model?

# %%
import os
import sys
import warnings

os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore", message="IProgress not found")
if "google.colab" in sys.modules:
    # %pip install -q minippo
    pass

# %%
import torch

from minippo.models import RewardModel, ValueModel, frozen_copy, load_policy, load_tokenizer

torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## Four models
#
# | symbol | variable | what it is | takes tokens | gives |
# |---|---|---|---|---|
# | $\pi_\theta$ | `policy` | is trained | `(B, T)` | log-probabilities `(B, R)` |
# | $\pi_{ref}$ | `ref_policy` | the SFT model, frozen | `(B, T)` | log-probabilities `(B, R)` |
# | $r_\phi$ | `reward_model` | learned from rankings, frozen | `(B, T)` | scores `(B,)` |
# | $V$ | `value_model` | the critic: how good will it get? | `(B, T)` | values `(B, R)` |
#
# `B` counts answers, `T` tokens of question and answer, `R` tokens of the answer alone. The
# package
# ships small trained ones; each has well under a million parameters.

# %%
tokenizer = load_tokenizer("sft")
policy = load_policy("ppo")
ref_policy = frozen_copy(load_policy("sft"))
reward_model = frozen_copy(RewardModel.load("reward"))
value_model = ValueModel.load("value")
models = {"policy": policy, "reference": ref_policy, "reward": reward_model, "value": value_model}
for name, model in models.items():
    print(f"{name:10s} {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## A question becomes tokens
#
# The world these models live in is called TinyHH. Its dialogues have the format of Anthropic's
# HH-RLHF: turns that begin with `Human:` and `Assistant:` after a blank line.

# %%
from minippo.batching import decode_response, encode_prompt
from minippo.hh import format_prompt

question = "How do I grow sweet tomatoes?"
print(repr(format_prompt(question)))
prompt = encode_prompt(tokenizer, question)
print([tokenizer.decode([token]) for token in prompt])

# %% [markdown]
# ## The reference answers, several times
#
# The SFT model imitates the crowd, so its answers are as mixed as the crowd is. Read them.

# %%
from minippo.generation import generate_many

answers = generate_many(ref_policy, [prompt] * 6, tokenizer, 48, seed=1)
sft_texts = [decode_response(tokenizer, answer) for answer in answers]
for text in sft_texts:
    print("-", text)

# %% [markdown]
# ## Somebody judges
#
# In real life people rank answers. Here a transparent **annotator** does: it scores five
# named parts
# and says why. Since its taste is known, we can check everything that follows.

# %%
from minippo.tinyhh.annotator import judge

for text in (sft_texts[0], "What a silly question."):
    print(text)
    print(judge(question, text), "\n")

# %% [markdown]
# ## The reward model learned that taste
#
# It never saw the annotator's scores, only which of two answers was ranked higher, with
# noise. It reads
# question and answer and gives one number. Only differences between its scores mean something.

# %%
from minippo.sft import join

tokens, attention_mask, _ = join([prompt] * 6, answers, tokenizer.pad_token_id)
with torch.no_grad():
    scores = (reward_model(tokens, attention_mask) - reward_model.mean) / reward_model.std
gold = [judge(question, text).score for text in sft_texts]
print("annotator  reward model")
for true, learned in zip(gold, scores.tolist()):
    print(f"{true:+9.2f}  {learned:+12.2f}")

# %% [markdown]
# ## PPO's policy answers
#
# PPO made answers more likely that the reward model likes, on a leash to the reference. The same
# question, the same random numbers:

# %%
ppo_answers = generate_many(policy, [prompt] * 6, tokenizer, 48, seed=1)
for answer in ppo_answers:
    print("-", decode_response(tokenizer, answer))

# %% [markdown]
# ## One rollout, token by token
#
# A **rollout** is what PPO learns from. The table shows one answer, a token per row. Mind
# the shift:
# the model's output at position $t$ predicts the token at $t + 1$, so each row says where it was
# predicted. `kl` is $\log \pi_\theta - \log \pi_{ref}$ at the sampled token, in nats; the
# reward is
# minus a little of that at every token, and the score at the last one.

# %%
from minippo.config import PPOConfig
from minippo.rollout import collect_rollout
from minippo.xray import xray

config = PPOConfig(kl_coef=0.05)
stats = (reward_model.mean, reward_model.std)
views = (policy, ref_policy, value_model, reward_model)
rollout = collect_rollout(*views, [prompt] * 8, tokenizer, config, score_stats=stats)
table = xray(rollout, 0, tokenizer)
print(table)

# %% [markdown]
# ## By hand: rewards on paper
#
# Two answers of three tokens. The second has ended after two, so its third position does
# not count
# (`mask` is False there). With $\beta = 0.1$ each token pays $0.1 \cdot kl$, and the score
# comes in at
# the *last token that counts*: $1.0 - 0.1 \cdot 2 = 0.8$ in the first row, $0.5 - 0.1 \cdot
# 1 = 0.4$ in
# the second.

# %%
from minippo.rewards import per_token_rewards

kl = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 9.0]])
mask = torch.tensor([[True, True, True], [True, True, False]])
rewards = per_token_rewards(torch.tensor([1.0, 0.5]), kl, mask, kl_coef=0.1)
print(rewards)
assert torch.allclose(rewards, torch.tensor([[-0.1, 0.0, 0.8], [0.0, 0.4, 0.0]]))

# %% [markdown]
# ## Break it: forget the position ids
#
# Prompts in a batch are padded on the left. Positions must count real tokens only; if they
# count the
# padding too, the model reads the same question at other places and means something else. Nothing
# crashes. That is the way of RLHF bugs: they are silent.

# %%
from minippo.models import position_ids

padding = torch.full((1, 12), tokenizer.pad_token_id)
padded = torch.cat([padding, torch.tensor([prompt])], dim=1)
padded_mask = torch.cat([torch.zeros_like(padding), torch.ones(1, len(prompt))], dim=1).long()
with torch.no_grad():
    alone = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    right = policy(padded, attention_mask=padded_mask, position_ids=position_ids(padded_mask))
    wrong_ids = torch.arange(padded.shape[1])[None]
    wrong = policy(padded, attention_mask=padded_mask, position_ids=wrong_ids)
shift_right = (right.logits[0, -1].softmax(-1) - alone).abs().sum() / 2
shift_wrong = (wrong.logits[0, -1].softmax(-1) - alone).abs().sum() / 2
print("probability moved with position ids below 0.001:", bool(shift_right < 1e-3))
print("and without them above 0.01:", bool(shift_wrong > 1e-2))
assert shift_right < 1e-3 and shift_wrong > 1e-2

# %% [markdown]
# ## See it: SFT and PPO on test questions
#
# Sixty-four questions nobody trained on, one answer each, judged by the annotator.

# %%
from minippo.tinyhh.rows import prompt_rows

rows = prompt_rows("test", 64)
prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]


def gold_scores(model):
    sampled = generate_many(model, prompts, tokenizer, 48, seed=2)
    texts = [decode_response(tokenizer, answer) for answer in sampled]
    judged = zip(rows, texts)
    return [judge(row["instruction"], text, row["history"]).score for row, text in judged]


sft_gold, ppo_gold = gold_scores(ref_policy), gold_scores(policy)

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(6, 3))
axis.hist([sft_gold, ppo_gold], bins=16, label=["SFT", "PPO"])
axis.set(xlabel="annotator's score", ylabel="answers", title="64 test questions")
axis.legend()
plt.show()

# %% [markdown]
# ## Claims
#
# What the text says, asserted:

# %%
mean_sft, mean_ppo = sum(sft_gold) / 64, sum(ppo_gold) / 64
kl_per_sequence = (rollout.logprobs - rollout.ref_logprobs).sum(1).mean()
print("PPO's mean score is above SFT's by more than 1:", mean_ppo > mean_sft + 1)
print("the policy has left the reference:", bool(kl_per_sequence > 0.5))
print("and has not run away:", bool(kl_per_sequence < 40))
assert mean_ppo > mean_sft + 1 and 0.5 < kl_per_sequence < 40

# %% [markdown]
# ## Quiz
#
# 1. Which of the four models gets gradients during PPO?
# 2. At which token does the reward model's score enter the rewards?
# 3. The reward model's score of PPO's answers went up. Is that success?
#
# <details><summary>Answers</summary>
#
# 1. The policy and the value model. The reference and the reward model are frozen.
# 2. At the last token that counts, which is the EOS if the answer ended.
# 3. No. It is what was optimised. The annotator's score, and reading answers, decide.
#
# </details>
#
# **Next:** why imitation alone cannot do this, and what a ranking says that a demonstration
# does not.
