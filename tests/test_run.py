"""Runs: interrupted at any moment they end as if nothing had happened, and never half-written."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import contents, forked, run, write_pairs

import minippo.sft
from minippo.app import run as run_module
from minippo.app.report import write_report
from minippo.app.run import Interrupted, Run
from minippo.config import RunConfig, SFTConfig
from minippo.engine import files
from minippo.models import Policy, RewardModel, ValueModel, load_tokenizer
from minippo.optim import NonFiniteError

pytestmark = pytest.mark.integration

SMALL_WARMUP = {"prompts": 40, "held-out": 8, "batch-size": 8}
STAGES = ("pretrain", "sft", "reward", "value", "ppo")
LOADERS = {"reward": RewardModel.from_pretrained, "value": ValueModel.from_pretrained}


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """An uninterrupted run, and its folder as it was before each stage."""
    root = tmp_path_factory.mktemp("story")
    data = write_pairs(root / "pairs.jsonl", 110)
    for stage in STAGES:
        if (root / "r").is_dir():
            shutil.copytree(root / "r", root / f"before-{stage}")
        run(stage, root, data)
    shutil.copytree(root / "r", root / "whole")
    return root


@pytest.fixture(autouse=True)
def ctrl_c():
    """A stopped training must not leave its signal handler to the next test."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def before(story, out: Path, stage: str) -> Path:
    """A copy of the run as it was before a stage; returns the folder."""
    if stage != STAGES[0]:
        shutil.copytree(story / f"before-{stage}", out / "r")
    return out / "r"


def as_after(story, stage: str) -> dict[str, bytes]:
    """What an uninterrupted run had written when the stage ended."""
    done = STAGES[: STAGES.index(stage) + 1]
    files = contents(story / "whole")
    lines = files.pop("metrics.jsonl").splitlines(keepends=True)
    metrics = b"".join(line for line in lines if json.loads(line)["stage"] in done)
    kept = {name: data for name, data in files.items() if name.split("/")[0] in done}
    return {"metrics.jsonl": metrics, **kept}


def kill_after(monkeypatch, step: int) -> None:
    """The process dies right after the hooks of this step."""
    original = Run.step

    def dying(self, stage, now, metrics):
        original(self, stage, now, metrics)
        if now == step:
            raise Killed

    monkeypatch.setattr(Run, "step", dying)


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.partial"))


# killed, then resumed


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_resumes_to_the_same_bytes(story, tmp_path, monkeypatch, stage, step):
    folder, data = before(story, tmp_path, stage), story / "pairs.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, step)
        run(stage, tmp_path, data)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "' + stage + '", "step": 99, "lo')  # torn by the kill
    leftover = folder / stage / ".step-000099.partial"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    run(stage, tmp_path, data, "--resume")
    assert contents(folder) == as_after(story, stage)


def test_a_process_killed_at_random_moments_resumes_to_the_same_bytes(story, tmp_path):
    folder, data = before(story, tmp_path, "value"), story / "pairs.jsonl"
    chance, kills = random.Random(0), 0
    for stage in ("value", "ppo"):
        options = []
        for _ in range(3):
            child = forked(lambda s=stage, o=options: run(s, tmp_path, data, *o), tmp_path / "log")
            rows = len(metrics_rows(folder))
            wait_for(lambda n=rows: len(metrics_rows(folder)) > n, child)
            time.sleep(chance.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            kills += os.waitpid(child, 0)[1] == signal.SIGKILL
            begun = stage in json.loads((folder / "config.json").read_text())
            options = ["--resume"] if begun else []
            if (folder / stage / "final").is_dir():
                break
        if not (folder / stage / "final").is_dir():
            run(stage, tmp_path, data, *options)
    assert kills >= 2
    assert contents(folder) == as_after(story, "ppo")


def metrics_rows(folder: Path) -> list[bytes]:
    path = folder / "metrics.jsonl"
    return path.read_bytes().splitlines() if path.is_file() else []


def wait_for(condition, child: int, seconds: float = 60) -> None:
    """Until the condition holds or the child has ended; it is not reaped here."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the child process did not get there"
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)


def test_ppo_resumes_its_adaptive_kl_coef_and_the_state_of_its_stop_rule(
    story, tmp_path, monkeypatch
):
    options = ["--target-kl", "0.5", "--kl-horizon", "20", "--stop-patience", "50"]
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "ppo")
    run("ppo", tmp_path, data, *options)
    whole = contents(folder)
    rows = [json.loads(line) for line in metrics_rows(folder)]
    coefs = [row["objective/kl_coef"] for row in rows if row["stage"] == "ppo"]
    assert len(set(coefs)) == len(coefs) == 5
    shutil.rmtree(folder)
    before(story, tmp_path, "ppo")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 3)
        run("ppo", tmp_path, data, *options)
    marks = json.loads((folder / "ppo" / "step-000004" / "state.json").read_text())
    assert marks["progress"]["best_score"] == max(
        row["objective/scores"] for row in rows if row["stage"] == "ppo" and row["step"] < 4
    )
    run("ppo", tmp_path, data, *options, "--resume")
    assert contents(folder) == whole


def test_a_stop_that_was_decided_before_a_kill_stands_after_it(story, tmp_path, monkeypatch):
    # A kill between the checkpoint of the last step and the end of the stage.
    options = ["--stop-patience", "1", "--save-every", "1", "--lr", "1e-9", "--value-lr", "1e-9"]
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "ppo")
    run("ppo", tmp_path, data, *options)
    whole, last = contents(folder), json.loads(metrics_rows(folder)[-1])["step"]
    assert last < 4, "the rule must stop this run early"
    shutil.rmtree(folder)
    before(story, tmp_path, "ppo")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, last)
        run("ppo", tmp_path, data, *options)
    run("ppo", tmp_path, data, *options, "--resume")
    assert contents(folder) == whole


def test_resuming_one_stage_leaves_the_metrics_of_the_others(story, tmp_path, monkeypatch):
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "sft")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run("sft", tmp_path, data)
    shutil.copytree(story / "whole" / "reward", folder / "reward")
    reward = [x for x in metrics_rows(story / "whole") if json.loads(x)["stage"] == "reward"]
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"".join(line + b"\n" for line in reward))
    run("sft", tmp_path, data, "--resume")
    kept = [line for line in metrics_rows(folder) if json.loads(line)["stage"] == "reward"]
    assert kept == reward


# Ctrl-C


def test_ctrl_c_saves_says_how_to_resume_and_exits_with_130(story, tmp_path):
    data, folder, log = story / "pairs.jsonl", before(story, tmp_path, "sft"), tmp_path / "log"
    options = ["--steps", "400", "--save-every", "1000"]
    child = forked(lambda: run("sft", tmp_path, data, *options), log)
    rows = len(metrics_rows(folder))
    wait_for(lambda: len(metrics_rows(folder)) > rows + 2, child)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    said = [line for line in log.read_text().splitlines() if line.startswith("minippo:")]
    assert len(said) == 1 and "--resume" in said[0] and "saved after step" in said[0]
    assert "Traceback" not in log.read_text()
    assert (folder / "sft" / "latest").read_text().startswith("step-")
    assert partials(folder) == []


def test_a_run_stopped_by_ctrl_c_ends_as_if_it_had_not_been(story, tmp_path, monkeypatch, capfd):
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "ppo")
    original = Run.step

    def pressed(self, stage, step, metrics):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        original(self, stage, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Run, "step", pressed)
        run("ppo", tmp_path, data, "--save-every", "50")
    assert end.value.code == 130
    assert "saved after step 2 of ppo" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run("ppo", tmp_path, data, "--save-every", "50", "--resume")
    assert contents(folder) == as_after(story, "ppo")


def _config(out: Path) -> RunConfig:
    return RunConfig(name="r", out=out)


def started(out: Path, stages=("sft",)) -> Run:
    """A run of one step in its first stage, right after that step, with a model of one weight."""
    opened = Run(_config(out), {name: SFTConfig() for name in stages})
    opened.start("sft", 1, {"policy": OneWeight()})
    opened.step("sft", 0, {"loss/lm": 1.0})
    return opened


class OneWeight(torch.nn.Module):
    """The smallest thing that a run can save."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "weight.json").write_text(json.dumps(self.weight.item()))


@pytest.mark.parametrize(
    ("stages", "said"),
    [(("sft", "reward"), "go on with --resume"), (("sft",), "nothing is left to do")],
)
def test_ctrl_c_after_the_last_step_of_a_stage_stops_when_the_stage_is_saved(
    tmp_path, stages, said
):
    opened = started(tmp_path, stages)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"sft is finished and saved; {said}"):
        opened.finish("sft")
    assert opened.finished("sft")


def test_ctrl_c_between_two_stages_of_a_demo_is_not_left_to_the_next_one(
    story, tmp_path, monkeypatch, capfd
):
    """ppo warms up its critic first: two stages in one command."""
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "value")
    original = Run.finish

    def pressed(self, stage):
        signal.raise_signal(signal.SIGINT)
        original(self, stage)

    small = [f"--value.{key}={value}" for key, value in SMALL_WARMUP.items()]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Run, "finish", pressed)
        run("ppo", tmp_path, data, *small)
    assert end.value.code == 130
    assert "value is finished and saved; go on with --resume" in capfd.readouterr().err
    assert not (folder / "ppo").exists()
    run("ppo", tmp_path, data, "--resume")
    assert (folder / "ppo" / "latest").read_text() == "final"


def test_the_handler_of_ctrl_c_that_was_there_before_is_there_again(tmp_path):
    def mine(signum, frame):
        pass

    signal.signal(signal.SIGINT, mine)
    opened = started(tmp_path)
    assert signal.getsignal(signal.SIGINT) is not mine
    opened.finish("sft")
    assert signal.getsignal(signal.SIGINT) is mine


def test_a_training_that_fails_gives_ctrl_c_back(story, tmp_path, monkeypatch):
    def mine(signum, frame):
        pass

    before(story, tmp_path, "sft")
    signal.signal(signal.SIGINT, mine)
    broken = lambda policy, *rest: policy.lm_head.weight.sum() * float("nan")  # noqa: E731
    monkeypatch.setattr(minippo.sft, "sft_loss", broken)
    with pytest.raises(SystemExit):
        run("sft", tmp_path, story / "pairs.jsonl")
    assert signal.getsignal(signal.SIGINT) is mine


# what may not be written


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("finished", [False, True])
def test_weights_that_are_no_numbers_are_never_saved(tmp_path, broken, finished):
    opened = started(tmp_path)
    kept = opened.save("sft", 1)
    with torch.no_grad():
        opened.state["policy"].weight.fill_(broken)
    with pytest.raises(NonFiniteError, match="sft: weights of the policy .*--overwrite"):
        opened.save("sft", 2, finished)
    assert opened.latest("sft") == kept and partials(tmp_path) == []
    assert [path.name for path in kept.parent.iterdir() if path.is_dir()] == ["step-000001"]


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_results_that_are_no_numbers_are_named_and_not_written(tmp_path, number):
    opened = Run(_config(tmp_path), {"sft": SFTConfig()})
    with pytest.raises(NonFiniteError, match=r"e.json was not written: table.1.reward is NaN or"):
        opened.write_json("e.json", {"table": [{"reward": 1.0}, {"reward": number}]})
    with pytest.raises(NonFiniteError, match="s.jsonl was not written: gold.PPO is NaN or"):
        opened.write_rows("s.jsonl", [{"gold": {"PPO": 1.0}}, {"gold": {"PPO": number}}])
    assert not (tmp_path / "r").exists()


def test_windows_is_not_asked_for_what_it_cannot_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    monkeypatch.setattr(files.sys, "platform", "win32")
    opened = []
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments))
    files.sync(tmp_path)
    files.sync(tmp_path / "file")
    assert opened == []


# a disk that is full or read-only


def full(*args, code: int = errno.ENOSPC, **kwargs):
    raise OSError(code, os.strerror(code))


def fail_from(patch, target, name: str, calls: int, code: int) -> None:
    """The function works `calls` times, then the disk is full, or is read-only all at once."""
    original, left = getattr(target, name), [calls]

    def limited(*args, **kwargs):
        left[0] -= 1
        return original(*args, **kwargs) if left[0] >= 0 else full(code=code)

    patch.setattr(target, name, limited)


def assert_last_checkpoint_is_good(folder: Path, stage: str) -> None:
    latest = folder / stage / (folder / stage / "latest").read_text().strip()
    state = json.loads((latest / "state.json").read_text())
    assert latest.name == f"step-{state['step']:06d}"
    LOADERS.get(stage, Policy.from_pretrained)(latest)
    assert partials(folder) == []


def the_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("minippo:")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    ("target", "name", "calls"),
    [
        (run_module, "save_file", 1),
        (os, "fsync", 20),
        (Path, "write_bytes", 3),  # the state of the second checkpoint
        (Path, "write_bytes", 4),  # the pointer to it
        (Path, "rename", 1),
    ],
)
def test_a_full_or_read_only_disk_keeps_the_last_checkpoint(
    story, tmp_path, monkeypatch, capfd, target, name, calls, code
):
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "sft")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        fail_from(patch, target, name, calls, code)
        run("sft", tmp_path, data)
    assert end.value.code == 2
    line = the_line(capfd.readouterr().err)
    assert "cannot write" in line and os.strerror(code) in line and "--out" in line
    assert_last_checkpoint_is_good(folder, "sft")
    run("sft", tmp_path, data, "--resume")
    assert contents(folder) == as_after(story, "sft")


@pytest.mark.parametrize("limit", [8_000, 25_000, 60_000])
def test_a_file_size_limit_ends_in_one_line_and_nothing_half_written(story, tmp_path, limit):
    data, folder, log = story / "pairs.jsonl", before(story, tmp_path, "sft"), tmp_path / "log"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run("sft", tmp_path, data)

    child = forked(limited, log)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    line = the_line(log.read_text())  # the pairs are spread on the disk before anything is trained
    assert ("the pairs do not fit" if limit == 8_000 else "cannot write") in line
    assert partials(folder) == []
    assert not (folder / "sft" / "latest").exists()
    run("sft", tmp_path, data, "--resume")
    assert contents(folder) == as_after(story, "sft")


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_said_too(story, tmp_path):
    """It is written by another library, whose error is of no class of its own."""
    log = tmp_path / "log"

    def limited():
        writer = Run(_config(tmp_path), {"sft": SFTConfig()})
        writer.tokenizer = load_tokenizer(story / "whole" / "sft" / "final")
        writer.state = {"policy": OneWeight()}
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
        try:
            writer.save("sft", 1, finished=True)
        except ValueError as error:
            print(error)

    child = forked(limited, log)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert log.read_text().startswith("cannot write") and "too large" in log.read_text()
    assert partials(tmp_path) == []


@pytest.mark.parametrize("text", ['{"run": {"name"', "", "[1, 2]", b"\xff\xfe{"])
@pytest.mark.parametrize("options", [[], ["--resume"], ["--overwrite"]])
def test_a_torn_config_is_named_with_the_remedy(story, tmp_path, capfd, text, options):
    folder = before(story, tmp_path, "sft")
    torn = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(torn)
    line = refused(capfd, "sft", tmp_path, story / "pairs.jsonl", *options)
    assert str(folder / "config.json") in line and "--name" in line
    assert (folder / "config.json").read_bytes() == torn and not (folder / "sft").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_said_in_one_line(story, tmp_path, capfd):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit) as end:
        run("pretrain", tmp_path, story / "pairs.jsonl")
    tmp_path.chmod(0o700)
    assert end.value.code == 2 and "cannot write" in the_line(capfd.readouterr().err)


def test_an_out_that_is_a_file_is_said_in_one_line(story, tmp_path, capfd):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit) as end:
        run("pretrain", tmp_path / "file", story / "pairs.jsonl")
    assert end.value.code == 2 and "cannot write" in the_line(capfd.readouterr().err)


# numbers that are none


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_ppo_and_keeps_the_checkpoint(
    story, tmp_path, monkeypatch, capfd, broken
):
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "ppo")
    original, original_step, done = RewardModel.forward, Run.step, []

    def forward(self, *args):
        scores = original(self, *args)
        return scores if len(done) < 3 else scores.index_fill(0, torch.tensor([0]), broken)

    def step(self, stage, now, metrics):
        original_step(self, stage, now, metrics)
        done.append(now)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(RewardModel, "forward", forward)
        patch.setattr(Run, "step", step)
        run("ppo", tmp_path, data)
    line = the_line(capfd.readouterr().err)
    assert end.value.code == 2
    assert "ppo, step 3" in line and "objective/scores" in line
    assert_last_checkpoint_is_good(folder, "ppo")
    assert (folder / "ppo" / "latest").read_text() == "step-000002"
    run("ppo", tmp_path, data, "--resume")
    assert contents(folder) == as_after(story, "ppo")


def test_a_loss_that_is_no_number_names_stage_step_and_key(story, tmp_path, monkeypatch, capfd):
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "sft")
    original, calls = minippo.sft.sft_loss, [0]

    def sft_loss(*args):
        calls[0] += 1
        return original(*args) * (float("nan") if calls[0] > 4 else 1.0)  # two micro-batches a step

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(minippo.sft, "sft_loss", sft_loss)
        run("sft", tmp_path, data)
    line = the_line(capfd.readouterr().err)
    assert end.value.code == 2 and "sft, step 2: loss/lm" in line
    assert_last_checkpoint_is_good(folder, "sft")


# folders and settings


def refused(capfd, *args, **kwargs) -> str:
    with pytest.raises(SystemExit) as end:
        run(*args, **kwargs)
    assert end.value.code == 2
    return the_line(capfd.readouterr().err)


def test_a_stage_that_is_there_is_not_written_over(story, tmp_path, capfd):
    data, folder = story / "pairs.jsonl", tmp_path / "r"
    shutil.copytree(story / "whole", folder)
    was = contents(folder)
    line = refused(capfd, "sft", tmp_path, data)
    assert "'sft'" in line and "--resume" in line and "--overwrite" in line and "--name" in line
    assert "finished" in refused(capfd, "sft", tmp_path, data, "--resume")
    assert contents(folder) == was


def test_resume_without_a_run_is_refused(story, tmp_path, capfd):
    line = refused(capfd, "sft", tmp_path, story / "pairs.jsonl", "--resume")
    assert "no run" in line and "leave out --resume" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--lr", "0.5", "lr"),
        ("--seed", "7", "seed"),
        ("--limit", "60", "limit"),
        ("--autocast", "bf16", "autocast"),
    ],
)
def test_resume_with_changed_settings_is_refused(
    story, tmp_path, monkeypatch, capfd, option, value, key
):
    data, folder = story / "pairs.jsonl", before(story, tmp_path, "sft")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run("sft", tmp_path, data)
    was = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = refused(capfd, "sft", tmp_path, data, option, value, "--resume")
    assert key in line and value in line and "--resume needs the settings" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == was


def test_resume_with_changed_warm_up_settings_is_refused(story, tmp_path, monkeypatch, capfd):
    data = story / "pairs.jsonl"
    before(story, tmp_path, "value")
    small = [f"--value.{key}={value}" for key, value in SMALL_WARMUP.items()]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run("ppo", tmp_path, data, *small)
    line = refused(capfd, "ppo", tmp_path, data, *small, "--value.lr", "0.1", "--resume")
    assert "lr of 'value'" in line


def test_a_stage_before_those_that_are_there_is_refused(story, tmp_path, capfd):
    """Else an SFT model would stand beside a PPO that did not start from it."""
    data, folder = story / "pairs.jsonl", tmp_path / "r"
    shutil.copytree(story / "whole", folder)
    known = json.loads((folder / "config.json").read_text())
    del known["sft"]
    (folder / "config.json").write_text(json.dumps(known))
    shutil.rmtree(folder / "sft")
    line = refused(capfd, "sft", tmp_path, data)
    assert "a stage 'reward' that does not build on this one" in line and "--overwrite" in line


def test_a_warm_up_resumes_on_the_same_reward_only(story, tmp_path, monkeypatch, capfd):
    data = story / "pairs.jsonl"
    before(story, tmp_path, "value")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run("value", tmp_path, data)
    line = refused(capfd, "value", tmp_path, data, "--ppo.missing-eos-penalty", "0.5", "--resume")
    assert "ppo.missing_eos_penalty of 'value' was 1.0, not 0.5" in line
    line = refused(capfd, "ppo", tmp_path, data)
    command = f"minippo value --name r --data {data} --out {tmp_path}"
    assert "stage 'value' that is not finished" in line and f"{command} --resume" in line


def test_a_critic_of_another_reward_is_refused(story, tmp_path, capfd):
    before(story, tmp_path, "ppo")
    line = refused(capfd, "ppo", tmp_path, story / "pairs.jsonl", "--temperature", "0.7")
    assert "warmed up with ppo.temperature 1.0, not 0.7" in line
    assert f"minippo value --name r --data {story / 'pairs.jsonl'} --out {tmp_path} --ov" in line


def test_the_report_names_the_seeds_of_all_stages(story, tmp_path):
    before(story, tmp_path, "ppo")
    run("ppo", tmp_path, story / "pairs.jsonl", "--seed", "3")
    page = write_report(tmp_path / "r").read_text(encoding="utf-8")
    assert "pretrain 0, sft 0, reward 0, value 0, ppo 3" in page


def test_overwrite_replaces_a_stage_and_those_after_it_only(story, tmp_path):
    data, folder = story / "pairs.jsonl", tmp_path / "r"
    shutil.copytree(story / "whole", folder)
    run("reward", tmp_path, data, "--overwrite")
    assert contents(folder) == as_after(story, "reward")
    known = json.loads((folder / "config.json").read_text())
    assert set(known) == {"run", "pretrain", "sft", "reward"}


def test_overwriting_with_bad_input_leaves_the_old_run(story, tmp_path, capfd):
    data, folder = story / "pairs.jsonl", tmp_path / "r"
    shutil.copytree(story / "whole", folder)
    was = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused(capfd, "sft", tmp_path, data, "--max-prompt-tokens", "5000", "--overwrite")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == was


def test_times_are_not_in_the_metrics(story):
    rows = [json.loads(line) for line in metrics_rows(story / "whole")]
    assert not [key for row in rows for key in row if "second" in key or "time" in key]
    assert (story / "whole" / "times.jsonl").is_file()


def test_only_the_last_checkpoint_of_a_stage_is_kept(story):
    for stage in STAGES:
        assert [p.name for p in (story / "whole" / stage).glob("*") if p.is_dir()] == ["final"]
    assert partials(story / "whole") == []
