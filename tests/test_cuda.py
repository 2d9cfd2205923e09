"""What can only be seen on a GPU: `python -m pytest -m cuda tests/test_cuda.py` runs all of it.

Skipped where there is none. test_host_syncs.py and test_precision.py show on the CPU what can be
shown there.
"""

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
from test_precision import act, check_bounds, four_models, look
from tiny_runs import save_base

from minippo.app import cli
from minippo.app.run import Run
from minippo.config import PPOConfig
from minippo.engine.devices import (
    checkpoint_layers,
    compile_forward,
    precision,
    stored_as,
    to_device,
)
from minippo.engine.packing import pack, packed_logits
from minippo.generation import generate
from minippo.logprobs import gather_logprobs
from minippo.models import RewardModel, tiny_gpt2
from minippo.optim import adamw
from minippo.ppo import ppo_update
from minippo.rollout import Rollout

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.integration,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = {"batch_size": 16, "minibatch_size": 8, "micro_batch_size": 4}
CONFIG = PPOConfig(**SIZES, max_response_tokens=32, kl_loss_coef=0.1)


@pytest.fixture(scope="module")
def cuda():
    return torch.device("cuda")


@pytest.fixture(scope="module")
def rollout():
    """A rollout of the CPU in float32."""
    return act(four_models(), CONFIG)


def moved(rollout: Rollout, device) -> Rollout:
    """The same rollout on another device."""
    return replace(
        rollout, **{f.name: getattr(rollout, f.name).to(device) for f in fields(rollout)}
    )


def test_a_step_on_cuda_in_float32_is_that_of_the_cpu(cuda, rollout):
    with precision("off"):
        expected = look(four_models(), rollout, CONFIG)
        got = look(four_models(cuda), moved(rollout, cuda), CONFIG)
    for name in ("logprobs", "values", "scores", "loss"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-3)
    for name in ("gradient/policy", "gradient/value"):
        pair = (got[name].double(), expected[name].double())
        assert torch.cosine_similarity(*pair, dim=0) > 1 - 1e-5


def test_bfloat16_on_cuda_is_within_the_bounds_of_the_cpu(cuda, rollout):
    models = four_models(cuda)
    with precision("off"):
        expected = look(models, moved(rollout, cuda), CONFIG)
    with precision("auto"):
        check_bounds(look(models, moved(rollout, cuda), CONFIG), expected)


def test_the_first_ratio_on_cuda_is_near_1(cuda):
    # Other rows beside it may change the kernel that a row goes through, so near is all there is.
    models = four_models(cuda)
    with torch.no_grad():
        for choice, bound in (("off", 1e-3), ("bf16", 0.1)):
            with precision(choice):
                rollout = act(models, CONFIG)
                for batch in rollout.minibatches(8, torch.Generator()):
                    logits = packed_logits(models[0], batch.packed)
                    logprobs = gather_logprobs(logits, batch.packed.targets)
                    assert (logprobs - batch.logprobs[batch.mask]).abs().max() < bound


def test_fused_adamw_steps_as_the_plain_one(cuda):
    policy = tiny_gpt2(64).to(cuda)
    plain = copy.deepcopy(policy)
    fused = adamw({"policy": policy}, {"policy": 1e-3})
    assert fused.defaults["fused"]
    options = {"eps": 1e-5, "weight_decay": 0.0, "fused": False, "lr": 1e-3}
    for model, optimizer in (
        (policy, fused),
        (plain, torch.optim.AdamW(plain.parameters(), **options)),
    ):
        for step in range(3):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for got, expected in zip(policy.parameters(), plain.parameters()):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_an_update_never_makes_the_host_wait(cuda):
    models = four_models(cuda)
    rollout = act(models, CONFIG)
    optimizer = adamw({"policy": models[0], "value": models[2]}, {"policy": 1e-4, "value": 1e-4})
    arguments = (*models[:3], optimizer, rollout, CONFIG)
    ppo_update(*arguments, torch.Generator())  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = ppo_update(*arguments, torch.Generator())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(stats["loss/total"])


def test_copies_to_cuda_arrive(cuda):
    x = torch.arange(100_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = to_device(x, cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), x)


def test_a_compiled_forward_on_cuda_gives_the_same(cuda):
    policy = tiny_gpt2(64).to(cuda)
    compiled = copy.deepcopy(policy)
    compile_forward(compiled)
    with precision("off"):
        for length in (24, 31, 40):
            tokens = torch.randint(2, 64, (4, length), device=cuda)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            grads = []
            for model in (policy, compiled):
                packed_logits(model, pack(tokens, mask, mask[:, -8:])).square().mean().backward()
                grads.append([p.grad.clone() for p in model.parameters()])
                model.zero_grad()
            for got, expected in zip(*grads):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    query = torch.randint(2, 64, (4, 8), device=cuda)
    answers = [generate(m, query, torch.ones_like(query), 8, 1, 0, 0) for m in (policy, compiled)]
    assert torch.equal(*answers)


def peak_memory(model, tokens) -> int:
    """Bytes that a forward and a backward pass take beside the weights and their gradients."""
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    packed = pack(tokens, everywhere, everywhere[:, -8:])
    for _ in range(2):  # the first makes the gradients
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        packed_logits(model, packed).square().mean().backward()
    return torch.cuda.max_memory_allocated() - before


def test_checkpointing_saves_memory(cuda):
    policy = tiny_gpt2(64, n_layer=8, n_embd=256, n_head=4).to(cuda)
    tokens = torch.randint(2, 64, (16, 256), device=cuda)
    everything = peak_memory(policy, tokens)
    checkpoint_layers(policy)
    assert peak_memory(policy, tokens) < 0.5 * everything


def test_frozen_models_in_bfloat16_give_what_float32_gives(cuda, rollout):
    models = four_models(cuda)
    places = moved(rollout, cuda)
    places = (places.tokens, places.attention_mask)
    with precision("auto"), torch.no_grad():
        expected = models[3](*places)
        got = stored_as(RewardModel.from_pretrained("reward").to(cuda), "bfloat16")(*places)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)


# --- whole runs -------------------------------------------------------------------------------

LIMITS = ["--{}.max-prompt-tokens 400", "--{}.max-response-tokens 16"]
DEMO = """
    --sft.steps 4 --sft.batch-size 8 --sft.micro-batch-size 8
    --reward.prompts 16 --reward.held-out 8 --reward.candidates 3 --reward.batch-size 8
    --reward.micro-batch-size 8
    --value.prompts 16 --value.held-out 8 --value.candidates 2 --value.batch-size 8
    --ppo.steps 4 --ppo.batch-size 8 --ppo.minibatch-size 8 --ppo.micro-batch-size 8
    --ppo.save-every 1
    --eval.prompts 12 --eval.best-of 2 --eval.samples 3
""".split()
for stage in ("sft", "reward", "ppo", "eval"):
    DEMO += " ".join(LIMITS).format(stage, stage).split()


def demo(root, name: str, *options) -> list[dict]:
    """A short demo on CUDA; returns its metrics."""
    if not (root / "base").is_dir():
        save_base(root / "base")
    where = ["--out", str(root), "--name", name, "--base", str(root / "base"), "--device", "cuda"]
    cli.main(["demo", *where, *DEMO, *options])
    rows = (root / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--autocast", "off", "--tf32"],
        ["--gradient-checkpointing", "--frozen-dtype", "bfloat16"],
        ["--compile"],
    ],
    ids=" ".join,
)
def test_a_demo_runs_on_cuda(tmp_path, options):
    rows = demo(tmp_path, "demo", *options)
    assert {row["stage"] for row in rows} == {"sft", "reward", "value", "ppo"}
    assert (tmp_path / "demo" / "report.html").is_file()


def test_a_run_on_cuda_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = [row for row in demo(tmp_path, "whole") if row["stage"] == "ppo"]
    step = Run.step

    def stop_after_the_second(run, stage, number, metrics):
        run.stopping = run.stopping or (stage, number) == ("ppo", 1)
        step(run, stage, number, metrics)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "step", stop_after_the_second)
        demo(tmp_path, "stopped")
    resumed = [row for row in demo(tmp_path, "stopped", "--resume") if row["stage"] == "ppo"]
    assert [row["step"] for row in resumed] == [row["step"] for row in whole] == [0, 1, 2, 3]
    for name, value in whole[2].items():
        if isinstance(value, float):  # CUDA sums in no fixed order
            assert resumed[2][name] == pytest.approx(value, rel=0.05, abs=0.05), name
