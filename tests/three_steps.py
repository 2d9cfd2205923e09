"""Three steps of every training in float64, kept as numbers: a move of code must not change them.

    python -m tests.three_steps              # compares with tests/three_steps.json
    python -m tests.three_steps --write      # after a change of what is computed, and only then
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from minippo.batching import Encoded, encode_prompt, encode_rows
from minippo.config import PPOConfig, PretrainConfig, RewardConfig, SFTConfig, ValueConfig
from minippo.models import Policy, RewardModel, ValueModel, frozen_copy, load_tokenizer
from minippo.ppo import train_ppo
from minippo.pretrain import encode_texts, train_lm
from minippo.reward_training import train_reward_model
from minippo.sft import train_sft
from minippo.value_training import train_value_model
from minippo.worlds.tinyhh.rows import demonstrations, prompt_rows

RECORD = Path(__file__).with_name("three_steps.json")
SMALL = PPOConfig(
    steps=3, batch_size=12, minibatch_size=6, micro_batch_size=3, warmup_steps=1,
    max_response_tokens=24,
)  # fmt: skip
WAYS = {
    "default": {},
    "full in the reward and in the loss": {
        "kl_estimator": "full", "kl_loss_coef": 0.05, "temperature": 0.8,
    },
    "k3 in the loss, simple advantages": {
        "kl_estimator": "k3", "kl_loss_coef": 0.1, "kl_loss_estimator": "k3",
        "advantage": "simple",
    },
    "mse in the loss, adaptive beta": {
        "kl_estimator": "mse", "kl_loss_coef": 0.1, "kl_loss_estimator": "mse",
        "target_kl": 3.0, "kl_horizon": 100,
    },
}  # fmt: skip


def other_trainings() -> dict[str, list[float]]:
    """The metrics of three steps of pretraining, SFT, reward model and critic."""
    tokenizer = load_tokenizer("base")
    pad_id, rows = tokenizer.pad_token_id, demonstrations("sft", 20)
    answered, _ = encode_rows(rows, tokenizer, 128, 48, ["answer"])
    ranked = [Encoded(i, a.prompt, [a.responses[0], b.responses[0], c.responses[0][:4]])
              for i, (a, b, c) in enumerate(zip(answered, answered[1:], answered[2:]))]  # fmt: skip
    texts, _ = encode_texts(tokenizer, [row["answer"] for row in rows], 128)
    targets = [i % 5 - 2.0 for i in range(len(answered))]
    small = {"batch_size": 6, "warmup_steps": 1}
    base = Policy.from_pretrained("base")
    reward_model = RewardModel.from_policy(base)
    value_model = ValueModel.from_policy(base, seed=1)
    pretrain, sft = (
        PretrainConfig(steps=3, **small),
        SFTConfig(steps=3, **small, micro_batch_size=3),
    )
    reward = RewardConfig(epochs=1, **small, micro_batch_size=3)
    value = ValueConfig(epochs=1, **small)
    histories = {
        "pretrain": train_lm(
            frozen_copy(base).requires_grad_(True), texts, pretrain, pad_id=pad_id
        ),
        "sft": train_sft(base, answered, sft, pad_id=pad_id),
        "reward": train_reward_model(reward_model, ranked, reward, pad_id=pad_id),
        "value": train_value_model(value_model, answered, targets, value, pad_id=pad_id),
    }
    return {
        f"{stage}: {key}": [metrics[key] for metrics in history]
        for stage, history in histories.items()
        for key in history[0]
    }


def three_steps(changes: dict) -> dict[str, list[float]]:
    """Every metric of every step, and the sum and the norm of every weight after the last."""
    config = dataclasses.replace(SMALL, **changes)
    tokenizer, policy = load_tokenizer("sft"), Policy.from_pretrained("sft")
    reward_model = RewardModel.from_pretrained("reward")
    value_model = ValueModel.from_pretrained("value")
    rows = prompt_rows("ppo", 20)
    prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
    history = train_ppo(
        policy, frozen_copy(policy), value_model, reward_model, prompts, tokenizer, config,
        score_stats=(reward_model.mean, reward_model.std), seed=7,
    )  # fmt: skip
    found = {key: [metrics[key] for metrics in history] for key in history[0]}
    for name, model in {"policy": policy, "value": value_model}.items():
        for key, weight in model.named_parameters():
            found[f"{name}/{key}"] = [float(weight.detach().sum()), float(weight.detach().norm())]
    return found


def in_float64() -> dict[str, dict]:
    """What three steps of each of the WAYS give, on one thread."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        ppo = {name: three_steps(changes) for name, changes in WAYS.items()}
        return ppo | {"the other trainings": other_trainings()}
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)


def largest_difference(found: dict, recorded: dict) -> tuple[float, str]:
    """The largest difference, relative where numbers exceed 1, and where it is."""
    worst = (0.0, "nowhere")
    for way, numbers in recorded.items():
        assert found[way].keys() == numbers.keys()
        for key, values in numbers.items():
            for got, wanted in zip(found[way][key], values, strict=True):
                worst = max(worst, (abs(got - wanted) / max(1, abs(wanted)), f"{way}: {key}"))
    return worst


def main() -> None:
    """Compares, or writes the record anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the record anew")
    parser.add_argument("--to", type=Path, default=RECORD, help="where it stands")
    arguments = parser.parse_args()
    found = in_float64()
    if arguments.write:
        arguments.to.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    difference, where = largest_difference(found, json.loads(arguments.to.read_text()))
    print(f"largest difference {difference:.1e}, {where}")


if __name__ == "__main__":
    main()
