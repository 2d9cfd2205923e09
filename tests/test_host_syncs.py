"""How often the host waits for the device: never in the update, a stated number elsewhere.

Proved on a fake device (fake_cuda.py), which is itself proved first.
"""

from collections import Counter

import pytest
import torch
from fake_cuda import FakeCuda, fake_device
from torch.utils import backend_registration

from minippo.batching import Encoded
from minippo.config import PPOConfig, PretrainConfig, RewardConfig, SFTConfig, ValueConfig
from minippo.models import RewardModel, ValueModel, frozen_copy, tiny_gpt2
from minippo.optim import Hooks, adamw
from minippo.ppo import ppo_update
from minippo.pretrain import train_lm
from minippo.reward_training import train_reward_model
from minippo.rollout import collect_rollout
from minippo.sft import train_sft
from minippo.value_training import train_value_model


@pytest.fixture(scope="module")
def device():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot make a device in Python, newer ones can")
    return fake_device()


@pytest.fixture
def gpu(device):
    with FakeCuda() as gpu:
        yield gpu


def kinds(gpu):
    return [wait.kind for wait in gpu.waits]


ASKING = {
    "item": ("scalar", lambda x: x[0].item()),
    "float": ("scalar", lambda x: float(x.sum())),
    "int": ("scalar", lambda x: int(x[1])),
    "bool": ("scalar", lambda x: bool(x[1] > 0)),
    "if any": ("scalar", lambda x: 1 if (x > 0).any() else 0),
    "equal": ("scalar", lambda x: torch.equal(x, x)),
    "allclose": ("scalar", lambda x: torch.allclose(x, x)),
    "cpu": ("to host", lambda x: x.cpu()),
    "to cpu": ("to host", lambda x: x.to("cpu")),
    "to cpu, non_blocking": ("to host", lambda x: x.to("cpu", non_blocking=True)),
    "tolist": ("to host", lambda x: x.tolist()),
    "copy to the host": ("to host", lambda x: torch.empty(3).copy_(x)),
    "mask": ("shape", lambda x: x[x > 0]),
    "write by mask": ("shape", lambda x: x.index_put_((x > 0,), x[:2] + 1)),
    "nonzero": ("shape", lambda x: x.nonzero()),
    "where": ("shape", lambda x: torch.where(x > 0)),
    "masked_select": ("shape", lambda x: x.masked_select(x > 0)),
    "unique": ("shape", lambda x: x.unique()),
    "repeat_interleave": ("shape", lambda x: x.repeat_interleave((x + 1).long())),
    "blocking copy": ("to device", lambda x: torch.ones(3).to(x.device)),
    "tensor": ("to device", lambda x: torch.tensor([1.0], device=x.device)),
    "new_tensor": ("to device", lambda x: x.new_tensor([1.0])),
    "indices of the host": ("to device", lambda x: x[torch.tensor([0, 1])]),
    "list of indices": ("to device", lambda x: x[[0, 1]]),
    "pageable": ("pageable", lambda x: torch.ones(3).to(x.device, non_blocking=True)),
}


@pytest.mark.parametrize("name", ASKING)
def test_the_fake_notices(gpu, name):
    kind, ask = ASKING[name]
    x = torch.arange(3.0, device=gpu.device)
    assert not gpu.waits
    ask(x)
    assert kinds(gpu) == [kind]
    assert gpu.waits[0].place.startswith("test_host_syncs.py:")


def test_numpy_and_mixed_devices_are_refused_as_by_cuda(gpu):
    x = torch.arange(3.0, device=gpu.device)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(3)


QUIET = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(-1).cumsum(-1),
    "a number of the host": lambda x: x * torch.tensor(2.0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0),
    "write a number by mask": lambda x: x.index_put_((x > 0,), torch.zeros_like(x[0])),
    "indices": lambda x: x[torch.arange(2, device=x.device)],
    "slice": lambda x: x[1:],
    "factories": lambda x: torch.full((3,), 2.0, device=x.device) + x.new_zeros(3),
    "pinned copy": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "nothing to copy": lambda x: torch.tensor([], device=x.device),
    "repeat": lambda x: x.repeat_interleave(2),
}


@pytest.mark.parametrize("name", QUIET)
def test_the_fake_leaves_alone(gpu, name):
    QUIET[name](torch.arange(3.0, device=gpu.device))
    assert gpu.waits == []


def test_arithmetic_and_gradients_are_those_of_the_cpu(gpu):
    def gradient(device):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
        layer.to(device)
        x = torch.arange(8.0).view(2, 4).to(device)
        layer(x).square().mean().backward()
        return [p.grad.cpu() for p in layer.parameters()]

    for fake, real in zip(gradient(gpu.device), gradient("cpu")):
        assert type(fake) is torch.Tensor and torch.equal(fake, real)


# --- the real steps ---------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 8][: 1 + i % 4] for i in range(8)]
ANSWERS = [[9 + i, 10, 11, 12, 1][i % 3 :] for i in range(8)]
ROWS = [Encoded(i, p, [a, [13, 1]]) for i, (p, a) in enumerate(zip(PROMPTS, ANSWERS))]
SMALL = {"batch_size": 4, "lr": 1e-3, "warmup_steps": 1}
PPO = {"batch_size": 8, "minibatch_size": 4, "micro_batch_size": 2, "max_response_tokens": 6}


class Tokenizer:
    """All that PPO asks of one."""

    pad_token_id, eos_token_id = 0, 1


class CountingHooks(Hooks):
    """Keeps the waits of each step."""

    def __init__(self, gpu):
        self.gpu, self.steps, self.seen = gpu, [], 0

    def step(self, stage, step, metrics):
        self.steps.append(self.gpu.waits[self.seen :])
        self.seen = len(self.gpu.waits)


def four_models(device):
    policy = tiny_gpt2(40, n_layer=1, n_embd=16, n_head=2, n_positions=32).to(device)
    reward_model = RewardModel.from_policy(policy)
    value_model = ValueModel.from_reward_model(reward_model)
    return policy, frozen_copy(policy), value_model, frozen_copy(reward_model)


TRAININGS = {
    "pretrain": lambda models, hooks: train_lm(
        models[0], [p + a for p, a in zip(PROMPTS, ANSWERS)], PretrainConfig(steps=3, **SMALL),
        pad_id=0, hooks=hooks,
    ),
    "sft": lambda models, hooks: train_sft(
        models[0], ROWS, SFTConfig(steps=3, micro_batch_size=2, **SMALL), pad_id=0, hooks=hooks
    ),
    "reward": lambda models, hooks: train_reward_model(
        RewardModel.from_policy(models[0]), ROWS,
        RewardConfig(epochs=2, micro_batch_size=2, **SMALL), pad_id=0, hooks=hooks,
    ),
    "reward with margins": lambda models, hooks: train_reward_model(
        RewardModel.from_policy(models[0]), ROWS,
        RewardConfig(epochs=2, micro_batch_size=2, **SMALL), pad_id=0, margins=[0.5] * 8,
        hooks=hooks,
    ),
    "value": lambda models, hooks: train_value_model(
        models[2], ROWS, [0.1 * i for i in range(8)], ValueConfig(epochs=2, **SMALL), pad_id=0,
        hooks=hooks,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_waits_once_a_step_for_its_metrics(gpu, name):
    models, hooks = four_models(gpu.device), CountingHooks(gpu)
    gpu.waits.clear()
    TRAININGS[name](models, hooks)
    assert len(hooks.steps) >= 3
    for waits in hooks.steps[1:]:
        assert [wait.kind for wait in waits] == ["to host"], waits
        assert "tolist" in waits[0].place


def test_a_rollout_waits_once_a_token_and_once_for_each_batch_of_scores(gpu):
    config = PPOConfig(**PPO)
    models = four_models(gpu.device)
    gpu.waits.clear()
    rollout = collect_rollout(*models, PROMPTS, Tokenizer, config)
    counts = Counter((wait.kind, wait.place.split(":")[0]) for wait in gpu.waits)
    expected = {("shape", "generation.py"): rollout.response.shape[1]}  # which rows go on
    expected["to host", "packing.py"] = 1  # the lengths of the answers
    expected["scalar", "passes.py"] = 8 // 2  # the reward model's longest row
    assert counts == expected


def test_rollout_and_update_are_those_of_the_cpu(gpu):
    # The device gets other masks than the CPU (passes.py), which must mean the same.
    def step(device):
        config = PPOConfig(**PPO, kl_loss_coef=0.1)
        policy, ref_policy, value_model, reward_model = four_models(device)
        with torch.no_grad():
            policy.transformer.wte.weight.mul_(3)  # away from the reference
            policy.transformer.ln_f.bias.copy_(40 * policy.transformer.wte.weight[1])  # some EOS
        models = (policy, ref_policy, value_model)
        rollout = collect_rollout(*models, reward_model, PROMPTS, Tokenizer, config)
        rates = {"policy": 1e-3, "value": 1e-3}
        optimizer = adamw({"policy": policy, "value": value_model}, rates)
        stats = ppo_update(*models, optimizer, rollout, config, torch.Generator())
        views = {name: x.cpu() for name, x in vars(rollout).items() if torch.is_tensor(x)}
        return views | {name: float(x) for name, x in stats.items()}

    fake, real = step(gpu.device), step(torch.device("cpu"))
    lengths = real["mask"].sum(1)
    assert lengths.min() < lengths.max()  # rows left the batch on the way
    assert fake.keys() == real.keys()
    for name, expected in real.items():
        torch.testing.assert_close(fake[name], expected, rtol=1e-4, atol=1e-5, msg=name)


UPDATES = {
    "as configured": {},
    "the exact KL in the loss": {"kl_loss_coef": 0.1},
    "one answer at a time, k3 in the loss": {
        "micro_batch_size": 1,
        "kl_loss_coef": 0.1,
        "kl_loss_estimator": "k3",
    },
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_never_waits(gpu, name):
    config = PPOConfig(**(PPO | UPDATES[name]))
    models = four_models(gpu.device)
    rollout = collect_rollout(*models, PROMPTS, Tokenizer, config)
    policy, ref_policy, value_model, _ = models
    rates = {"policy": 1e-3, "value": 1e-3}
    optimizer = adamw({"policy": policy, "value": value_model}, rates)
    before = [p.detach().cpu() for p in policy.parameters()]
    gpu.waits.clear()
    ppo_update(policy, ref_policy, value_model, optimizer, rollout, config, torch.Generator())
    assert gpu.waits == []
    after = [p.detach().cpu() for p in policy.parameters()]
    assert not any(torch.equal(x, y) for x, y in zip(before, after))
