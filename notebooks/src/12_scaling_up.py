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
# # 12 · Scaling up: real models, real rows, faults, several processes
#
# **Promise.** You see the commands that take the pipeline to a real GPT-2, real HH-RLHF rows, a GPU
# and several processes; you know beforehand what fits and what it costs; and you test on the CPU,
# with SFT, that a killed run and a run of two processes end at the weights of an undisturbed one.
# **Needs.** The tour of notebook 00; a terminal. **Time.** 30 minutes to read, half a minute to
# run. Nothing that runs here needs a GPU or a network; what needs one is only shown, as a command.
#
# **The question.** Four models, two of them trained: where does the memory go, where does the time
# go, and what is left of a run when the machine dies in the middle?

# %%
# On Colab: upload a clone of the repository, then run: %pip install -q ./minippo
from minippo.lesson import set_up

set_up()

# %%
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

folder = Path(tempfile.mkdtemp())  # all that is written here, is written there

# %% [markdown]
# ## Any model, by name or by path
#
# `--base` and `Policy.from_pretrained` take the name of a shipped checkpoint, a folder, or a name
# on the Hugging Face hub: `Policy.from_pretrained("gpt2")` would download GPT-2 small. This
# notebook stays offline, so it makes a folder such as the hub would give: a GPT-2 with the settings
# that transformers itself chooses, only smaller.

# %%
from transformers import GPT2Config, GPT2LMHeadModel

from minippo import Policy, load_tokenizer

tokenizer = load_tokenizer("base")
ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=len(tokenizer), **ids)
theirs = GPT2LMHeadModel(config).eval()

# %%
theirs.save_pretrained(folder / "gpt2")
tokenizer.save_pretrained(folder / "gpt2")
ours = Policy.from_pretrained(folder / "gpt2")
print("written with:", config.activation_function)
print("loaded with: ", ours.config.activation_function)

# %% [markdown]
# The two names are one function. GPT-2's GELU is written as eight operations in transformers, each
# of which reads and writes the whole tensor; `Policy.from_pretrained` puts it in one kernel. The
# outputs agree to rounding:

# %%
tokens = torch.randint(0, len(tokenizer), (4, 32))
with torch.no_grad():
    difference = (theirs(tokens).logits - ours(tokens).logits).abs().max()
print("logits agree to 1e-5:", bool(difference < 1e-5))
assert difference < 1e-5

# %% [markdown]
# ## A stranger's checkpoint
#
# A pickle file is a program: loading it runs it. minippo reads safetensors and JSON, nothing else,
# and says so. Here a folder has its weights as a pickle only.

# %%
stranger = folder / "stranger"
stranger.mkdir()
(stranger / "config.json").write_bytes((folder / "gpt2" / "config.json").read_bytes())
torch.save(theirs.state_dict(), stranger / "pytorch_model.bin")


# %%
def said_by(load, path):
    """What the refusal says, without the path."""
    try:
        load(str(path))
    except ValueError as error:
        return str(error).replace(str(path), "FOLDER")
    return "nothing: it was loaded"


refusal = said_by(Policy.from_pretrained, stranger)
print(refusal.split(";")[0])
assert "nothing" not in refusal

# %% [markdown]
# `config.json` can lie as well. This one claims a model of $10^{16}$ numbers. It is compared
# with the header of the weights' file first, and refused before such a model is made.

# %%
liar = folder / "liar"
liar.mkdir()
settings = json.loads((folder / "gpt2" / "config.json").read_text())
(liar / "config.json").write_text(json.dumps(settings | {"n_embd": 10**6, "n_layer": 10**3}))
_ = (liar / "model.safetensors").write_bytes((folder / "gpt2" / "model.safetensors").read_bytes())
print(f"claimed: {12 * 10**3 * (10**6) ** 2:.1e} numbers in the layers' matrices")

# %%
began = time.perf_counter()
refusal = said_by(Policy.from_pretrained, liar)
print(refusal.split(";")[0])
print("refused in less than 5 seconds:", time.perf_counter() - began < 5)
assert "nothing" not in refusal

# %% [markdown]
# ## Real rows
#
# HH-RLHF comes as files of `{"chosen": ..., "rejected": ...}`. A loader that repairs rows silently
# trains on something nobody has read. Ours counts what it refuses, by kind, and streams: a million
# rows take as much memory as a thousand (`make bounds` measures it).

# %%
from minippo import load_preferences

good = {"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes, please.",
        "rejected": "\n\nHuman: Tea?\n\nAssistant: Go away."}  # fmt: skip
same = good | {"rejected": good["chosen"]}
other = good | {"rejected": "\n\nHuman: Soup?\n\nAssistant: No."}
lines = [json.dumps(row) for row in (good, same, other)] + ['{"chosen": "\\n\\nHuman: cut']
_ = (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
print(len(lines), "lines, one of them good")

# %%
rows, report = load_preferences(folder / "rows.jsonl", on_error="skip")
print(rows[0]["instruction"], "|", rows[0]["chosen"], "|", rows[0]["rejected"])
print({kind: count for kind, count in report.refused.items() if count})

# %% [markdown]
# With the real files the commands are these. Real rows are long: to keep most of them, add
# `--max-prompt-tokens 384 --max-response-tokens 128` to each command on such rows, also to those
# further down.
#
# ```
# minippo sft    --name hh --base gpt2 --data rows.jsonl.gz
# minippo reward --name hh --data rows.jsonl.gz
# minippo ppo    --name hh --data rows.jsonl.gz
# ```
#
# `make hh HH_FILE=rows.jsonl.gz` runs these stages without GPT-2, from a tiny base that it
# pretrains on the rows, with a shorter PPO and an evaluation at the end.

# %% [markdown]
# ## Where the memory goes
#
# PPO holds four models. In float32 a number takes 4 bytes, so a model of $n$ parameters takes
#
# | | policy | critic | reference | reward model |
# |---|---|---|---|---|
# | weights | $4n$ | $4n$ | $4n$ | $4n$ |
# | gradients | $4n$ | $4n$ | | |
# | Adam's two moments | $8n$ | $8n$ | | |
#
# together $40n$ bytes, if all four have one size, before a single activation. `--frozen-dtype
# bfloat16` stores the two frozen models in half: $36n$.

# %%
BYTES_A_PARAMETER = 2 * (4 + 4 + 8) + 2 * 4
sizes = {"GPT-2 small": 124e6, "GPT-2 large": 774e6, "GPT-2 XL": 1_558e6}
for name, parameters in sizes.items():
    print(f"{name:12s} {parameters * BYTES_A_PARAMETER / 1e9:8.2f} GB")

# %% [markdown]
# Do not believe a table: count. The next cells make the four models and one real optimizer step,
# and add up the bytes of every tensor that is kept. (The lesson computes in float64, like all
# lessons; in float32, as commands compute, it is half of that.)

# %%
from minippo import RewardModel, ValueModel, adamw, frozen_copy

policy = Policy.from_pretrained("sft")
reward_model = frozen_copy(RewardModel.from_pretrained("reward"))
ref_policy, value_model = frozen_copy(policy), ValueModel.from_reward_model(reward_model)
optimizer = adamw({"policy": policy, "value": value_model}, {"policy": 1e-5, "value": 1e-5})

# %%
for model in (policy, value_model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
optimizer.step()

# %%
everything = [p for m in (policy, ref_policy, value_model, reward_model) for p in m.parameters()]
everything += [p.grad for p in everything if p.grad is not None]
everything += [x for moments in optimizer.state.values() for x in moments.values() if x.dim()]
counted = sum(x.numel() * x.element_size() for x in everything) / 2  # as in float32
a_parameter = counted / sum(p.numel() for p in policy.parameters())
print(f"{counted / 1e6:.1f} MB, {a_parameter:.1f} bytes for each parameter of the policy")
assert 39 < a_parameter < 41

# %% [markdown]
# What does not fit on one card can be traded: `--micro-batch-size` and `--gradient-checkpointing`
# pay with time, `--frozen-dtype` with a little precision, `--fsdp` splits everything above over
# several cards. docs/scaling.md has the arithmetic for models of up to a billion parameters.

# %% [markdown]
# ## Where the time goes
#
# Most of a padded batch of answers is padding, and padding costs as much arithmetic as text. Count
# it on one real rollout.

# %%
from minippo import PPOConfig, collect_rollout, encode_prompt
from minippo.worlds.tinyhh.rows import prompt_rows

limits = {"batch_size": 64, "minibatch_size": 32, "micro_batch_size": 16}
ppo = PPOConfig(**limits, ppo_epochs=1)
questions = prompt_rows("ppo", 64)
prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in questions]

# %%
models = (policy, ref_policy, value_model, reward_model)
rollout = collect_rollout(*models, prompts, tokenizer, ppo)
real, places = int(rollout.attention_mask.sum()), rollout.attention_mask.numel()
counted = int(rollout.mask.sum())
print(f"{places} places, {real} real tokens, {counted} of them in answers")
print(f"padding: {1 - real / places:.0%}; logits that a loss needs: {counted / places:.0%}")

# %% [markdown]
# minippo therefore packs, in three ways. Each row begins with its first real token; rows of similar
# length share a micro-batch; and only the positions that predict a counted token go through the
# vocabulary projection. The numbers are the same, the work is less.

# %%
from minippo import response_logits
from minippo.engine.packing import packed_logits

packed = rollout.packed
padded = (rollout.tokens, rollout.attention_mask, rollout.response.shape[1])
with torch.no_grad():
    difference = packed_logits(policy, packed) - response_logits(policy, *padded)[rollout.mask]
print("the logits agree to 1e-4:", bool(difference.abs().max() < 1e-4))
assert difference.abs().max() < 1e-4


# %%
def parts():
    """The rows in micro-batches of 16, similar lengths together."""
    return [batch.packed for batch, _ in rollout.micro_batches(16)]


grouped = sum(part.tokens.numel() for part in parts())
print(f"places of the backbone: {places} padded, {packed.tokens.numel()} without padding on the "
      f"left, {grouped} in groups of like length")  # fmt: skip
print("places of the projection:", rollout.mask.numel(), "->", packed.targets.numel())
assert real <= grouped < packed.tokens.numel() < places


# %% [markdown]
# And the time? One forward and backward pass either way, three times each, the fastest counts. (The
# padded way already leaves out the prompt's logits. Seconds of the processor are counted, which
# other programs do not lengthen. They are this machine's; the claim below them is not.)

# %%
def seconds(logits):
    began = time.process_time()
    logits().logsumexp(-1).sum().backward()
    return time.process_time() - began


def unpadded():
    return torch.cat([packed_logits(policy, part) for part in parts()])


ways = {"padded": lambda: response_logits(policy, *padded), "packed": unpadded}

# %% tags=["nbval-ignore-output"]
times = {name: min(seconds(way) for _ in range(3)) for name, way in ways.items()}
print({name: round(spent, 3) for name, spent in times.items()})

# %%
assert times["packed"] < times["padded"]
print("packed is faster:", times["packed"] < times["padded"])

# %% [markdown]
# `make bench` puts a whole PPO step of minippo beside one of TRL's and beside the *floor*: the
# matrix products that PPO needs, at the best rate of the machine. docs/performance.md has its
# tables. Read the ratio (it depends on the workload, but carries over to other machines better than
# seconds do) and the share of the floor (how much is left to gain); seconds alone say little.
#
# ## bfloat16
#
# On CUDA the matrix products run in bfloat16, weights and formulas stay in float32. bfloat16 has 8
# bits of mantissa, two or three digits. What is left of them in a log-probability can be looked at
# here, since autocast exists on the CPU too. It leaves float64 alone, so we take a copy in float32.

# %%
import copy

from minippo import gather_logprobs
from minippo.engine.devices import precision

single = copy.deepcopy(policy).float()
with torch.no_grad():
    exact = gather_logprobs(packed_logits(single, packed), packed.targets)
    with precision("bf16"):
        rough = gather_logprobs(packed_logits(single, packed), packed.targets)
error = (exact - rough).abs()
print("the formula still gets:", rough.dtype)
print(f"the mean log-probability is {exact.mean():.1f}")
print("bfloat16 moves one by less than 0.01 on average:", bool(error.mean() < 0.01))
print("and by less than 0.2 at worst:", bool(error.max() < 0.2))
assert 1e-4 < error.mean() < 0.01 and 0.01 < error.max() < 0.2

# %% [markdown]
# A ratio is the exponential of the difference of two such numbers. At the first update of a rollout
# it is 1 all the same, up to rounding: the rollout's log-probabilities come from the same forward
# pass as the update's, in the same precision (docs/cuda.md has the numbers). On a GPU (nobody has
# run this on one yet; `make cuda` is the test for it):
#
# ```
# minippo ppo --name hh --data rows.jsonl.gz --device cuda            # bfloat16 by default
# minippo ppo --name hh --data rows.jsonl.gz --device cuda --compile
# ```

# %% [markdown]
# ## Kill it
#
# A run of hours ends in the middle sooner or later. Here one command runs to its end, and its twin
# is killed (`kill -9`: no goodbye) as soon as it has a checkpoint. Then it goes on with `--resume`.

# %%
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SFT = ["minippo", "sft", "--steps", "12", "--save-every", "2", "--batch-size", "16"]
SFT += ["--micro-batch-size", "16", "--device", "cpu", "--out", str(folder)]


# %%
def start(name, *options, launcher=("-m",)):
    """The command in a process of its own, its output kept."""
    command = [sys.executable, *launcher, *SFT, "--name", name, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=QUIET, **pipes)


def finish(process):
    """Waits; anything but success is shown."""
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


# %%
whole, killed = start("whole"), start("killed")
while not (folder / "killed" / "sft" / "latest").exists():
    assert killed.poll() is None, killed.communicate()[0]
    time.sleep(0.01)
killed.send_signal(signal.SIGKILL)
killed.communicate()
print("exit status of the killed one:", killed.returncode)
_ = finish(whole)

# %%
_ = finish(start("killed", "--resume"))


def weights(name):
    return (folder / name / "sft" / "final" / "model.safetensors").read_bytes()


def metrics(name):
    return (folder / name / "metrics.jsonl").read_bytes()


equal = weights("killed") == weights("whole"), metrics("killed") == metrics("whole")
print("after --resume the same bytes: weights {}, metrics {}".format(*equal))
assert all(equal)

# %% [markdown]
# The checkpoint holds everything that the next step depends on: weights, Adam's moments, the place
# in the data, the KL coefficient; randomness is a function of the seed and the step. It is written
# beside the old one and becomes *the* checkpoint in one step, when a small file is replaced.
# `make faults` kills a whole demo 50 times.
#
# ## Several processes
#
# `torchrun` starts the same command several times. Each process takes its rows of each batch;
# gradients are added up, and means are over all tokens of all processes. So two processes make the
# step that one makes, up to rounding:

# %%
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
_ = finish(start("two", launcher=TORCHRUN))

# %%
from safetensors.torch import load_file

one, two = (load_file(folder / n / "sft" / "final" / "model.safetensors") for n in ("whole", "two"))
gap = max(float((one[key] - two[key]).abs().max()) for key in one)
before = Policy.from_pretrained("base").state_dict()
moved = max(float((one[key] - before[key]).abs().max()) for key in one)
print("two processes, one result, to 1e-4:", gap < 1e-4)
print("and training has moved the weights by more than 1e-3:", moved > 1e-3)
assert gap < 1e-4 < 1e-3 < moved

# %% [markdown]
# In a terminal, on a machine with two cards, and for a model that does not fit on one:
#
# ```
# torchrun --standalone --nproc-per-node 2 -m minippo ppo --name hh --data rows.jsonl.gz
# torchrun --standalone --nproc-per-node 2 -m minippo ppo --name hh --data rows.jsonl.gz --fsdp
# ```
#
# ## Claims
#
# What this notebook has said, once more as assertions.

# %%
assert ours.config.activation_function == "gelu_pytorch_tanh"  # one kernel
assert len(rows) == 1 and sum(report.refused.values()) == 3  # nothing was repaired
assert packed.tokens.numel() <= places and counted < real < places  # padding is work
assert weights("killed") == weights("whole")  # a kill costs nothing
assert gap < 1e-4  # two processes, one result
print("all claims hold")

# %% [markdown]
# ## Quiz
#
# 1. Your GPU has 24 GB. Do the four models of GPT-2 XL fit with their optimizer?
# <details><summary>Answer</summary>No. 40 bytes a parameter and 1.56 billion parameters are 62 GB
# before any activation. Split them over cards with --fsdp.</details>
#
# 2. Why may a checkpoint in safetensors be loaded from a stranger, and a pickle not?
# <details><summary>Answer</summary>safetensors is a table of numbers behind a header. A pickle is a
# program for a small machine that can call any function, so loading it runs it.</details>
#
# 3. A micro-batch of rows of similar length: does it change the gradient?
# <details><summary>Answer</summary>No. A minibatch's gradient is a sum over its tokens, divided by
# their number; in which pieces the sum is made changes rounding alone.</details>
#
# 4. Two processes average their gradients, one has 10 tokens and the other 90. What is wrong?
# <details><summary>Answer</summary>Each of the 10 tokens then counts nine times as much as one of
# the 90. Means are over the tokens of all processes: weight by their share, then add.</details>
#
# 5. Your step takes 2 seconds, the floor says 1. What would a twice as fast kernel for AdamW bring?
# <details><summary>Answer</summary>Nothing of the second that is the floor. In
# the other second it saves half of AdamW's part, nothing else. Profile before you
# optimise.</details>
#
# **Bridge.** This was the last stop of the pipeline. docs/performance.md, docs/cuda.md,
# docs/scaling.md and docs/checkpoints.md go further.
