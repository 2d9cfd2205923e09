"""bfloat16 against float32: how far apart, and that only the models' own products are in bfloat16.

On the CPU, with the shipped checkpoints: autocast rounds there as it does on CUDA, the order of the
sums differs. test_cuda.py holds a real device to the same bounds.
"""

import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minippo
from minippo.batching import encode_prompt
from minippo.config import PPOConfig
from minippo.engine.devices import precision
from minippo.engine.packing import packed_logits, packed_values
from minippo.logprobs import gather_logprobs
from minippo.masking import masked_mean
from minippo.models import Policy, RewardModel, ValueModel, load_tokenizer
from minippo.ppo import ppo_loss
from minippo.rollout import collect_rollout
from minippo.worlds.tinyhh.rows import prompt_rows

SIZES = {"batch_size": 16, "minibatch_size": 16, "micro_batch_size": 16}
CONFIG = PPOConfig(**SIZES, max_response_tokens=32, kl_loss_coef=0.1)

# The largest distances. bfloat16 has 8 bits, one part in 256. Measured with these 16 answers:
# 0.066, 0.0039, 0.033 and 0.0002; the mean distance of the log-probabilities 0.003; the gradients'
# cosines 1 - 2e-4 and 1 - 2e-6; the first log ratio 1e-4.
BOUNDS = {"logprobs": 0.2, "values": 0.015, "scores": 0.1, "loss": 0.001}
MEAN_BOUND = 0.01
COSINE = {"policy": 0.999, "value": 0.99999}
FIRST_LOG_RATIO = 1e-3


def four_models(device="cpu"):
    """Policy, reference, critic, reward model, all shipped; the reference is the SFT model."""
    models = (
        Policy.from_pretrained("ppo"),
        Policy.from_pretrained("sft"),
        ValueModel.from_pretrained("value"),
    )
    return [m.to(device) for m in (*models, RewardModel.from_pretrained("reward"))]


def act(models, config=CONFIG, count=16):
    """A rollout on the first prompts of TinyHH."""
    tokenizer, rows = load_tokenizer("sft"), prompt_rows("test", count)
    prompts = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
    return collect_rollout(*models, prompts, tokenizer, config)


def look(models, rollout, config=CONFIG) -> dict:
    """Everything PPO takes from the models of a rollout, and the gradients of its loss."""
    policy, ref_policy, value_model, reward_model = models
    packed = rollout.packed
    seen = {"logprobs": gather_logprobs(packed_logits(policy, packed), packed.targets)}
    seen["values"] = packed_values(value_model, packed)
    seen["scores"] = reward_model(rollout.tokens, rollout.attention_mask)
    loss, _ = ppo_loss(policy, ref_policy, value_model, rollout, config)
    loss.backward()
    for name, model in (("policy", policy), ("value", value_model)):
        seen[f"gradient/{name}"] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
    return {name: x.detach().cpu() for name, x in (seen | {"loss": loss}).items()}


def check_bounds(got: dict, expected: dict) -> None:
    """bfloat16 is near float32, and it is not float32."""
    for name, bound in BOUNDS.items():
        assert got[name].dtype == torch.float32
        assert 0 < (got[name] - expected[name]).abs().max() < bound, name
    assert (got["logprobs"] - expected["logprobs"]).abs().mean() < MEAN_BOUND
    for name, bound in COSINE.items():
        pair = (got[f"gradient/{name}"], expected[f"gradient/{name}"])
        assert bound < torch.cosine_similarity(*(x.double() for x in pair), dim=0) < 1, name


@pytest.fixture(scope="module")
def seen():
    """The same rollout, seen in float32 and in bfloat16."""
    models = four_models()
    rollout = act(models)
    views = {}
    for choice in ("off", "bf16"):
        with precision(choice):
            views[choice] = look(models, rollout)
    return views


def test_bfloat16_is_within_bounds_of_float32(seen):
    check_bounds(seen["bf16"], seen["off"])


def test_the_first_ratio_is_1_in_bfloat16():
    # The rollout and the update see the same answers in other batches: another order of sums.
    models, config = four_models(), PPOConfig(**SIZES, max_response_tokens=32)
    with precision("bf16"), torch.no_grad():
        rollout = act(models, config)
        for batch in rollout.minibatches(4, torch.Generator()):
            logits = packed_logits(models[0], batch.packed)
            logprobs = gather_logprobs(logits, batch.packed.targets)
            distance = (logprobs - batch.logprobs[batch.mask]).abs()
            assert distance.max() <= FIRST_LOG_RATIO


PACKAGE = Path(minippo.__file__).parent
# Operations that move numbers, or bring them out of bfloat16.
MOVING = {"_to_copy", "index", "index_select", "cat", "clone", "empty_like"}


class BFloat16Places(TorchDispatchMode):
    """Which functions of minippo are at work when something is computed in bfloat16."""

    def __init__(self):
        super().__init__()
        self.functions = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        computes = not func.is_view and func.overloadpacket.__name__ not in MOVING
        if computes and any(x.dtype == torch.bfloat16 for x in tensors):
            self.functions.add(self.innermost())
        return result

    @staticmethod
    def innermost() -> str:
        """The innermost function of the package on the stack."""
        frame = sys._getframe()
        while frame and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            frame = frame.f_back
        return frame.f_code.co_name if frame else ""


def test_no_formula_runs_in_bfloat16():
    models = four_models()
    half, mask = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bool)
    with precision("bf16"), BFloat16Places() as places:
        rollout = act(models)
        ppo_loss(*models[:3], rollout, CONFIG)
        assert places.functions == {"forward_pass"}
        masked_mean(half, mask)
        assert places.functions == {"forward_pass", "masked_mean"}  # it would have been seen
    made = [getattr(rollout, field.name) for field in fields(rollout)]
    assert {x.dtype for x in made if x.is_floating_point()} == {torch.float32}
