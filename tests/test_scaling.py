"""The arithmetic of docs/scaling.md, against the tensors of a real step and the real sizes."""

import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from minippo.config import PPOConfig
from minippo.models import RewardModel, ValueModel, frozen_copy, tiny_gpt2
from minippo.optim import Hooks
from minippo.ppo import train_ppo

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
SIZES = {  # Radford et al. 2019: width, layers, heads
    "GPT-2 small": (768, 12, 12),
    "GPT-2 medium": (1024, 24, 16),
    "GPT-2 large": (1280, 36, 20),
    "GPT-2 XL": (1600, 48, 25),
}


def row(name: str) -> list[str]:
    """The cells of the row of a table that begins with the name."""
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", TEXT, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


class Seen(Hooks):
    """Looks at the gradients before the optimizer clears them, and keeps the optimizer."""

    def start(self, stage, total, state):
        self.optimizer, self.gradients = state["optimizer"], {}
        self.optimizer.register_step_pre_hook(lambda *_: self.look())
        return 0

    def look(self):
        for group in self.optimizer.param_groups:
            self.gradients[group["name"]] = size(p.grad for p in group["params"])


def size(tensors) -> int:
    """Bytes of the tensors; the counts of steps, which have no axis, do not count."""
    return sum(x.numel() * x.element_size() for x in tensors if x.dim())


@pytest.fixture(scope="module")
def measured():
    """Name of the model -> bytes per parameter: of weights, gradients and Adam's moments."""

    class Tokenizer:
        eos_token_id, pad_token_id = 1, 0

    policy = tiny_gpt2(30, 1, 16, 2, 40)
    reward_model = frozen_copy(RewardModel.from_policy(policy, pad_id=0))
    models = {"policy": policy, "value model": ValueModel.from_reward_model(reward_model)}
    models |= {"reference": frozen_copy(policy), "reward model": reward_model}
    order = (models[n] for n in ("policy", "reference", "value model", "reward model"))
    sizes = dict(batch_size=2, minibatch_size=2, micro_batch_size=2)
    config, seen = PPOConfig(steps=1, max_response_tokens=8, **sizes), Seen()
    train_ppo(*order, [[2, 3], [4, 5]], Tokenizer, config, hooks=seen)
    moments = {
        group["name"]: size(x for p in group["params"] for x in seen.optimizer.state[p].values())
        for group in seen.optimizer.param_groups
    }
    found = {}
    for name, model in models.items():
        count, key = sum(p.numel() for p in model.parameters()), name.split()[0]
        trained = seen.gradients.get(key, 0), moments.get(key, 0)
        trained = trained if name in ("policy", "value model") else (0, 0)
        parts = size(model.parameters()), *trained
        assert all(part % count == 0 for part in parts)
        found[name] = [part // count for part in parts]
        assert trained[0] or not any(p.grad is not None for p in model.parameters())
    return found


@pytest.mark.parametrize("name", ["policy", "value model", "reference", "reward model"])
def test_bytes_per_parameter_are_those_of_a_real_step(measured, name):
    *parts, total = row(name)
    assert [int(part or 0) for part in parts] == measured[name]
    assert int(total) == sum(measured[name])


def test_four_models_of_one_size_take_the_sum(measured):
    assert int(row("all four, of one size")[-1]) == sum(map(sum, measured.values())) == 40
    small = sum(measured["value model"]) + sum(measured["reward model"])
    large = sum(measured["policy"]) + sum(measured["reference"])
    assert f"{large} N + {small // 10} N = {large + small // 10} N" in TEXT


@pytest.mark.parametrize("name", [*SIZES, "one billion"])
def test_the_table_is_40_bytes_a_parameter_split_over_the_cards(name):
    count, *shares = row(name)
    count = int(count.replace(",", ""))
    assert shares == [f"{40 * count / 1e9 / cards:.1f}" for cards in (1, 2, 4, 8)]


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_gpt2(name):
    width, layers, heads = SIZES[name]
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads))
    assert int(row(name)[0].replace(",", "")) == sum(p.numel() for p in model.parameters())


def test_the_logits_and_the_traffic_of_sampling():
    assert f"{16 * 128 * 50_257 * 4 / 1e9:.1f} GB, and about three" in TEXT
    assert f"of 4 GB that writes 128 tokens moves {4 * 128} GB" in " ".join(TEXT.split())
