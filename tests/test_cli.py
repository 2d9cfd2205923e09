"""The command line: every mistake is one line and exit code 2, before anything is trained."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import run, save_base, write_pairs

from minippo import config, models
from minippo.app import chat, cli, doctor
from minippo.engine import loading
from minippo.models import Policy, RewardModel, ValueModel

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "demo": ["SFTConfig", "RewardConfig", "ValueConfig", "PPOConfig", "EvalConfig", "RunConfig"],
    "pretrain": ["PretrainConfig", "RunConfig"],
    "sft": ["SFTConfig", "RunConfig"],
    "reward": ["RewardConfig", "RunConfig"],
    "value": ["ValueConfig", "PPOConfig", "RunConfig"],
    "ppo": ["PPOConfig", "ValueConfig", "RunConfig"],
    "evaluate": ["EvalConfig", "RunConfig"],
    "report": [],
    "chat": [],
    "data": [],
    "grade": [],
    "doctor": [],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random base model of 512 positions."""
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of 60 good rows."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trained, pairs):
    """The same with reward, value and ppo."""
    out = tmp_path_factory.mktemp("finished")
    shutil.copytree(trained, out, dirs_exist_ok=True)
    for command in ("reward", "value", "ppo"):
        run(command, out, pairs)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pairs):
    """A run folder with pretrain and sft."""
    out = tmp_path_factory.mktemp("trained")
    run("pretrain", out, pairs)
    run("sft", out, pairs)
    return out


def refused(capfd, arguments, untouched: Path | None = None) -> str:
    """The one line of a command that ends with exit code 2; `untouched` has not come into being."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("minippo:")]
    assert end.value.code == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert "step/s" not in said, "a training had begun"
    assert untouched is None or not untouched.exists(), list(untouched.rglob("*"))
    return lines[0]


def sft_on(data, tmp_path, base, *options) -> list:
    """`minippo sft` on a file into an empty folder."""
    return ["sft", "--data", data, "--out", tmp_path / "out", "--base", base, *options]


# help


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert all(re.search(rf"\b{command}\b", said) for command in cli.COMMANDS)
    assert set(cli.COMMANDS) == set(CONFIGS)


@pytest.mark.parametrize("command", CONFIGS)
def test_the_help_of_a_command_mentions_every_field_of_its_configs(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for name in CONFIGS[command]:
        for field in dataclasses.fields(getattr(config, name)):
            assert re.search(rf"[-.]{field.name.replace('_', '-')}\b", said), field.name


# bad settings


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--ppo.kl-coef", "-1"], "PPOConfig.kl_coef is -1.0"),
        (["demo", "--ppo.batch-size", "10"], "PPOConfig.minibatch_size"),
        (["ppo", "--kl-coef", "-1"], "PPOConfig.kl_coef is -1.0"),
        (["ppo", "--minibatch-size", "7"], "multiple"),
        (["ppo", "--kl-loss-coef", "-0.5"], "kl_loss_coef"),
        (["ppo", "--vf-coef", "-1"], "vf_coef"),
        (["ppo", "--gamma", "1.5"], "gamma"),
        (["ppo", "--value.lr", "0"], "ValueConfig.lr"),
        (["ppo", "--kl-loss-estimator", "kl"], "kl-loss-estimator"),
        (["sft", "--micro-batch-size", "7"], "SFTConfig.batch_size"),
        (["sft", "--steps", "0"], "SFTConfig.steps"),
        (["sft", "--steps", "many"], "--steps"),
        (["sft", "--stepz", "5"], "--stepz"),
        (["reward", "--candidates", "1"], "at least 2"),
        (["pretrain", "--n-head", "7"], "n_head"),
        (["evaluate", "--temperature", "0"], "temperature"),
        (["value", "--held-out", "0"], "held_out"),
        (["sft", "--seed", "-1"], "seed"),
        (["sft", "--limit", "0"], "limit"),
        (["sft", "--name", ""], "name"),
        (["sft", "--name", "../x"], "RunConfig.name is '../x'"),
        (["sft", "--name", ".."], "RunConfig.name is '..'"),
        (["ppo", "--step", "3"], "--step, 3; did you mean --steps?"),
        (["evaluate", "--prompts-of", "valid"], "minippo: invalid choice 'valid'"),
        (["train"], "train"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(arguments, named, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capfd, arguments, tmp_path / "runs")
    assert named in line and "tyro" not in line and "\u2502" not in line
    assert len(line) < 400, line


def test_an_unknown_device_is_refused(capfd, tmp_path, base, pairs):
    line = refused(capfd, sft_on(pairs, tmp_path, base, "--device", "tpu9"), tmp_path / "out")
    assert "tpu9" in line and "cpu" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device_is_refused(capfd, tmp_path, base, pairs):
    line = refused(capfd, sft_on(pairs, tmp_path, base, "--device", "cuda"), tmp_path / "out")
    assert "--device cpu" in line


# bad data


def good_row() -> dict:
    sides = {"chosen": "Hello.", "rejected": "Go away."}
    return {side: f"\n\nHuman: Hi\n\nAssistant: {text}" for side, text in sides.items()}


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (["this is no JSON"], "not_json"),
        ([{"chosen": good_row()["chosen"]}], "missing_key"),
        ([{"prompt": "hi", "answer": "ho"}], "missing_key"),
        ([{**good_row(), "chosen": 5}], "not_text"),
        ([{**good_row(), "rejected": None}], "not_text"),
        ([{**good_row(), "chosen": "Hello."}], "leading_text"),
        ([{**good_row(), "rejected": good_row()["chosen"]}], "identical_answers"),
    ],
)
def test_a_file_without_a_usable_row_is_refused_with_the_kind(rows, kind, capfd, tmp_path, base):
    data = tmp_path / "bad.jsonl"
    data.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    line = refused(capfd, sft_on(data, tmp_path, base), tmp_path / "out")
    assert "bad.jsonl" in line and kind in line and "no usable preference pair" in line


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.json", "no/such/folder", "rows.csv"])
def test_data_that_is_not_there_is_refused(name, capfd, tmp_path, base):
    line = refused(capfd, sft_on(tmp_path / name, tmp_path, base), tmp_path / "out")
    assert name in line and "not there" in line and "tiny_hh" in line


def test_an_empty_file_is_refused(capfd, tmp_path, base):
    (tmp_path / "empty.jsonl").write_text("")
    line = refused(capfd, sft_on(tmp_path / "empty.jsonl", tmp_path, base), tmp_path / "out")
    assert "no usable preference pair" in line and "empty.jsonl" in line


# models and limits


def test_limits_beyond_the_context_are_refused(capfd, tmp_path, base, pairs):
    options = ["--max-prompt-tokens", "500", "--max-response-tokens", "24"]
    line = refused(capfd, sft_on(pairs, tmp_path, base, *options), tmp_path / "out")
    assert "524" in line and "512" in line and "lower" in line


def test_limits_that_leave_nothing_are_refused(capfd, tmp_path, base, pairs):
    options = ["--max-prompt-tokens", "2"]
    line = refused(capfd, sft_on(pairs, tmp_path, base, *options), tmp_path / "out")
    assert "max_prompt_tokens=2" in line and "raise the limits" in line


def test_evaluation_limits_beyond_the_context_are_refused(capfd, tmp_path, trained, pairs):
    for stage in ("ppo", "reward", "value"):  # the kind of model does not matter here
        target = tmp_path / "out" / "e" / stage / "final"
        source = Policy.from_pretrained(trained / "r" / "sft" / "final")
        kinds = {"ppo": None, "reward": RewardModel, "value": ValueModel}
        made = kinds[stage].from_policy(source) if kinds[stage] else source
        getattr(made, "save", getattr(made, "save_pretrained", None))(target)
        models.load_tokenizer(trained / "r" / "sft" / "final").save_pretrained(target)
        (target.parent / "latest").write_text("final")
    shutil.copytree(trained / "r" / "sft", tmp_path / "out" / "e" / "sft")
    line = refused(capfd, [
        "evaluate", "--data", pairs, "--out", tmp_path / "out", "--name", "e", "--prompts", "4",
        "--best-of", "2", "--max-prompt-tokens", "190", "--max-response-tokens", "48",
    ])  # fmt: skip
    assert "238" in line and "200" in line
    assert not (tmp_path / "out" / "e" / "config.json").exists()


def test_a_base_that_is_not_there_is_refused(capfd, tmp_path, pairs):
    line = refused(capfd, sft_on(pairs, tmp_path, tmp_path / "nothing"), tmp_path / "out")
    assert "no checkpoint at" in line and "nothing" in line and "folder" in line


def test_a_checkpoint_of_another_vocabulary_is_refused(capfd, tmp_path, trained, pairs):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    other = save_base(tmp_path / "other", seed=5)
    target = out / "r" / "reward" / "final"
    RewardModel.from_policy(Policy.from_pretrained(other)).save_pretrained(target)
    models.load_tokenizer(other).save_pretrained(target)
    (target.parent / "latest").write_text("final")
    was = sorted(out.rglob("*"))
    line = refused(capfd, [
        "value", "--data", pairs, "--out", out, "--name", "r", "--prompts", "30", "--held-out", "8",
    ])  # fmt: skip
    assert "another vocabulary" in line and "reward" in line and "one base" in line
    assert sorted(out.rglob("*")) == was


@pytest.mark.parametrize("command", ["reward", "value", "ppo", "evaluate"])
def test_a_stage_whose_forerunner_is_missing_names_it(command, capfd, tmp_path, pairs):
    options = ["--source", "pairs"] if command == "reward" else []
    arguments = [command, "--data", pairs, "--out", tmp_path / "out", "--name", "x", *options]
    line = refused(capfd, arguments, tmp_path / "out")
    assert "minippo sft --name x" in line


def test_limits_beyond_the_context_are_refused_before_the_critic_is_trained(
    capfd, tmp_path, finished, pairs
):
    out = tmp_path / "out"
    for stage in ("sft", "reward"):
        shutil.copytree(finished / "r" / stage, out / "r" / stage)
    was = sorted(out.rglob("*"))
    where = ["--data", pairs, "--out", out, "--name", "r"]
    for command, prefix in (("ppo", ""), ("value", "ppo.")):
        line = refused(capfd, [command, *where, f"--{prefix}max-response-tokens", "190"])
        assert "318" in line and "200" in line and "lower" in line
        assert sorted(out.rglob("*")) == was


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "eval"])
def test_a_demo_refuses_the_limits_of_any_stage_before_the_first(stage, capfd, tmp_path, base):
    fits = []
    for other in {"sft", "reward", "ppo", "eval"} - {stage}:
        fits += [f"--{other}.max-prompt-tokens", "400"]
    options = [*fits, f"--{stage}.max-prompt-tokens", "600"]
    line = refused(capfd, [
        "demo", "--out", tmp_path / "out", "--base", base, *options,
    ], tmp_path / "out")  # fmt: skip
    assert "648" in line and "512" in line


def test_settings_of_a_warm_up_that_is_over_are_refused(capfd, tmp_path, finished, pairs):
    shutil.copytree(finished, tmp_path / "out")
    where = ["--data", pairs, "--out", tmp_path / "out", "--name", "r", "--overwrite"]
    line = refused(capfd, ["ppo", *where, "--max-prompt-tokens", "100", "--value.epochs", "9"])
    command = f"minippo value --name r --data {pairs} --out {tmp_path / 'out'} --overwrite"
    assert "warmed up already" in line and command in line  # without a name it would mean `demo`


def test_an_unfinished_earlier_stage_is_named_with_the_way_to_finish_it(
    capfd, tmp_path, trained, pairs
):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    for stage, command in (("sft", "reward"), ("pretrain", "sft")):
        (out / "r" / stage / "latest").unlink()
        arguments = [command, "--data", pairs, "--out", out, "--name", "r"]
        line = refused(capfd, [*arguments, *(["--overwrite"] if command == "sft" else [])])
        assert f"stage '{stage}'" in line and "not finished" in line
        assert f"minippo {stage} --name r --data {pairs} --out {out} --resume" in line


def test_a_base_beside_the_runs_own_is_refused(capfd, tmp_path, trained, base, pairs):
    shutil.copytree(trained, tmp_path / "out")
    where = ["--data", pairs, "--out", tmp_path / "out", "--name", "r", "--overwrite"]
    line = refused(capfd, ["sft", *where, "--base", base])
    assert "pretrained base of its own" in line and "leave out --base" in line


def test_options_of_files_are_refused_for_tinyhh(capfd, tmp_path):
    for option in (["--limit", "5"], ["--split", "train"]):
        line = refused(capfd, ["sft", "--out", tmp_path / "out", *option], tmp_path / "out")
        assert "--limit and --split belong to --data FILE" in line


def test_a_margin_for_ranked_candidates_is_refused(capfd, tmp_path):
    line = refused(capfd, ["reward", "--out", tmp_path / "out", "--margin"], tmp_path / "out")
    assert "--margin needs given pairs; add --source pairs" in line


def test_a_margin_that_the_pairs_do_not_have_is_refused(capfd, tmp_path, trained, pairs):
    shutil.copytree(trained, tmp_path / "out")
    where = ["--data", pairs, "--out", tmp_path / "out", "--name", "r"]
    line = refused(capfd, ["reward", *where, "--margin", "--max-prompt-tokens", "100"])
    assert "--margin needs pairs that all have a margin" in line


def test_ranking_candidates_of_a_file_is_refused(capfd, tmp_path, trained, pairs):
    shutil.copytree(trained, tmp_path / "out")
    where = ["--data", pairs, "--out", tmp_path / "out", "--name", "r"]
    line = refused(capfd, ["reward", *where, "--source", "candidates"])
    if "--source pairs" not in line:  # then the default chose the pairs by itself
        pytest.fail(line)
    assert "reward" not in json.loads((tmp_path / "out" / "r" / "config.json").read_text())


def test_report_without_a_run_is_refused(capfd, tmp_path):
    line = refused(capfd, ["report", "--out", tmp_path])
    assert "no run folder" in line and "minippo demo" in line


def test_the_command_says_one_line_and_nothing_else_on_stderr(tmp_path, base, pairs):
    """In a process of its own: no bar of another library, no warning beside the line."""
    options = ["--max-prompt-tokens", "2"]
    arguments = [str(a) for a in sft_on(pairs, tmp_path, base, *options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "minippo.app.cli", *arguments],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("minippo: "), done.stderr


# report, doctor, chat


def test_report_writes_the_page_of_a_run(trained, capsys):
    page = trained / "r" / "report.html"
    page.unlink(missing_ok=True)
    cli.main(["report", "--out", str(trained), "--name", "r"])
    assert str(page) in capsys.readouterr().out
    assert "<html" in page.read_text(encoding="utf-8")


def shipped(folder: Path, base: Path) -> Path:
    """A data folder with the five checkpoints."""
    policy, tokenizer = Policy.from_pretrained(base), models.load_tokenizer(base)
    reward = RewardModel.from_policy(policy)
    made = {"base": policy, "sft": policy, "ppo": policy, "reward": reward}
    for name, model in {**made, "value": ValueModel.from_reward_model(reward)}.items():
        target = folder / "checkpoints" / name
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return folder


@pytest.fixture
def data_dir(tmp_path, base, monkeypatch):
    """A data folder with random checkpoints in the place of the shipped ones."""
    folder = shipped(tmp_path / "data", base)
    for module in (loading, doctor):
        monkeypatch.setattr(module, "DATA_DIR", folder)
    return folder


def test_doctor_is_content_with_five_checkpoints(data_dir, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert len(re.findall(r"^\s+(?:base|sft|reward|value|ppo)\s+loads", said, re.M)) == 5
    assert "torch" in said and "device:" in said


def test_doctor_names_what_was_not_tested_and_on_which_side(data_dir, monkeypatch, capsys):
    found = {"torch": "2.5.1", "transformers": "5.999.0", "numpy": "2.0.0", "datasets": "4.1"}
    monkeypatch.setattr(doctor, "version", lambda package: found.get(package, "0.22.1+local"))
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(version_info=(3, 99, 1, "final", 0)))
    with pytest.raises(SystemExit):
        cli.main(["doctor"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    oldest, newest = doctor.TESTED["torch"][0], doctor.TESTED["transformers"][1]
    assert lines["torch"].endswith(f"2.5.1  (older than {oldest}, the oldest that was tested)")
    assert lines["transformers"].endswith(f"  (newer than {newest}, the newest that was tested)")
    assert lines["minippo"].endswith("  (newer than 3.13, the newest that was tested)")
    assert not [name for name in ("numpy", "datasets", "tokenizers") if "(" in lines[name]]


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_doctor_names_a_checkpoint_that_does_not_load(data_dir, damage, capsys):
    folder = data_dir / "checkpoints" / "reward"
    if damage == "missing":
        shutil.rmtree(folder)
    else:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 1
    assert [line.split()[0] for line in lines if "does not load" in line] == ["reward"]
    assert sum(" loads: " in line for line in lines) == 4


def test_chat_reads_a_pipe(data_dir, monkeypatch, capsys, tmp_path):
    pipe = tmp_path / "typed"
    pipe.write_text("How do I bake bread?\n\nnot read\n")
    with pipe.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        cli.main(["chat", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("  SFT: ") == said.count("  PPO: ") == 1


def test_chat_refuses_a_temperature_of_zero(capfd):
    assert "--temperature" in refused(capfd, ["chat", "--temperature", "0"])


def test_ctrl_c_outside_a_training_exits_with_130_and_says_what_to_do(monkeypatch, capfd):
    def pressed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "talk", pressed)
    with pytest.raises(SystemExit) as end:
        cli.main(["chat"])
    assert end.value.code == 130
    assert "minippo: interrupted; what is finished is saved; run it again" in capfd.readouterr().err
