"""Several processes make the updates of one, die with a word, and leave what can be resumed.

Most processes here are forks of this one, so that none of them imports torch anew.
"""

import functools
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from minippo.app import cli, launch
from minippo.app.launch import joined
from minippo.app.run import Run
from minippo.batching import Encoded, left_pad
from minippo.config import PPOConfig, PretrainConfig, RewardConfig, SFTConfig, ValueConfig
from minippo.engine import ranks
from minippo.engine.devices import checkpoint_layers, stored_as
from minippo.engine.ranks import (
    all_sum,
    alone,
    gather_rows,
    in_lockstep,
    on_any_rank,
    on_main,
    rank,
    rows_of_this_rank,
    shard,
    sum_gradients,
    sum_metrics,
    whole,
    world,
)  # fmt: skip
from minippo.evaluation import kl_per_sequence
from minippo.generation import generate, generate_many
from minippo.models import Policy, RewardModel, ValueModel, frozen_copy, tiny_gpt2
from minippo.optim import Hooks
from minippo.ppo import train_ppo
from minippo.pretrain import train_lm
from minippo.reward_training import score_all, train_reward_model
from minippo.rollout import collect_rollout
from minippo.sft import train_sft
from minippo.value_training import prompt_explained_variance, train_value_model

pytestmark = pytest.mark.integration

if not hasattr(os, "fork") or not torch.distributed.is_available():
    pytest.skip("this system has no fork, or torch no processes", allow_module_level=True)

SAVING = ["--save-every", "2", "--warmup-steps", "1"]
MICRO = ["--batch-size", "48", "--micro-batch-size", "8"]
OPTIONS = {  # on top of those of tiny_runs
    "pretrain": ["--steps", "3", "--batch-size", "48"],
    "sft": ["--steps", "3", *MICRO],
    "reward": [*MICRO, "--epochs", "1", "--held-out", "12"],
    "value": ["--prompts", "60", "--held-out", "12", "--batch-size", "48", "--epochs", "2"],
    "ppo": ["--steps", "4", *MICRO, "--minibatch-size", "24"],
}


def as_rank(number: int, processes: int, port: int, action):
    """In a child: what torchrun tells a process, then the action."""
    signal.alarm(240)  # whatever hangs ends
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x"}
    action()


def together(processes: int, action, folder: Path) -> list[int]:
    """Exit codes of that many processes which do the same; what they say is in folder/RANK.log."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = [functools.partial(as_rank, i, processes, port, action) for i in range(processes)]
    actions = asked if processes > 1 else [action]
    children = [tiny_runs.forked(a, folder / f"{i}.log") for i, a in enumerate(actions)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def results(processes: int, function, folder: Path) -> list[dict]:
    """What the function returns on each rank, inside `joined`."""

    def action():
        with joined():
            torch.save(function(), folder / f"{rank()}.pt")

    codes = together(processes, action, folder)
    said = [(folder / f"{i}.log").read_text()[-2000:] for i in range(processes)]
    assert codes == [0] * processes, said
    return [torch.load(folder / f"{i}.pt") for i in range(processes)]


# the parts


def parts() -> dict:
    """Each function once, on what depends on the rank."""
    number = rank()
    model = torch.nn.Linear(3, 5)
    model.weight.grad = torch.full((5, 3), 1.0 + number)
    model.bias.grad = torch.arange(5.0) * 10**number
    ranks.BUCKET = 4  # so that there are two messages
    sum_gradients(model.parameters())
    own = torch.arange(8)[rows_of_this_rank(8)]
    with alone():
        inside = (world(), rank(), float(all_sum(torch.ones(()))))
    return {
        "gradients": [p.grad for p in model.parameters()],
        "own": own.tolist(),
        "gathered": gather_rows(own * 10, own, 8),
        "lockstep": in_lockstep(["a", "b", "c"][: number + 1]),
        "anywhere": [on_any_rank(number == 2), on_any_rank(False)],
        "metrics": sum_metrics({"a": torch.tensor(float(number)), "b": 2.0}),
        "alone": inside,
        "main": on_main(lambda: 7)(),
    }


def test_what_three_processes_do_together(tmp_path):
    first, second, third = results(3, parts, tmp_path)
    assert [r["own"] for r in (first, second, third)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    for got in (first, second, third):
        weight, bias = got["gradients"]
        assert torch.equal(weight, torch.full((5, 3), 6.0))
        assert torch.equal(bias, torch.arange(5.0) * 111)
        assert got["gathered"].tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
        assert got["anywhere"] == [True, False]
        assert {name: float(value) for name, value in got["metrics"].items()} == {"a": 3, "b": 6}
        assert got["alone"] == (1, 0, 1.0)
    assert first["lockstep"] == [("a", True), ("a", False), ("a", False)]
    assert second["lockstep"] == [("a", True), ("b", True), ("b", False)]
    assert third["lockstep"] == [("a", True), ("b", True), ("c", True)]
    assert [r["main"] for r in (first, second, third)] == [7, None, None]


def test_a_batch_smaller_than_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 2 rows"):
        rows_of_this_rank(2)


def test_fsdp_without_torchrun_says_how_to_start_it():
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2 -m minippo"):
        shard(tiny_gpt2(20, 1, 8, 2, 16), torch.device("cpu"))


def test_what_fails_in_the_main_process_is_raised_there_as_it_was(monkeypatch):
    def write():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        ranks.on_main(write)()
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "on_any_rank", lambda flag: True)  # the main one has failed
    with pytest.raises(ValueError, match="main process could not go on"):
        ranks.on_main(write)()


def test_an_error_that_all_processes_meet_is_said_by_the_main_one(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "0")
    cli._let_main_speak(ValueError())
    monkeypatch.setenv("RANK", "1")
    cli._let_main_speak(launch.ProcessLost())  # whoever is left says so at once
    assert waits == []
    cli._let_main_speak(ValueError())
    assert waits == [3]


# the library: uneven shares, rows that end early, models in parts


class Tokenizer:
    eos_token_id, pad_token_id = 1, 0


PROMPTS = [[2 + (i * j) % 9 for j in range(1, 3 + i % 4)] for i in range(10)]
RANKINGS = [Encoded(i, PROMPTS[i], [[3, 1], [4, 5, 1], [6, 1]][: 2 + i % 2]) for i in range(10)]
SMALL = PPOConfig(
    steps=2, batch_size=10, minibatch_size=5, micro_batch_size=1, ppo_epochs=2, warmup_steps=0,
    kl_loss_coef=0.1, max_response_tokens=12, lr=1e-3, value_lr=1e-3,
)  # fmt: skip
MANY = [[2 + (i * i + j) % 9 for j in range(1 + i % 5)] for i in range(48)]
FULL = replace(SMALL, batch_size=48, minibatch_size=24, micro_batch_size=12)


class Kept(Hooks):
    """Keeps the models of a training."""

    def start(self, stage, total, state):
        self.state = state
        return 0


def small_training(split: bool) -> dict:
    """A rollout, scores, samples, and what each training makes of its model."""
    base, policy = tiny_gpt2(12, 1, 16, 2, 40), tiny_gpt2(12, 1, 16, 2, 40, seed=1)
    reward_model = RewardModel.from_policy(policy, pad_id=0)
    ref_policy, value_model = frozen_copy(policy), ValueModel.from_reward_model(reward_model)
    half = stored_as(frozen_copy(policy), "bfloat16")
    models = [policy, ref_policy, value_model, reward_model]
    if split:  # as with --fsdp --gradient-checkpointing
        for model in (base, policy, value_model, reward_model):
            checkpoint_layers(model)
        half = shard(half, torch.device("cpu"))
        base, *models = [shard(model, torch.device("cpu")) for model in [base, *models]]
    rates = {"batch_size": 5, "lr": 1e-3, "warmup_steps": 0}
    micro, targets = {"micro_batch_size": 1, **rates}, [0.1 * i for i in range(10)]
    texts = [row.prompt + row.responses[0] for row in RANKINGS]
    history = train_lm(base, texts, PretrainConfig(steps=2, **rates), pad_id=0)
    history += train_sft(base, RANKINGS, SFTConfig(steps=2, **micro), pad_id=0)
    history += train_reward_model(reward_model, RANKINGS, RewardConfig(epochs=1, **micro), pad_id=0)
    history += train_value_model(value_model, RANKINGS, targets, ValueConfig(**rates), pad_id=0)
    rollout = collect_rollout(*models, PROMPTS, Tokenizer, SMALL)
    halved = collect_rollout(models[0], half, *models[2:], PROMPTS, Tokenizer, SMALL)
    kept = Kept()
    query, mask = left_pad(PROMPTS, 0)
    history += train_ppo(*models, PROMPTS, Tokenizer, SMALL, hooks=kept)
    full = collect_rollout(*models, MANY, Tokenizer, FULL, seed=5)
    history += train_ppo(*models, MANY, Tokenizer, FULL, seed=5)
    return {
        "tokens": [rollout.tokens, full.tokens],
        "half": halved.ref_logprobs,
        "halving": float((halved.ref_logprobs - rollout.ref_logprobs).abs().max()),
        "advantages": rollout.advantages,
        "many": generate_many(ref_policy, PROMPTS, Tokenizer, 12, 3, batch_size=2),
        "answers": generate(models[1], query, mask, 12, 1, 0, 3),
        "two rows": [  # fewer than there are processes
            prompt_explained_variance(value_model, RANKINGS[:2], [0.5, -1.0], 0),
            kl_per_sequence(*models[:2], RANKINGS[:2], 0),
        ],
        "scores": score_all(reward_model, RANKINGS, 0, batch_size=3),
        "history": history,
        "weights": [whole(p.detach()) for m in [base, *models] for p in m.parameters()],
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Name -> what each process found."""
    import torch.distributed.fsdp  # noqa: F401  once, for all the children

    folder = tmp_path_factory.mktemp("small")
    torch.set_num_threads(1)
    found = {"1": [small_training(split=False)]}
    for name, count, split in (("2", 2, False), ("3", 3, False), ("fsdp", 2, True)):
        action = functools.partial(small_training, split)
        found[name] = results(count, action, folder / name)
    return found


@pytest.mark.parametrize("name, error", [("2", 1e-6), ("3", 1e-6), ("fsdp", 1e-5)])
def test_uneven_shares_give_the_updates_of_one_process(small, name, error):
    (expected,), close = small["1"], {"rtol": 0, "atol": error}
    for got in small[name]:
        assert all(map(torch.equal, got["tokens"], expected["tokens"]))
        assert got["many"] == expected["many"]
        assert torch.equal(got["answers"], expected["answers"])  # though they end one by one
        torch.testing.assert_close(got["advantages"], expected["advantages"], rtol=0, atol=2e-5)
        torch.testing.assert_close(got["half"], expected["half"], rtol=0, atol=2e-5)
        assert got["halving"] > 1e-4  # or it was not half precision
        assert got["two rows"] == pytest.approx(expected["two rows"], rel=1e-3)
        torch.testing.assert_close(got["weights"], expected["weights"], **close)
        torch.testing.assert_close(got["scores"], expected["scores"], rtol=0, atol=2e-5)
        torch.testing.assert_close(got["history"], expected["history"], rtol=1e-4, atol=2e-5)


def test_the_small_rows_end_at_different_times(small):
    lengths = [len(answer) for answer in small["1"][0]["many"]]
    assert min(lengths) < 4 and max(lengths) == 12  # or lockstep would not have been tried


@pytest.mark.parametrize("name", ["2", "3", "fsdp"])
def test_all_processes_know_the_same(small, name):
    first, *others = small[name]
    for other in others:
        assert other["history"] == first["history"]
        assert all(map(torch.equal, other["weights"], first["weights"]))
        assert torch.equal(other["advantages"], first["advantages"])


# the commands


def run_all(processes: int, out: Path, data: Path, commands=OPTIONS, *options) -> None:
    """The commands one after the other, each by so many processes."""
    for command in commands:
        more = [*OPTIONS[command], *options]
        action = functools.partial(tiny_runs.run, command, out, data, *SAVING, *more)
        codes = together(processes, action, out / "logs" / command)
        said = [path.read_text()[-2000:] for path in (out / "logs" / command).iterdir()]
        assert codes == [0] * processes, said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one and of two processes through all stages, in folders of that name."""
    folder = tmp_path_factory.mktemp("runs")
    data = tiny_runs.write_pairs(folder / "pairs.jsonl", 120)
    for command, options in OPTIONS.items():  # in this process, so that forks find all imported
        tiny_runs.run(command, folder / "1", data, *SAVING, *options)
    run_all(2, folder / "2", data)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "r" / "metrics.jsonl").open()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "r").glob("*/final/**/model.safetensors"))
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in files
        for name, tensor in load_file(path).items()
    }


def test_every_stage_makes_the_updates_of_one_process(runs):
    expected, got = weights_of(runs / "1"), weights_of(runs / "2")
    assert len({key.split("/")[1] for key in expected}) == len(OPTIONS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    for row, other in zip(rows_of(runs / "2"), rows_of(runs / "1"), strict=True):
        assert row.pop("stage") == other.pop("stage")
        assert row == pytest.approx(other, rel=1e-4, abs=2e-5)


def test_only_the_main_process_speaks(runs):
    for log in (runs / "2" / "logs").glob("*/1.log"):
        assert log.read_text() == ""
    assert "rows" in (runs / "2" / "logs" / "sft" / "0.log").read_text()


def beginning(run: Path, stages: list[str]) -> Path:
    """A copy of a run that has come through these stages only."""
    out = run.with_name("-".join([run.name, *stages]))
    shutil.copytree(run, out)
    settings = json.loads((out / "r" / "config.json").read_text())
    kept = {key: settings[key] for key in ["run", *stages]}
    (out / "r" / "config.json").write_text(json.dumps(kept))
    rows = [row for row in rows_of(out) if row["stage"] in stages]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "r" / "metrics.jsonl").write_text(lines)
    for stage in set(OPTIONS) - set(stages):
        shutil.rmtree(out / "r" / stage)
    return out


def launched(arguments: list[str]) -> None:
    """What `torchrun --standalone --nproc-per-node 2 -m minippo` does, with forks."""
    settings = {"nproc_per_node": 2, "start_method": "fork", "max_restarts": 0, "run_id": "dying"}
    nodes = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d"}
    config = LaunchConfig(**settings, **nodes, rdzv_endpoint="localhost:0")
    elastic_launch(config, dying)(arguments)


def dying(arguments: list[str]) -> None:
    """Rank 1 is killed after its third step."""
    step, sys.argv = Run.step, ["minippo", *arguments]

    def last(run, stage, number, metrics):
        step(run, stage, number, metrics)
        if number == 2 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.step = last
    runpy.run_module("minippo", run_name="__main__", alter_sys=True)


def test_a_killed_process_ends_the_run_which_resumes_to_the_same_bytes(runs):
    out = beginning(runs / "2", ["pretrain", "sft", "reward", "value"])
    where = ["--name", "r", "--out", out, "--data", runs / "pairs.jsonl", "--device", "cpu"]
    options = tiny_runs.merged(tiny_runs.COMMANDS["ppo"], [*SAVING, *OPTIONS["ppo"]])
    arguments, log = list(map(str, ["ppo", *where, *options])), out / "said"
    child = tiny_runs.forked(functools.partial(launched, arguments), log)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    said = log.read_text()
    assert said.count("minippo: interrupted; another process of this run ended") == 1, said
    assert (out / "r" / "ppo" / "latest").read_text() == "step-000002"
    run_all(2, out, runs / "pairs.jsonl", ["ppo"], "--resume")
    assert tiny_runs.contents(out / "r") == tiny_runs.contents(runs / "2" / "r")


def test_sharded_models_are_written_whole_and_one_process_goes_on_with_them(runs):
    out, data, step = beginning(runs / "1", ["pretrain", "sft"]), runs / "pairs.jsonl", Run.step
    run_all(2, out, data, ["reward", "value"], "--fsdp")

    def stopping(run, stage, number, metrics):
        run.stopping = number == 2 and rank() == 1  # Ctrl-C reached one of them only
        step(run, stage, number, metrics)

    def stopped():
        Run.step = stopping
        tiny_runs.run("ppo", out, data, *SAVING, *OPTIONS["ppo"], "--fsdp")

    assert together(2, stopped, out / "logs" / "stopped") == [130, 130]
    saved = out / "r" / "ppo" / "step-000003"
    assert Policy.from_pretrained(str(saved)).lm_head.weight.shape == (300, 16)
    final = runs / "1" / "r" / "ppo" / "final"
    assert (saved / "config.json").read_text() == (final / "config.json").read_text()
    names = [set(load_file(folder / "model.safetensors")) for folder in (saved, final)]
    assert names[0] == names[1]  # tied weights once
    run_all(1, out, data, ["ppo"], "--resume")
    torch.testing.assert_close(weights_of(out), weights_of(runs / "1"), rtol=0, atol=1e-5)
