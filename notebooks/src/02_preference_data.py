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
# # 02 · Preference data
#
# **Promise.** You write the parser of the HH-RLHF format, meet each kind of row that a parser gets
# wrong without a word, and turn rankings of K answers into pairs. At the end you measure how often
# the annotator of TinyHH prefers the worse answer, and find the law behind it. **Needs.** Notebooks
# 00 (annotator, gold score) and 01 (the reason); Python strings, a little PyTorch. **Time.** 65
# minutes, of which the computer needs less than one. Two exercises, one long and one short.
#
# ## The question
#
# Notebook 01 ended with a weight per token, positive or negative, and nobody to give it. People
# cannot grade an answer reliably: is it a 6 or a 7? They can *compare*: this one rather than that
# one. A **preference pair** is a question with two answers, the **chosen** one and the **rejected**
# one. How does such a pair look on the disk, and what can go wrong on the way from there to a
# training batch?

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import gzip
import json
import random
from itertools import combinations, islice

import torch

from minippo.config import DATA_DIR

# %% [markdown]
# ## The formula
#
# Say each answer $y$ to a question $x$ has a worth $s(x, y)$ that nobody can see. The
# **Bradley-Terry** model says how likely a person is to prefer $y_w$ (the winner) to $y_l$ (the
# loser):
#
# $$P(y_w \succ y_l \mid x) = \sigma\left(\frac{s(x, y_w) - s(x, y_l)}{\tau}\right),
# \qquad \sigma(z) = \frac{1}{1 + e^{-z}}$$
#
# Equal worth: a coin is thrown. A large gap: nearly always the better one. The *temperature* $\tau$
# says how noisy the person is. Only the *difference* of the two occurs, so a constant added to all
# worths of one question changes nothing that can be observed.
#
# A person who has K answers on the table ranks them, and a ranking states
# $\binom{K}{2} = K(K-1)/2$ pairs at once. Of the K answers to one question we make pairs, and a
# mean:
#
# | symbol | variable | function |
# |---|---|---|
# | $(x, y_w, y_l)$ | a row with `instruction`, `history`, `chosen`, `rejected` | `parse_pair` |
# | $s(x, y_w) - s(x, y_l)$, where known | `margin` | `ranking_to_pairs` |
# | all pairs of a ranking | list of rows | `ranking_to_pairs`, `ratings_to_pairs` |
# | a ranking again | `candidates`, best first | `group_by_prompt` |
# | $\hat V(x) = \frac1K \sum_k s(x, y_k)$ | `scores (B, K)` -> `(B,)` | `prompt_values` |
#
# ## By hand
#
# Two questions, three answers each, with scores
#
# ```text
# question 1    5  1  3       best first: first, third, second      mean 3
# question 2    0  0  3       best first: third, and a tie          mean 1
# ```
#
# Question 1 gives $3 \cdot 2 / 2 = 3$ pairs, with margins $5 - 3 = 2$, $5 - 1 = 4$ and $3 - 1 = 2$.
# Question 2 gives two, with margins 3 and 3: of a tie nobody is the winner. The means are what one
# expects of an answer before reading it. An answer is better than expected if its score is above
# the mean: $5 - 3 = +2$, $1 - 3 = -2$, $3 - 3 = 0$. These are weights as notebook 01 asked for,
# and they add up to 0.

# %%
scores = torch.tensor([[5.0, 1.0, 3.0], [0.0, 0.0, 3.0]])
for row in scores.tolist():
    gaps = [a - b for a, b in combinations(sorted(row, reverse=True), 2) if a > b]
    print(f"{len(gaps)} pairs, margins {gaps}, mean {sum(row) / 3}")

# %% [markdown]
# ## A row on the disk
#
# The packaged file has the format of Anthropic's HH-RLHF: one JSON object in a line, with two whole
# dialogues. Read the first one with a conversation in it:

# %%
with gzip.open(DATA_DIR / "tinyhh" / "preference.jsonl.gz", "rt", encoding="utf-8") as file:
    rows = [json.loads(line) for line in islice(file, 6000)]
row = next(row for row in rows if row["chosen"].count("Human:") == 2)
for side in ("chosen", "rejected"):
    print(f"{side}:{row[side]}\n" + "-" * 60)
print(repr(row["chosen"][:60]))

# %% [markdown]
# The vocabulary of the format:
#
# - A **tag** is a blank line (two newlines), then `Human:` or `Assistant:`. Mostly a space follows.
# - A **turn** is what stands between two tags, without the white space around it. Turns alternate,
#   the human begins, the assistant has the last word.
# - The two dialogues agree in everything but the last turn. What they share is the **history** (the
#   turns before the last question, as pairs of query and response) and the **instruction** (the
#   last question). What differs is the chosen and the rejected answer.
#
# ## A parser that looks right
#
# The first parser that one writes searches for the last `Assistant: ` from the right and cuts
# there. The note has such a one, and so had several libraries. In short:


# %%
def cut(text, tag):
    place = text.rfind(tag)
    return text[:place], text[place + len(tag) :].strip()


def naive_pair(row):
    before, chosen = cut(row["chosen"], "\n\nAssistant: ")
    _, rejected = cut(row["rejected"], "\n\nAssistant: ")
    before, instruction = cut(before, "\n\nHuman: ")
    history = []
    while "\n\nAssistant: " in before:
        before, answer = cut(before, "\n\nAssistant: ")
        before, query = cut(before, "\n\nHuman: ")
        history.insert(0, [query, answer])
    return dict(instruction=instruction, chosen=chosen, rejected=rejected, history=history)


for key, value in naive_pair(row).items():
    print(f"{key:12s} {value}")

# %% [markdown]
# Right, on this row. Before you write a better one, meet the rows where it is not.
#
# ## The odd rows
#
# All of these occur in practice. The first is the very example that the note prints above its
# parser (shortened): it is indented, with *single* newlines.

# %%
first, later = "\n\nHuman: hi\n\nAssistant:", "\n\nHuman: why?\n\nAssistant:"
printed = "\n    Human: a prank with a pen?\n    Assistant: Practical jokes?\n    Human: yep"
odd_rows = {
    "single newlines": (f"{printed}\n    Assistant: Sure.", f"{printed}\n    Assistant: No."),
    "empty answer": (f"{first} hello{later} because", f"{first} hello{later}"),
    "diverging": (f"{first} hello{later} because", f"{first} go away{later} no"),
    "Human: in answer": (f"{first} Say this:\nHuman: ok", f"{first} no"),
    "identical": (f"{first} hello", f"{first} hello "),
    "no last word": (f"{first} hello", f"{first} hello\n\nHuman: bye"),
}
odd_rows = {name: dict(zip(("chosen", "rejected"), row)) for name, row in odd_rows.items()}

# %% [markdown]
# > **Predict.** `rfind` gives −1 where it finds nothing. What is `text[-1 + 13:]`? And what does
# > the naive parser take for the rejected answer where that answer is empty?
#
# <details><summary>Answer</summary>
#
# Everything from character 12 on, so nearly the whole dialogue. Where the answer is empty, its tag
# lacks the space, so an earlier tag is found, and an old turn with all that follows is returned.
#
# </details>

# %%
for name, row in odd_rows.items():
    print(f"--- {name}")
    for key, value in naive_pair(row).items():
        print(f"{key:12s} {value!r:.80}")

# %% [markdown]
# Not one error, and five of the six are wrong:
#
# - **Single newlines.** No tag is found, `rfind` gives −1, and the slices start at character 12 and
#   8: the instruction begins in the middle of the word *Human*, and the whole dialogue is the
#   answer. A reward model would train on that.
# - **Empty answer.** Such a row ends in `Assistant:` *without* the space after it, so an earlier
#   tag is found. The "rejected answer" is an old turn, with the question and two tags in it.
# - **Diverging.** The two dialogues differ before the last turn, so the two answers answer
#   different conversations. The history is taken from `chosen`; the rejected answer is read as if
#   it had been given there.
# - **Identical.** The two differ by a space. There is nothing to prefer.
# - **No last word.** The person spoke last, so there is no answer to judge. The parser hands out
#   the closing words of the human as part of one.
# - **`Human:` in an answer** is text: there is no blank line before it. The naive parser is right
#   here, and one that splits at every `Human:` would not be.
#
# A row that is no pair must be *refused*, with a reason, and counted. Not repaired: a guess at what
# was meant is one more silent error.
#
# ## Exercise 1: `parse_pair`
#
# Difficulty 3 of 5 · importance 4 of 5 · 30 to 40 minutes
#
# Two functions. `turns_of` takes one dialogue apart; `parse_pair` compares two of them. A row that
# is no pair raises minippo's `BadPair(reason, found)`, where `found` is a text for the reader of
# the message. The reasons, the first that applies in this order:
#
# | reason | when |
# |---|---|
# | `leading_text` | there is text before the first tag |
# | `no_assistant_turn` | no `Assistant` tag |
# | `not_alternating` | the roles are not Human, Assistant, Human, ... |
# | `ends_with_human` | the last tag is `Human` |
# | `empty_turn` | a turn before the last is empty |
# | `empty_answer` | the last turn is empty |
# | `diverging_history` | the dialogues differ before their last turn |
# | `identical_answers` | they do not differ at all |
#
# `history` is a list of `[query, response]` lists. A row may have a `margin`, a number (also 0);
# then the pair has it too, as a float.
#
# <details><summary>Hint 1: a nudge</summary>
#
# Do not search from the right. Split at *all* tags, once, and look at what you have: then every
# question in the table is a question about two short lists.
#
# </details>
# <details><summary>Hint 2: the split</summary>
#
# `re.split` with a group in the pattern keeps what the group matched:
# `re.split(r"\n\n(Human|Assistant):", text)` gives the leading text, then role, text, role, text.
# So roles are every second item from 1, texts every second from 2. The space after the colon
# belongs to the text, and `strip` takes it off.
#
# </details>
# <details><summary>Hint 3: nearly the lines</summary>
#
# In `parse_pair`: both lists of texts; `diverging_history` if they differ without their last items;
# `identical_answers` if they are equal. Then `*earlier, instruction, answer = chosen`, and the
# history is `earlier[::2]` zipped with `earlier[1::2]`, each pair a list. `row.get("margin")` is
# None where there is none.
#
# </details>


# %%
import re

from minippo import BadPair

TAG = re.compile(r"\n\n(Human|Assistant):")


# %%
def turns_of(text):
    """The texts of a dialogue, human and assistant in turn; BadPair if it is no dialogue."""
    ### BEGIN SOLUTION
    leading, *parts = TAG.split(text)
    roles, texts = parts[::2], [part.strip() for part in parts[1::2]]
    faults = {
        "leading_text": leading.strip() != "",
        "no_assistant_turn": "Assistant" not in roles,
        "not_alternating": "Assistant" in roles[::2] or "Human" in roles[1::2],
        "ends_with_human": roles[-1:] == ["Human"],
        "empty_turn": "" in texts[:-1],
        "empty_answer": texts[-1:] == [""],
    }
    for reason in (reason for reason, applies in faults.items() if applies):
        raise BadPair(reason, repr(text[-40:]))
    return texts
    ### END SOLUTION


# %%
def parse_pair(row):
    """{"chosen", "rejected"} -> {"instruction", "chosen", "rejected", "history"}, and margin."""
    ### BEGIN SOLUTION
    chosen, rejected = turns_of(row["chosen"]), turns_of(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise BadPair("diverging_history", f"{chosen[:-1]} and {rejected[:-1]}")
    if chosen == rejected:
        raise BadPair("identical_answers", repr(chosen[-1]))
    *earlier, instruction, answer = chosen
    history = [list(turn) for turn in zip(earlier[::2], earlier[1::2], strict=True)]
    pair = dict(instruction=instruction, chosen=answer, rejected=rejected[-1], history=history)
    return pair if row.get("margin") is None else pair | {"margin": float(row["margin"])}
    ### END SOLUTION


# %%
from minippo.checks import check_parse_pair

parse_pair = check_parse_pair(parse_pair)

# %% [markdown]
# Now the odd rows again, through your parser:

# %%
found = {}
for name, row in odd_rows.items():
    try:
        found[name] = parse_pair(row)["chosen"]
    except BadPair as fault:
        found[name] = f"refused: {fault.reason}"
    print(f"{name:17s} {found[name]!r}")
assert sum(text.startswith("refused") for text in found.values()) == len(odd_rows) - 1

# %% [markdown]
# And is it right where the rows are fine? `load_preferences` is what minippo reads every file with.
# It returns a table and a report.

# %%
from minippo import load_preferences

dataset, report = load_preferences("tiny_hh", split="preference", limit=6000)
pairs = [parse_pair(row) for row in rows]
same = sum(
    all(pair[key] == row[key] for key in pair) for pair, row in zip(pairs, dataset, strict=True)
)
print(f"{report.accepted} rows, {sum(report.refused.values())} refused, {same} equal to yours")
assert same == len(dataset)

# %% [markdown]
# On a file with odd rows in it the loader stops at the first, and says where. With
# `on_error="skip"` it leaves them out and counts them. Look at these counts before you train on
# anything.

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "odd.jsonl")
    path.write_text("\n".join(json.dumps(row) for row in [*rows[:3], *odd_rows.values()]))
    try:
        load_preferences(path)
    except ValueError as error:
        print(error)
    _, odd_report = load_preferences(path, on_error="skip")
print(odd_report.accepted, "accepted;", {k: n for k, n in odd_report.refused.items() if n})

# %% [markdown]
# ## From K candidates to pairs
#
# How pairs come into being: take a question, let the model answer it K times, let somebody rank the
# answers. Here the SFT model answers and the annotator ranks. The annotator's `score` is the worth
# $s$ of the formula; its ranking adds noise to that, as a person would.

# %%
from minippo import Policy, decode_response, encode_prompt, generate_many, load_tokenizer
from minippo.worlds.tinyhh.annotator import TEMPERATURE, judge, rank

tokenizer, question = load_tokenizer("sft"), "How do I grow sweet tomatoes?"
prompts = [encode_prompt(tokenizer, question)] * 4
answers = generate_many(Policy.from_pretrained("sft"), prompts, tokenizer, 48, seed=3)
texts = [decode_response(tokenizer, answer) for answer in answers]
worth = [judge(question, text).score for text in texts]
order = rank(worth, random.Random(0))
for place, i in enumerate(order):
    print(f"{place + 1}. {worth[i]:+.2f}  {texts[i]}")

# %% [markdown]
# `rank` draws from the **Plackett-Luce** model: the best is drawn with probability
# proportional to $e^{s/\tau}$, then the second from what is left, and so on. Each pair of a ranking
# drawn so follows Bradley-Terry with the same $\tau$, here 0.5 (`TEMPERATURE`). Is this right? Both
# can be counted: many rankings of four answers of known worth against the formula.

# %%
rng = random.Random(1)
rankings = [rank([1.0, 0.5, 0.0, -0.5], rng) for _ in range(4000)]
weights = torch.softmax(torch.tensor([1.0, 0.5, 0.0, -0.5]) / TEMPERATURE, 0)
first_places = [sum(order[0] == i for order in rankings) / 4000 for i in range(4)]
wins = sum(order.index(1) < order.index(2) for order in rankings) / 4000
expected = torch.sigmoid(torch.tensor(0.5 / TEMPERATURE)).item()
print("first place, counted ", [f"{share:.3f}" for share in first_places])
print("first place, formula ", [f"{share:.3f}" for share in weights.tolist()])
print(f"second before third: counted {wins:.3f}, Bradley-Terry {expected:.3f}")
assert abs(wins - expected) < 0.03
assert max(abs(a - b) for a, b in zip(first_places, weights.tolist())) < 0.03

# %% [markdown]
# A ranking becomes its pairs. The **margin** of a pair is the gap of the scores, where scores are
# known. It may be negative, as in the first line below: there the annotator's noise won.

# %%
from minippo import group_by_prompt, ranking_to_pairs, ratings_to_pairs

prompt_row = {"id": "tomato", "instruction": question, "history": []}
ranked, ranked_worth = [texts[i] for i in order], [worth[i] for i in order]
stated = ranking_to_pairs(prompt_row, ranked, ranked_worth)
for pair in stated:
    sides = f"{pair['chosen'][:22]} > {pair['rejected'][:22]}"
    print(f"{pair['id']}  margin {pair['margin']:+.2f}  {sides}")
assert len(stated) == 4 * 3 // 2 and stated[0]["margin"] < 0 < stated[1]["margin"]

# %% [markdown]
# Where people give grades instead of a ranking, `ratings_to_pairs` sorts by them; a tie gives no
# pair. The example from the top of this notebook:

# %%
for grades in scores.tolist():
    made = ratings_to_pairs(prompt_row, ["first", "second", "third"], grades)
    print([f"{pair['chosen']} > {pair['rejected']} by {pair['margin']:.0f}" for pair in made])

# %% [markdown]
# And back. In a file the pairs of a prompt stand one by one; `group_by_prompt` finds the rankings
# among them. It takes nothing for granted: pairs that contradict each other stay pairs.

# %%
again = group_by_prompt(stated)
cycle = [dict(prompt_row, chosen=a, rejected=b) for a, b in ("xy", "yz", "zx")]
print("ranking found:", len(again) == 1 and again[0]["candidates"] == ranked)
print("x > y > z > x gives", [row["candidates"] for row in group_by_prompt(cycle)])
groups = group_by_prompt(list(dataset))
print(
    f"{len(dataset)} pairs of TinyHH are {len(groups)} rankings of {len(groups[0]['candidates'])}"
)

# %% [markdown]
# Why keep the K answers of a prompt together? The reward model scores an answer once for all pairs
# it occurs in, K passes in place of $K(K-1)$; and it sees each answer once in an epoch, not K−1
# times. Notebook 04 measures what the second is good for.
#
# ## Exercise 2: `prompt_values`
#
# Difficulty 1 of 5 · importance 3 of 5 · 3 minutes
#
# From scores `(B, K)`, K answers to each of B prompts, the value of each prompt: the mean score of
# its answers, `(B,)`. The critic's training begins with it (notebook 06).
#
# <details><summary>Hint 1: a nudge</summary>
#
# Which of the two axes disappears?
#
# </details>
# <details><summary>Hint 2: the axis</summary>
#
# The answers are `dim=1`.
#
# </details>
# <details><summary>Hint 3: nearly the line</summary>
#
# `torch.Tensor.mean` takes `dim`.
#
# </details>


# %%
def prompt_values(scores):
    """scores: (B, K) -> (B,)."""
    ### BEGIN SOLUTION
    return scores.mean(dim=1)
    ### END SOLUTION


# %%
from minippo.checks import check_prompt_values

prompt_values = check_prompt_values(prompt_values)

# %% [markdown]
# The note trains the value model on this. It is the value at the *prompt* alone; what the critic
# must say in the middle of an answer comes later. But it already gives weights with a sign that add
# up to 0, the baseline that notebook 01 asked for:

# %%
weights = scores - prompt_values(scores).unsqueeze(1)
print(prompt_values(scores).tolist(), weights.tolist())
assert weights.sum(1).abs().max() < 1e-6

# %% [markdown]
# ## Break it
#
# **The wrong end.** Split at the *first* `Assistant:` and all is well on dialogues of one turn. How
# many rows have more?


# %%
def leftmost_answer(text):
    return text.partition("\n\nAssistant: ")[2].strip()


wrong = sum(
    leftmost_answer(row["chosen"]) != pair["chosen"] for row, pair in zip(rows, pairs, strict=True)
)
print(f"{wrong / len(rows):.0%} of the rows have the wrong answer, and no error was raised")
assert 0.3 < wrong / len(rows) < 0.5

# %% [markdown]
# **The wrong sign.** `chosen` and `rejected` exchanged, somewhere on the way. Nothing crashes, the
# reward model trains, its accuracy on its own data is fine; and it prefers what people rejected.
# Where a gold score exists the check takes one line. Where none exists: read twenty pairs.

# %%
margins = torch.tensor([pair["margin"] for pair in pairs])
right, swapped = (margins > 0).double().mean().item(), (-margins > 0).double().mean().item()
print(f"the chosen answer has the higher gold score: {right:.1%}; exchanged: {swapped:.1%}")
print(f"the same gold score: {(margins == 0).double().mean():.1%}")
assert right > 0.7 and swapped < 0.2

# %% [markdown]
# **The leak.** Shuffle the pairs and keep a tenth for validation. Each answer occurs in several
# pairs of its prompt, so most of the validation answers are in the training data: an accuracy
# measured there is partly memory. Split by *prompt*.


# %%
def leaked(validation, training):
    """Share of the validation pairs both answers of which are in the training data."""
    known = {(p["instruction"], str(p["history"]), p[s]) for p in training for s in SIDES}
    keys = [[(p["instruction"], str(p["history"]), p[s]) for s in SIDES] for p in validation]
    return sum(known.issuperset(both) for both in keys) / len(keys)


SIDES = ("chosen", "rejected")
shuffled = random.Random(0).sample(pairs, len(pairs))
by_pair = leaked(shuffled[:600], shuffled[600:])
by_prompt = leaked(pairs[:600], pairs[600:])  # the pairs of a prompt stand together
print(f"both answers known: split by pair {by_pair:.1%}, split by prompt {by_prompt:.1%}")
assert by_pair > 0.8 and by_prompt < 0.05

# %% [markdown]
# ## See it: how often the annotator is wrong
#
# Each pair of TinyHH carries the true gap of its two answers. How often did the better one win?
# Sorted by the size of the gap, against Bradley-Terry with the annotator's $\tau$:

# %%
gaps = margins.abs()
edges = [0.01, 0.3, 0.6, 0.9, 1.2, 1.8, 2.5, 4.0, 12.0]
curve = []
print("   gap   pairs  better wins  Bradley-Terry")
for low, high in zip(edges, edges[1:], strict=False):
    inside = (gaps >= low) & (gaps < high)
    won = (margins[inside] > 0).double().mean().item()
    formula = torch.sigmoid(gaps[inside] / TEMPERATURE).mean().item()
    curve.append((gaps[inside].mean().item(), won, formula, int(inside.sum())))
    print(f"{curve[-1][0]:6.2f} {curve[-1][3]:7d} {won:12.3f} {formula:14.3f}")

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

from minippo import wilson
from minippo.plots import COLOURS

figure, axis = plt.subplots(figsize=(7, 3.4))
line = torch.linspace(0, 6, 121)
axis.plot(line, torch.sigmoid(line / TEMPERATURE), color=COLOURS[0], lw=2, label="Bradley-Terry")
look = {"color": COLOURS[1], "fmt": "o", "ms": 5, "capsize": 3}
for gap, won, _, count in curve:
    low, high = wilson(won, count)  # a 95% interval that has a width at 100% too
    bar = axis.errorbar(gap, won, [[won - low], [high - won]], **look)
bar.set_label("TinyHH, with 95% interval")
axis.axhline(0.5, color="black", lw=0.6, linestyle=":")
axis.set(xlabel="gap of the gold scores", ylabel="the better answer is chosen")
axis.set_title("Noise is largest where it matters least", loc="left", fontsize=11)
axis.legend(frameon=False, loc="lower right")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Answers of nearly equal worth are ranked by a coin. On pairs that it was trained on, a reward
# model can learn by heart how the coin fell; on new pairs no model can be expected to agree with
# all labels, however large it is. Suppose it knew every gold score: then it would be right wherever
# the annotator is, and on half of the ties. That is its **ceiling** there.
#
# ## What the note says, and what is meant
#
# | as printed | as meant |
# |---|---|
# | tags after two newlines, below an example with one | `rfind` gives −1; such a row is refused |
# | the history is taken from `chosen` | it has to be compared; rows where it differs are refused |
# | $K(K-1)/2$ inputs $(x, y)$ make a batch | K inputs; the pairs are differences of their scores |
# | the mean reward of the answers to x is V(x) | at the prompt; the critic needs V at every token |
#
# ## Claims

# %%
ties = (margins == 0).double().mean().item()
without_ties, ceiling = right / (1 - ties), right + ties / 2
worst = max(abs(won - formula) for _, won, formula, _ in curve)
refused = sum(text.startswith("refused") for text in found.values())
print(f"of {len(odd_rows)} odd rows the naive parser refuses none, yours {refused}")
print(f"where one answer is better, it is the chosen one in {without_ties:.1%} of the pairs")
print(f"the ceiling, with half of the ties: {ceiling:.1%} of all pairs")
print(f"largest distance from Bradley-Terry in a group of pairs: {worst:.3f}")
assert worst < 0.06 and 0.8 < ceiling < without_ties < 0.98
assert len(dataset) == 6 * len(groups)

# %% [markdown]
# ## Quiz
#
# 1. Why is it not enough that `rfind` finds *a* tag?
# 2. A row ends in `Assistant:`. Would it be better to keep it, with an empty rejected answer?
# 3. K = 8 answers are ranked. How many pairs, and how many of them contain a given answer?
# 4. Somebody adds 100 to all scores of one question. Which pairs, margins and values change?
# 5. Your reward model agrees with the labels on 99% of the validation pairs, but the annotator
#    itself is right less often than that. What do you suspect first?
#
# <details><summary>Answers</summary>
#
# 1. It may be an earlier one: where the last answer is empty, its tag lacks the space, and the turn
#    before it is taken for the answer.
# 2. No. "Anything is better than nothing" is a fact about the data collection, not a preference
#    between answers; and a model that learns it may come to pay for length. If you do want it, say
#    so in the data, not in a parser.
# 3. $8 \cdot 7 / 2 = 28$ pairs, 7 of them with a given answer.
# 4. No pair and no margin; the value of that prompt goes up by 100. So a score means something only
#    beside others of the same question. Standardising (notebook 04) takes off one constant for all
#    questions, not one for each.
# 5. A leak: answers of the validation pairs are in the training pairs. Nobody can predict the
#    outcome of a coin that was thrown once, except by having seen it.
#
# </details>
#
# **Next:** before a model can be rewarded, one has to know what it said, and how likely it thought
# that was. Notebook 03: tokens, log-probabilities and the shift.

# %%
from minippo.checks import scored

scored()
