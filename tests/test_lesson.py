"""What lessons have in common: one set-up, and double precision through everything they call."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minippo.batching import Encoded, encode_prompt
from minippo.config import PPOConfig, RewardConfig, SFTConfig, ValueConfig
from minippo.generation import generate_many
from minippo.lesson import set_up
from minippo.models import Policy, RewardModel, ValueModel, frozen_copy, load_tokenizer
from minippo.optim import finite_metrics
from minippo.ppo import train_ppo
from minippo.reward_training import score_all, train_reward_model
from minippo.rollout import collect_rollout
from minippo.sft import train_sft
from minippo.value_training import prompt_explained_variance, train_value_model
from minippo.worlds.oracle import TabularPolicy, TabularValue, feelings_world
from minippo.worlds.tinyhh.rows import prompt_rows

SIZES = {"batch_size": 4, "minibatch_size": 4, "micro_batch_size": 2, "max_response_tokens": 12}


@pytest.fixture
def double():
    """What a lesson computes in."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Rounded(TorchDispatchMode):
    """Keeps the operations that make something of less than double precision."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        name = func.overloadpacket.__name__
        # The fused AdamW counts its steps in a float32 scalar, which begins at 0.
        made = [x for x in made if x.dim() or name != "zeros"]
        if any(x.is_floating_point() and x.dtype != torch.float64 for x in made):
            self.operations.add(name)
        return result


def started(code: str, **settings) -> subprocess.CompletedProcess:
    """A new Python that runs the code."""
    plain = {name: value for name, value in os.environ.items() if name != "MINIPPO_THREADS"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=plain | settings, capture_output=True, text=True)


def test_set_up_is_all_that_a_lesson_needs():
    code = """
from minippo.lesson import set_up
set_up()
import matplotlib, torch, tqdm, sys
first = torch.rand(1)
torch.manual_seed(0)
assert first == torch.rand(1) and torch.get_default_dtype() == torch.float64
assert str(torch.tensor([1 / 3, -2.0])) == "tensor([ 0.333, -2.000])"
assert not matplotlib.rcParams["axes.spines.top"]
list(tqdm.tqdm(range(3)))
print(torch.get_num_threads())
"""
    for settings, threads in (({}, 1), ({"MINIPPO_THREADS": "2"}, 2)):
        ran = started(code, **settings)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{threads}\n", "")


@pytest.mark.parametrize("threads", ["", "0", "-1", "two", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch, threads):
    monkeypatch.setenv("MINIPPO_THREADS", threads)
    with pytest.raises(ValueError, match=f"MINIPPO_THREADS is '{threads}'; .* above 0"):
        set_up()


def test_double_precision_is_seen_to_be_lost():
    with Rounded() as rounded:
        torch.ones(2, dtype=torch.float64).float()
    assert rounded.operations == {"_to_copy"}


def test_what_is_loaded_takes_the_default_dtype(double):
    loaded = (
        Policy.from_pretrained("sft"),
        RewardModel.from_pretrained("reward"),
        ValueModel.from_pretrained("value"),
    )
    assert {p.dtype for model in loaded for p in model.parameters()} == {torch.float64}
    torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in Policy.from_pretrained("sft").parameters()} == {torch.float32}


def test_nothing_of_a_lesson_is_rounded_to_single_precision(double):
    tokenizer, rows = load_tokenizer("sft"), prompt_rows("ppo", 4)
    prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
    policy, reward_model = Policy.from_pretrained("ppo"), RewardModel.from_pretrained("reward")
    value_model, pad_id = ValueModel.from_pretrained("value"), tokenizer.pad_token_id
    config = PPOConfig(**SIZES, kl_loss_coef=0.1, ppo_epochs=1, steps=1)
    models = policy, frozen_copy(Policy.from_pretrained("sft")), value_model
    with Rounded() as rounded:
        answers = generate_many(policy, prompts, tokenizer, 12, seed=1, temperature=0.9)
        few = [Encoded(n, *pair) for n, pair in enumerate(zip(prompts, ([a] for a in answers)))]
        pairs = [Encoded(row.row, row.prompt, [*row.responses, [5, 1]]) for row in few]
        scores = [row[0] for row in score_all(reward_model, few, pad_id)]
        train_sft(policy, few, SFTConfig(steps=1, batch_size=4, micro_batch_size=4), pad_id=pad_id)
        train_reward_model(reward_model, pairs, RewardConfig(epochs=1), pad_id=pad_id)
        train_value_model(value_model, few, scores, ValueConfig(batch_size=4), pad_id=pad_id)
        train_ppo(*models, reward_model, prompts, tokenizer, config)
        prompt_explained_variance(value_model, few, scores, pad_id)
        rollout = collect_rollout(*models, reward_model, prompts, tokenizer, config)
    assert rounded.operations == set()
    assert rollout.raw_scores.dtype == torch.float64


def test_nothing_of_the_oracle_is_rounded_to_single_precision(double):
    world, ref = feelings_world()
    table, critic = TabularPolicy(world, ref), TabularValue(world)
    config = PPOConfig(**SIZES | {"max_response_tokens": world.length}, steps=1)
    with Rounded() as rounded:
        given = world.score_fn, world.prompts(4), world, config
        train_ppo(table, TabularPolicy(world, ref), critic, *given)
    assert rounded.operations == set()


def test_metrics_keep_their_digits():
    third = torch.tensor(1 / 3, dtype=torch.float64)
    assert finite_metrics("sft", 0, {"loss/lm": third})["loss/lm"] == 1 / 3
