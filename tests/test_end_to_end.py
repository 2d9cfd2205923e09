"""The whole of RLHF in small: the demo on TinyHH, and the commands one by one on a file."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import contents, run, save_base, write_pairs

from minippo.app import cli, sources
from minippo.app.run import Run
from minippo.batching import encode_prompt, encode_response
from minippo.hh import load_preferences
from minippo.models import Policy, RewardModel, load_tokenizer
from minippo.worlds.tinyhh.rows import prompt_rows

pytestmark = pytest.mark.integration

LONG = ["max-prompt-tokens 400", "max-response-tokens 16"]
DEMO = {
    "sft": ["steps 4", "batch-size 8", "micro-batch-size 8", "save-every 2", *LONG],
    "reward": ["prompts 16", "held-out 8", "candidates 3", "batch-size 8", "micro-batch-size 8",
               *LONG],
    "value": ["prompts 16", "held-out 8", "candidates 2", "batch-size 8"],
    "ppo": ["steps 3", "batch-size 8", "minibatch-size 8", "micro-batch-size 8", *LONG],
    "eval": ["prompts 12", "best-of 2", "samples 3", *LONG],
}  # fmt: skip
OPTIONS = [
    part
    for stage, settings in DEMO.items()
    for setting in settings
    for part in (f"--{stage}.{setting.split()[0]}", setting.split()[1])
]


def demo(out: Path, base: Path, seed: int, *options: str) -> Path:
    """A demo with tiny settings; returns its folder."""
    torch.set_num_threads(1)
    where = ["--out", str(out), "--name", f"seed{seed}", "--base", str(base), "--seed", str(seed)]
    cli.main(["demo", *where, *OPTIONS, *options])
    return out / f"seed{seed}"


@pytest.fixture(scope="module")
def small_world():
    """Fewer rows of TinyHH than a real run reads."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sources, "SFT_ROWS", 64)
    prompts = sources.Source.prompts
    patch.setattr(sources.Source, "prompts", lambda s, split, n: prompts(s, split, min(n, 48)))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def demos(tmp_path_factory, small_world):
    """Two demos of seed 3 and one of seed 4, and the base they start from."""
    root = tmp_path_factory.mktemp("demos")
    base = save_base(root / "base")
    folders = [demo(root / place, base, seed) for place, seed in (("a", 3), ("b", 3), ("a", 4))]
    return base, folders


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# the demo


def test_two_demos_of_one_seed_write_the_same_bytes(demos):
    _, (one, again, other) = demos
    assert contents(one) == contents(again)
    for name in ("candidates.jsonl", "samples.jsonl", "evaluation.json", "xray.json"):
        assert (one / name).read_bytes() == (again / name).read_bytes(), name
    assert (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()


def test_a_demo_goes_through_every_stage_in_order(demos):
    rows = rows_of(demos[1][0] / "metrics.jsonl")
    order = list(dict.fromkeys(row["stage"] for row in rows))
    assert order == ["sft", "reward", "value", "ppo"]
    for stage in order:
        steps = [row["step"] for row in rows if row["stage"] == stage]
        assert steps == list(range(len(steps))) and steps
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def test_the_candidates_of_a_demo_are_ranked_and_as_many_as_asked_for(demos):
    rows = rows_of(demos[1][0] / "candidates.jsonl")
    assert len(rows) == 16 + 8
    assert all(len(row["candidates"]) == len(row["scores"]) == 3 for row in rows)


def test_the_table_of_a_demo_agrees_with_its_samples(demos):
    folder = demos[1][0]
    table = {r["model"]: r for r in json.loads((folder / "evaluation.json").read_text())["table"]}
    samples = rows_of(folder / "samples.jsonl")
    assert list(table) == ["SFT", "PPO", "best-of-2"] and len(samples) == 12
    for name, row in table.items():
        gold = [sample["gold"][name] for sample in samples]
        assert row["gold"] == pytest.approx(sum(gold) / 12)
        rewards = [sample["reward"][name] for sample in samples]
        assert row["reward"] == pytest.approx(sum(rewards) / 12, abs=1e-4)
    pairs = [(sample["gold"]["PPO"], sample["gold"]["SFT"]) for sample in samples]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / 12
    assert table["PPO"]["win_rate"][0] == pytest.approx(wins)
    assert table["SFT"]["kl_per_sequence"] == 0 and table["SFT"]["win_rate"] is None


def test_an_evaluation_on_validation_prompts_answers_these_and_says_so(demos, tmp_path):
    shutil.copytree(demos[1][0], tmp_path / "r")
    where = ["--name", "r", "--out", str(tmp_path), "--device", "cpu", "--overwrite"]
    limits = ["--prompts", "8", "--best-of", "2", "--max-prompt-tokens", "400"]
    limits += ["--max-response-tokens", "16"]
    cli.main(["evaluate", *where, *limits, "--prompts-of", "validation"])
    asked = [(row["instruction"], row["history"]) for row in rows_of(tmp_path / "r/samples.jsonl")]
    assert asked == [(r["instruction"], r["history"]) for r in prompt_rows("validation", 8)]
    evaluation = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert evaluation["notes"][0].startswith("8 validation prompts")


def test_a_demo_leaves_a_report_and_the_per_token_view(demos):
    folder = demos[1][0]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<html" in page and "data:image/png;base64" in page
    assert len(json.loads((folder / "xray.json").read_text())) == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["minutes"] > 0 and summary["gflops"] > 0 and summary["resumed"] is False
    assert not list(folder.rglob(".*.partial"))


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("stage", ["reward", "value", "ppo"])
def test_a_demo_killed_in_any_stage_resumes_to_the_same_bytes(
    demos, small_world, tmp_path, monkeypatch, stage
):
    base, (whole, *_) = demos
    original = Run.step

    def dying(self, now, step, metrics):
        original(self, now, step, metrics)
        if (now, step) == (stage, 1):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "step", dying)
        demo(tmp_path, base, 3)
    folder = demo(tmp_path, base, 3, "--resume")
    assert contents(folder) == contents(whole)
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


# the commands, on a file of pairs


@pytest.fixture(scope="module")
def filed(tmp_path_factory):
    """pretrain, sft, reward, ppo and evaluate on one file under one name."""
    root = tmp_path_factory.mktemp("filed")
    data = write_pairs(root / "pairs.jsonl", 110)
    for command in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        warmup = ["--value.prompts", "40", "--value.held-out", "8", "--value.batch-size", "8"]
        run(command, root, data, *(warmup if command == "ppo" else ()))
    return root / "r", data


def test_the_commands_one_by_one_end_with_a_table(filed):
    folder, _ = filed
    table = json.loads((folder / "evaluation.json").read_text())["table"]
    assert [row["model"] for row in table] == ["SFT", "PPO", "best-of-2"]
    assert "gold" not in table[0]  # there is no annotator for a file
    known = json.loads((folder / "config.json").read_text())
    assert set(known) == {"run", "pretrain", "sft", "reward", "value", "ppo", "eval"}


def test_the_reward_models_accuracy_is_that_of_the_held_out_pairs(filed):
    folder, data = filed
    held_out = load_preferences(data)[0].to_list()[-11:]  # the last tenth
    tokenizer = load_tokenizer(folder / "reward" / "final")
    model = RewardModel.from_pretrained(folder / "reward" / "final")
    right = 0
    for row in held_out:
        scores = []
        for side in ("chosen", "rejected"):
            prompt = encode_prompt(tokenizer, row["instruction"], row["history"])
            tokens = torch.tensor([prompt + encode_response(tokenizer, row[side])])
            scores.append(float(model(tokens, torch.ones_like(tokens, dtype=torch.bool)).detach()))
        right += scores[0] > scores[1]
    found = json.loads((folder / "reward.json").read_text())
    assert found["held_out_pairs"] == 11
    assert found["accuracy"] == pytest.approx(right / 11)
    assert found["low"] <= found["accuracy"] <= found["high"]


def test_the_critics_targets_are_the_rewards_that_ppo_will_give(filed, tmp_path, monkeypatch):
    """Scale, penalty for not ending and length limit are PPO's; recomputed answer by answer."""
    from minippo.app import stages

    folder, data = filed
    shutil.copytree(folder, tmp_path / "r")
    caught = {}
    train = stages.train_value_model

    def caught_train(model, rows, targets, *rest, **options):
        caught["targets"] = targets
        return train(model, rows, targets, *rest, **options)

    sample = stages.sample_candidates

    def caught_sample(*arguments):
        caught["answers"], caught["temperature"] = sample(*arguments), arguments[-1]
        return caught["answers"]

    monkeypatch.setattr(stages, "train_value_model", caught_train)
    monkeypatch.setattr(stages, "sample_candidates", caught_sample)
    settings = ["--ppo.max-response-tokens", "7", "--ppo.max-prompt-tokens", "100"]
    settings += ["--ppo.missing-eos-penalty", "0.75", "--ppo.temperature", "0.8"]
    run("value", tmp_path, data, "--overwrite", *settings)
    place = tmp_path / "r" / "reward" / "final"
    model, tokenizer = RewardModel.from_pretrained(place), load_tokenizer(place)
    assert caught["temperature"] == 0.8
    lengths = [len(r) for e in caught["answers"] for r in e.responses]
    assert max(lengths) == 7
    for encoded, target in zip(caught["answers"], caught["targets"]):
        rewards = []
        for response in encoded.responses:
            tokens = torch.tensor([encoded.prompt + response])
            score = float(model(tokens, torch.ones_like(tokens, dtype=torch.bool)).detach())
            endless = response[-1] != tokenizer.eos_token_id
            rewards.append((score - model.mean) / model.std - 0.75 * endless)
        assert target == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_random_model_of_another_family_goes_through_all_stages(family, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(save_base(tmp_path / "gpt2"))
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0,
        bos_token_id=1,
    )  # fmt: skip
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)),
    }[family]()
    made.save_pretrained(tmp_path / family)
    tokenizer.save_pretrained(tmp_path / family)
    data = write_pairs(tmp_path / "pairs.jsonl", 60)
    run("sft", tmp_path, data, "--base", tmp_path / family)
    for command in ("reward", "ppo", "evaluate"):
        warmup = ["--value.prompts", "20", "--value.held-out", "4", "--value.batch-size", "8"]
        run(command, tmp_path, data, *(warmup if command == "ppo" else ()))
    trained = Policy.from_pretrained(tmp_path / "r" / "ppo" / "final")
    assert type(trained) is type(made)
    before = Policy.from_pretrained(tmp_path / "r" / "sft" / "final").state_dict()
    assert any((before[name] != value).any() for name, value in trained.state_dict().items())


def padded_rows(tokenizer):
    """Two texts of other lengths, padded on the right."""
    texts = ["\n\nHuman: How do I make tea?\n\nAssistant: Boil it.", "\n\nHuman: Hi\n\nAssistant:"]
    rows = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_a_runs_policies_load_in_transformers_with_the_same_outputs(filed, stage):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = filed[0] / stage / "final"
    theirs, ours = AutoModelForCausalLM.from_pretrained(place).eval(), Policy.from_pretrained(place)
    ids, mask = padded_rows(AutoTokenizer.from_pretrained(place))
    with torch.no_grad():
        a = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask]
        b = ours(input_ids=ids, attention_mask=mask.long()).logits[mask]
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert a.shape[-1] == len(load_tokenizer(place))


def test_a_runs_reward_model_loads_in_transformers_with_the_same_scores(filed):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = filed[0] / "reward" / "final"
    theirs = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1).eval()
    ids, mask = padded_rows(AutoTokenizer.from_pretrained(place))
    with torch.no_grad():
        a = theirs(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
        b = RewardModel.from_pretrained(place)(ids, mask)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert float((b[0] - b[1]).abs()) > 0
    stats = json.loads((place / "reward_stats.json").read_text())
    assert stats["std"] > 0 and math.isfinite(stats["mean"])


def test_evaluating_again_needs_overwrite_and_keeps_the_models(filed, tmp_path, capfd):
    folder, data = filed
    shutil.copytree(folder, tmp_path / "r")
    with pytest.raises(SystemExit) as end:
        run("evaluate", tmp_path, data)
    assert end.value.code == 2 and "--overwrite" in capfd.readouterr().err
    run("evaluate", tmp_path, data, "--overwrite")
    assert contents(tmp_path / "r") == contents(folder)
    evaluations = [(f / "evaluation.json").read_bytes() for f in (folder, tmp_path / "r")]
    assert evaluations[0] == evaluations[1]


def test_a_shipped_ppo_is_not_graded_as_that_of_a_run_without_one(filed, tmp_path, capfd):
    folder, data = filed
    shutil.copytree(folder / "sft", tmp_path / "r" / "sft")
    with pytest.raises(SystemExit) as end:
        run("evaluate", tmp_path, data)
    said = capfd.readouterr().err
    assert end.value.code == 2 and "no finished PPO" in said and "minippo ppo --name r" in said


def test_a_file_of_few_rows_can_be_evaluated(filed, tmp_path):
    """Fewer than twenty rows leave one for the test."""
    folder, _ = filed
    shutil.copytree(folder, tmp_path / "r")
    few = write_pairs(tmp_path / "few.jsonl", 12)
    run("evaluate", tmp_path, few, "--overwrite")
    assert len(rows_of(tmp_path / "r" / "samples.jsonl")) == 1


def test_the_limits_of_the_evaluation_hold_for_the_per_token_view(tmp_path):
    """A model of few positions: prompt and answer must fit wherever answers are sampled."""
    limits = ["--max-prompt-tokens", "28", "--max-response-tokens", "10"]
    warmup = ["--value.prompts", "20", "--value.held-out", "4", "--value.batch-size", "8"]
    extra = {"pretrain": ["--n-positions", "40"], "sft": limits, "reward": limits}
    extra |= {"ppo": [*limits, *warmup], "evaluate": limits}
    short = write_short_pairs(tmp_path / "short.jsonl")
    for command in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        run(command, tmp_path, short, *extra[command])
    for view in json.loads((tmp_path / "r" / "xray.json").read_text()):
        roles = [row[view["columns"].index("role")] for row in view["rows"]]
        assert 0 < sum(role == "response" for role in roles) <= 10


def write_short_pairs(path: Path) -> Path:
    """Questions of a few letters, so that a context of 40 tokens holds them."""
    rows = []
    for i in range(40):
        prompt = f"\n\nHuman: {i} tea\n\nAssistant:"
        rows.append({"chosen": f"{prompt} Yes {i}.", "rejected": f"{prompt} No."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# real rows


def test_the_commands_run_on_real_rows(tmp_path):
    file = os.environ.get("MINIPPO_HH_FILE")
    if not file:
        pytest.skip("set MINIPPO_HH_FILE to a file of HH-RLHF rows to run on real data")
    assert Path(file).is_file(), f"MINIPPO_HH_FILE is {file}, which is not there"
    where = ["--limit", "120"]
    limits = ["--max-prompt-tokens", "200", "--max-response-tokens", "56"]
    warmup = ["--value.prompts", "24", "--value.held-out", "4", "--value.batch-size", "4"]
    short = ["--steps", "3", "--batch-size", "4", "--micro-batch-size", "4"]
    extra = {"pretrain": ["--steps", "3", "--n-positions", "256"], "sft": [*limits, *short]}
    extra["reward"] = [*limits, "--batch-size", "4", "--micro-batch-size", "4"]
    extra["ppo"] = [*limits, *short, "--minibatch-size", "4", *warmup]
    for command in ("pretrain", "sft", "reward", "ppo"):
        run(command, tmp_path, Path(file), *where, *extra[command])
    rows = rows_of(tmp_path / "r" / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"pretrain", "sft", "reward", "value", "ppo"}
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    found = json.loads((tmp_path / "r" / "reward.json").read_text())
    assert found["held_out_pairs"] > 0
    assert found["low"] <= found["accuracy"] <= found["high"]
