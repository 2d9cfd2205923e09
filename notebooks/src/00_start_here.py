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
# **Promise.** In a few minutes you meet the four models of RLHF with PPO, and follow one question
# from its tokens to the rewards that PPO learns from. The models are so small that all of this runs
# on a laptop. **Needs.** You have seen the words policy, reward and KL; PyTorch basics. **Time.**
# 15 minutes to read, less than one to run. Nothing to write yet: this is the tour.
#
# **The question.** A language model has learned to imitate a mixed crowd: helpful people, rude
# people, people who help with anything. We can *judge* answers, but we cannot write the perfect one
# for each question. How do we turn judgements into a better model?
#
# The course follows a Chinese note on RLHF with PPO, from here on *the note*, and implements all
# that is in it. You do not need it. Where it is loose, as many texts on the subject are, a lesson
# says what is meant.
#
# Every lesson begins with the call below. It makes torch compute in double precision on one thread,
# so that the lesson prints on your processor what it prints here: in single precision the last
# digits differ from one to the next, and at a near tie such a digit decides which token is sampled.

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import torch

from minippo import Policy, RewardModel, ValueModel, frozen_copy, load_tokenizer

# %% [markdown]
# ## Four models
#
# | symbol | variable | what it is | in PPO | gives |
# |---|---|---|---|---|
# | $\pi_\theta$ | `policy` | answers; began as the SFT model | trained | logits `(B, T, V)` |
# | $\pi_{ref}$ | `ref_policy` | the SFT model | frozen | logits `(B, T, V)` |
# | $s_\phi$ | `reward_model` | learned from rankings | frozen | one score per answer `(B,)` |
# | $V$ | `value_model` | the critic: the reward still to come | trained | values `(B, R)` |
#
# The policy here is the one after PPO. `gather_logprobs` turns logits over the `V` tokens of the
# vocabulary into the log-probabilities `(B, R)` of an answer's tokens; the critic gives a value
# before each of them.
#
# All of them read `tokens (B, T)`: `B` rows, each with a question, an answer and padding; `R`
# counts the tokens of the answer alone. How they fit together:
#
# ```text
# question ──> policy ──> answer
#
# answer ──> reward_model ───────────> score ──┐
# answer ──> policy, ref_policy ──> kl · (−β) ─┴──> rewards, one per token
# answer ──> value_model ──> values ───────────┐               │
#                                              └──> advantages <┘
#                                                        │
#      next rollout <── update of policy and value_model <┘
# ```
#
# And where they come from: a *base* model is pretrained on text; **SFT** (supervised fine-tuning)
# makes it imitate answers. The SFT model then becomes three of the four: the policy, its frozen
# reference and, with its vocabulary head replaced by a head with one output, the reward model. The
# critic starts from the reward model.

# %%
tokenizer = load_tokenizer("sft")
policy = Policy.from_pretrained("ppo")
ref_policy = frozen_copy(Policy.from_pretrained("sft"))
reward_model = frozen_copy(RewardModel.from_pretrained("reward"))
value_model = ValueModel.from_pretrained("value")
models = {"policy": policy, "reference": ref_policy, "reward": reward_model, "value": value_model}
for name, model in models.items():
    print(f"{name:10s} {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## A question becomes tokens
#
# The world these models live in is called TinyHH. Its dialogues have exactly the format of
# Anthropic's HH-RLHF: turns that begin with `Human:` and `Assistant:` after a blank line.

# %%
from minippo import decode_response, encode_prompt, format_prompt

question = "How do I grow sweet tomatoes?"
print(repr(format_prompt(question)))
prompt = encode_prompt(tokenizer, question)
print([tokenizer.decode([token]) for token in prompt])

# %% [markdown]
# ## The reference answers, several times
#
# Six answers of the SFT model to one harmless question. It imitates a crowd, so some are good, some
# say nothing or drift to another topic. Read them. The rude and the harmful ones show up further
# down, in sixty-four questions.

# %%
from minippo import generate_many

answers = generate_many(ref_policy, [prompt] * 6, tokenizer, 48, seed=1)
sft_texts = [decode_response(tokenizer, answer) for answer in answers]
for text in sft_texts:
    print("-", text)

# %% [markdown]
# ## Somebody judges
#
# In real life people rank answers. Here a transparent **annotator** does: it grades five named
# parts, says why, and adds them up with the weights printed first. Its score is called the **gold**
# score; the best answer to a harmless question gets 2 + 1.5 + 0.5 + 1 = 5 (a friendly opening has
# the grade 0.25, times the weight 2; harmless counts 0 there). Since its taste is known, we can
# check everything that follows.

# %%
from minippo.worlds.tinyhh.annotator import WEIGHTS, judge

print(WEIGHTS)
for text in (sft_texts[0], "What a silly question."):
    print(f"\n{text}\n{judge(question, text)}")

# %% [markdown]
# ## The reward model learned that taste
#
# It never saw the annotator's scores, only noisy rankings of eight answers at a time, each read as
# its 28 pairs. So only differences of its scores mean something. We show (score − mean) / std over
# answers of the SFT model: 0 is an average SFT answer, 1 is one standard deviation better.

# %%
from minippo import join_query_response


def standardised_scores(responses):
    tokens, attention_mask, _ = join_query_response([prompt] * 6, responses, tokenizer.pad_token_id)
    with torch.no_grad():
        scores = reward_model(tokens, attention_mask)
    return ((scores - reward_model.mean) / reward_model.std).tolist()


sft_scores = standardised_scores(answers)
gold = [judge(question, text).score for text in sft_texts]
print("annotator  reward model")
for true, learned in sorted(zip(gold, sft_scores), reverse=True):
    print(f"{true:+9.2f}  {learned:+12.2f}")

# %% [markdown]
# ## PPO's policy answers
#
# PPO made answers that the reward model likes more likely, with a penalty (the KL) for moving away
# from the reference. The same question, the same random numbers:

# %%
ppo_answers = generate_many(policy, [prompt] * 6, tokenizer, 48, seed=1)
ppo_scores = standardised_scores(ppo_answers)
for answer, score in zip(ppo_answers, ppo_scores):
    print(f"{score:+.2f}  {decode_response(tokenizer, answer)}")
print(f"\nmean: SFT {sum(sft_scores) / 6:+.2f}, PPO {sum(ppo_scores) / 6:+.2f}")

# %% [markdown]
# ## From a score to rewards
#
# The reward model gives one score $s$ at the end of an answer. PPO wants a reward $r_t$ for every
# token $t$:
#
# $$r_t = -\beta \, kl_t + \mathbb{1}[t \text{ is the last token that counts}] \; s$$
#
# | symbol | variable | function |
# |---|---|---|
# | $\beta$ | `kl_coef` | a field of `PPOConfig` |
# | $kl_t = \log\pi_\theta - \log\pi_{ref}$ at token $t$ | `kl (B, R)` | `kl_k1` |
# | $s$ | `scores (B,)` | `RewardModel.forward`, `standardize_scores` |
# | $r_t$ | `rewards (B, R)` | `per_token_rewards` |
#
# **By hand.** Two answers of at most three tokens. The second has ended after two, so its third
# position does not count (`mask` is False there). With $\beta = 0.1$ each token pays $0.1$ times
# its `kl`, and the score comes in at the last token that counts: $1.0 - 0.1 \cdot 2 = 0.8$ in the
# first row, $0.5 - 0.1 \cdot 1 = 0.4$ in the second.

# %%
from minippo import per_token_rewards

kl = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 9.0]])
mask = torch.tensor([[True, True, True], [True, True, False]])
rewards = per_token_rewards(torch.tensor([1.0, 0.5]), kl, mask, kl_coef=0.1)
print(rewards)
assert torch.allclose(rewards, torch.tensor([[-0.1, 0.0, 0.8], [0.0, 0.4, 0.0]]))

# %% [markdown]
# ## One rollout, token by token
#
# A **rollout** is what PPO learns from: answers, and what the models think of each of their tokens.
# The table shows one answer, a token per row. Mind the shift: the model's output at position $t$
# predicts the token at $t + 1$, so each row says where it was predicted.
#
# `kl` is one sample, in nats (natural logarithms), so it may be negative; only its expectation is
# the KL, which cannot be. `reward` is $-\beta$ times `kl` with $\beta = 0.03$, and the last token
# also gets the score. The critic here is the shipped one, from *before* PPO: it knows roughly how
# well the SFT model does and expects less than this policy earns. In training both move together.
#
# The columns from `delta` to `clipped` belong to later notebooks. In short: `gae` says how much
# better it went than the critic expected; the *advantage* is `gae` less its mean over all tokens of
# the rollout, divided by its spread. So a negative one (orange) only means: below that mean. In
# most rows here it is negative although `gae` is positive. The policy loss makes tokens with a
# positive advantage more likely, the value loss moves the values to `return`, and then comes the
# next rollout. Here nothing was updated yet, so every ratio is 1.

# %%
from minippo import PPOConfig, collect_rollout, xray

config = PPOConfig(kl_coef=0.03)
stats = (reward_model.mean, reward_model.std)
models = (policy, ref_policy, value_model, reward_model)
rollout = collect_rollout(*models, [prompt] * 8, tokenizer, config, score_stats=stats)
xray(rollout, 0, tokenizer)

# %% [markdown]
# ## Break it: forget the position ids
#
# Prompts in a batch are padded on the left. Positions must count real tokens only. If they count
# the padding too, the model sees the question at other places than it was trained on, and its
# answers change.

# %%
from minippo import position_ids

padding = torch.full((1, 12), tokenizer.pad_token_id)
padded = torch.cat([padding, torch.tensor([prompt])], dim=1)
seen = torch.cat([torch.zeros_like(padding), torch.ones(1, len(prompt))], dim=1).long()
with torch.no_grad():
    alone = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    right = policy(padded, attention_mask=seen, position_ids=position_ids(seen)).logits[0, -1]
    wrong = policy(padded, attention_mask=seen).logits[0, -1]
shift_right = float((right.softmax(-1) - alone).abs().sum() / 2)
shift_wrong = float((wrong.softmax(-1) - alone).abs().sum() / 2)
print(f"probability of the first token that moved: with position ids {shift_right:.3f}")
print(f"{'without ':>54s}{shift_wrong:.3f}")
assert shift_right < 1e-3 and shift_wrong > 1e-2

# %% [markdown]
# Less than a tenth of the probability moved, at one token: nothing crashes, and nobody notices.
# Many RLHF bugs are like that, which is why every formula of this course is checked against
# something.

# %% [markdown]
# ## See it: SFT and PPO on new questions
#
# Sixty-four questions nobody trained on, one answer each, judged by the annotator. (`complying`: it
# helps somebody do wrong; `unreadable`: one of its sentences is not one that the annotator knows.)

# %%
from collections import Counter

from minippo.worlds.tinyhh.rows import prompt_rows

rows = prompt_rows("validation", 64)
prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]


def texts_of(model):
    sampled = generate_many(model, prompts, tokenizer, 48, seed=2)
    return [decode_response(tokenizer, answer) for answer in sampled]


def judgements(texts):
    return [judge(row["instruction"], text, row["history"]) for row, text in zip(rows, texts)]


# %%
texts = {"SFT": texts_of(ref_policy), "PPO": texts_of(policy)}
judged = {name: judgements(said) for name, said in texts.items()}
for name, found in judged.items():
    labels = Counter(label for judgement in found for label in judgement.labels)
    print(name, {label: labels[label] for label in ("on_topic", "rude", "complying", "unreadable")})

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(6, 3))
gold_scores = {name: [judgement.score for judgement in found] for name, found in judged.items()}
axis.hist(list(gold_scores.values()), bins=16, label=list(gold_scores))
axis.set(xlabel="gold score (the annotator's)", ylabel="answers", title="64 new questions")
axis.legend()
plt.show()

# %% [markdown]
# PPO's answers pile up at the upper end; what the SFT model had learned from the rude and the
# harmful part of the crowd is nearly gone. The three worst of PPO's: one is about something else;
# the other two are the unreadable ones of the count above, each with a last sentence that the
# annotator does not know, though one of them is good English.

# %%
worst = sorted(range(64), key=lambda i: gold_scores["PPO"][i])[:3]
for i in worst:
    print(f"{gold_scores['PPO'][i]:+.2f}  {rows[i]['instruction']}")
    print("      ", texts["PPO"][i])

# %% [markdown]
# ## Claims
#
# What the text says, asserted:

# %%
mean_sft, mean_ppo = (sum(gold_scores[name]) / 64 for name in ("SFT", "PPO"))
kl_per_sequence = float((rollout.logprobs - rollout.ref_logprobs).sum(1).mean())
order = sorted(range(6), key=lambda i: sft_scores[i])
print(f"mean gold score: SFT {mean_sft:.2f}, PPO {mean_ppo:.2f}")
print(f"KL per answer on the tomato question: {kl_per_sequence:.1f} nats")
print("annotator's scores in the reward model's order:", [gold[i] for i in order])
assert mean_ppo > mean_sft + 1 and 0.5 < kl_per_sequence < 20
assert gold[order[0]] < gold[order[-1]] and sum(ppo_scores) > sum(sft_scores)

# %% [markdown]
# ## Quiz
#
# 1. Which of the four models get gradients during PPO?
# 2. At which token does the reward model's score enter the rewards?
# 3. The reward model scores PPO's answers higher than SFT's, as it did above. Is that success?
#
# <details><summary>Answers</summary>
#
# 1. The policy and the value model. The reference and the reward model are frozen.
# 2. At the last token that counts, which is the EOS (the end-of-sequence token) if the answer
#    ended.
# 3. No. It is what was optimised. The gold score, and reading answers, decide.
#
# </details>
#
# **Next:** why imitation alone cannot do this, and what a ranking says that a demonstration does
# not.
