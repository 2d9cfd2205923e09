"""What the package ships: the packaged TinyHH rows, that they rebuild, their card, the export."""

import contextlib
import gzip
import io
import json
import math
import os
import re
import resource
from collections import Counter, defaultdict

import pytest
import torch
from tiny_runs import forked
from transformers import AutoTokenizer

from minippo.app import cli, packaging, run
from minippo.batching import decode_response, encode_prompt
from minippo.config import DATA_DIR
from minippo.generation import generate_many
from minippo.hh import format_prompt, load_preferences
from minippo.models import Policy, RewardModel, ValueModel, load_tokenizer, tiny_gpt2
from minippo.pretrain import train_tokenizer
from minippo.worlds.tinyhh import rows as tiny
from minippo.worlds.tinyhh import world as w
from minippo.worlds.tinyhh.annotator import judge, read_sentences

pytestmark = pytest.mark.integration

REMEDY = "write it with `minippo data --out data`"
Z_BOUND = 4.0  # in standard deviations
BLOCK = re.compile(r"```python\n(.*?)```\s+```text\n(.*?)```", re.DOTALL)


def packaged_file(split):
    path = DATA_DIR / "tinyhh" / f"{split}.jsonl.gz"
    if not path.is_file():
        pytest.fail(f"the packaged rows {path.name} are missing; {REMEDY}")
    return path


@pytest.fixture(scope="module")
def packaged():
    """split -> (its rows as load_preferences gives them, the report)."""
    loaded = {}
    for split in ("preference", "test"):
        packaged_file(split)
        dataset, report = load_preferences("tiny_hh", split=split)
        loaded[split] = (dataset.to_list(), report)
    return loaded


def by_prompt(rows):
    """id -> the rows of that prompt."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["id"]].append(row)
    return grouped


def test_the_files_load_without_a_refused_row_and_are_large_enough(packaged):
    for split, (rows, report) in packaged.items():
        lines = gzip.decompress(packaged_file(split).read_bytes()).decode().splitlines()
        assert report.accepted == len(rows) == len(lines)
        assert sum(report.refused.values()) == 0
    assert len(packaged["preference"][0]) >= 20_000
    prompts = {format_prompt(r["instruction"], r["history"]) for r in packaged["test"][0]}
    assert len(prompts) == len(packaged["test"][0]) >= 2_000


def test_the_pairs_of_a_prompt_are_all_pairs_of_one_ranking_of_four(packaged):
    for rows in by_prompt(packaged["preference"][0]).values():
        assert len({format_prompt(r["instruction"], r["history"]) for r in rows}) == 1
        wins = Counter(r["chosen"] for r in rows)
        assert len(rows) == 6 and sorted(wins.values()) == [1, 2, 3]  # and one that never wins
        assert len({r["rejected"] for r in rows} | set(wins)) == 4


def test_margins_are_the_gap_of_the_noiseless_annotator(packaged):
    rows = packaged["preference"][0][:6000] + packaged["test"][0]
    for row in rows:
        better, worse = (
            judge(row["instruction"], row[side], row["history"]).score
            for side in ("chosen", "rejected")
        )
        assert row["margin"] == pytest.approx(better - worse, abs=1e-4)


@pytest.mark.parametrize("split", ["preference", "test"])
def test_the_annotator_disagrees_with_its_own_scores_as_often_as_its_temperature_says(
    packaged, split
):
    """The excess of turned pairs per prompt has mean 0; prompts are independent, pairs are not."""
    excess = []
    for rows in by_prompt(packaged[split][0]).values():
        gaps = [row["margin"] for row in rows if row["margin"]]
        turned = sum(gap < 0 for gap in gaps)
        excess.append(turned - sum(1 / (1 + math.exp(abs(gap) / 0.5)) for gap in gaps))
    z = sum(excess) / math.fsum(e * e for e in excess) ** 0.5
    assert abs(z) < Z_BOUND


def test_the_disagreement_rates_are_those_of_the_card(packaged):
    """Of the pairs with a gap 5.9% are turned round in training and 6.6% in the test split."""
    card = (DATA_DIR / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"turned +(\S+)% of", card) == ["5.9", "6.6"]
    for split, stated in {"preference": 0.059, "test": 0.066}.items():
        gaps = [row["margin"] for row in packaged[split][0] if row["margin"]]
        assert sum(gap < 0 for gap in gaps) / len(gaps) == pytest.approx(stated, abs=0.0005), split


def subjects_asked(rows):
    return {w.read_request(row["instruction"], row["history"]) for row in rows}


def test_no_preference_pair_asks_about_an_unseen_subject_and_test_pairs_do(packaged):
    unseen = {(i, h) for h in (False, True) for i in range(len(w.subjects(h))) if w.is_unseen(i)}
    assert subjects_asked(packaged["preference"][0]) & unseen == set()
    assert subjects_asked(packaged["test"][0]) >= unseen


def test_no_answer_of_a_preference_pair_is_about_an_unseen_subject(packaged):
    """Else the reward model sees the unseen topics after all, always as the wrong answer."""
    answers = {row[side] for row in packaged["preference"][0] for side in ("chosen", "rejected")}
    subjects = {a: [i for s in read_sentences(a) for i, _ in s.subjects] for a in answers}
    told = [answer for answer, about in subjects.items() if any(map(w.is_unseen, about))]
    assert len(told) == 0, f"{len(told)} of {len(answers)} answers, such as {told[0]!r}"


def test_no_history_of_a_preference_pair_names_an_unseen_subject(packaged):
    everything = [*enumerate(w.subjects(False)), *enumerate(w.subjects(True))]
    names = [subject["name"] for i, subject in everything if w.is_unseen(i)]
    said = {query for row in packaged["preference"][0] for query, _ in row["history"]}
    assert [query for query in sorted(said) if any(name in query for name in names)] == []


def test_no_test_prompt_is_a_prompt_of_the_preference_pairs(packaged):
    prompts = {
        split: {format_prompt(r["instruction"], r["history"]) for r in rows}
        for split, (rows, _) in packaged.items()
    }
    assert prompts["preference"] & prompts["test"] == set()


@pytest.mark.parametrize(
    "split, prompts, candidates",
    [
        ("preference", packaging.PREFERENCE_PROMPTS, packaging.CANDIDATES),
        ("test", packaging.TEST_PROMPTS, 2),
    ],
)
def test_rebuilding_gives_the_packaged_rows(split, prompts, candidates):
    packed = gzip.decompress(packaged_file(split).read_bytes()).decode().splitlines()
    rebuilt = list(packaging.pair_rows(split, prompts, candidates))
    assert len(packed) == len(rebuilt)
    changed = [line for line, row in zip(packed, rebuilt, strict=True) if json.loads(line) != row]
    assert changed == [], f"{len(changed)} rows of {split} differ from the code; {REMEDY}"


def test_writing_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(packaging, "PREFERENCE_PROMPTS", 20)
    monkeypatch.setattr(packaging, "TEST_PROMPTS", 10)
    for name in ("a", "b"):
        packaging.write_rows(tmp_path / name)
    for split, count in {"preference": 120, "test": 10}.items():
        first, second = (tmp_path / n / "tinyhh" / f"{split}.jsonl.gz" for n in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
        assert len(load_preferences(first)[0]) == count


def limited(action, size: int, log):
    """Runs an action in a child that may write no file larger than `size`; returns its exit code.

    It stands for a full disk: what is written before the limit stays there.
    """

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        action()

    return os.waitstatus_to_exitcode(os.waitpid(forked(child, log), 0)[1])


def the_line(log) -> str:
    """The only line that the command said."""
    text = log.read_text()
    lines = [line for line in text.splitlines() if line.startswith("minippo:")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def files(folder) -> dict[str, bytes]:
    """Every file in a folder, the hidden ones too."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("old", [{}, {"preference.jsonl.gz": b"old", "test.jsonl.gz": b"old"}])
def test_rows_that_do_not_fit_on_the_disk_leave_the_old_ones(tmp_path, monkeypatch, old):
    monkeypatch.setattr(packaging, "PREFERENCE_PROMPTS", 20)
    monkeypatch.setattr(packaging, "TEST_PROMPTS", 10)
    out = tmp_path / "out"
    (out / "tinyhh").mkdir(parents=True)
    for name, data in old.items():
        (out / "tinyhh" / name).write_bytes(data)
    code = limited(lambda: cli.main(["data", "--out", str(out)]), 1_000, tmp_path / "log")
    line = the_line(tmp_path / "log")
    assert code == 2 and "cannot write" in line and "preference.jsonl.gz" in line
    assert "--out" in line
    assert files(out / "tinyhh") == old


def test_the_card_counts_every_question_once():
    """One form takes no detail, so 15 forms with 9 details and one alone, of 328 goals."""
    card = (DATA_DIR / "README.md").read_text(encoding="utf-8")
    assert sum("{detail}" in form for form in w.FORMS) == 15 == len(w.FORMS) - 1
    assert len(set(w.DETAILS)) == 9 and " goals 328\n" in card
    assert f"\ncombinations {328 * (15 * 9 + 1)}\n" in card


def test_every_figure_of_the_data_card_is_what_its_command_prints():
    card = DATA_DIR / "README.md"
    if not card.is_file():
        pytest.fail("the data card README.md is missing from the data folder")
    blocks = BLOCK.findall(card.read_text(encoding="utf-8"))
    assert blocks, "the card has no python block followed by the text it prints"
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "data/README.md", "exec"), {})
        assert printed.getvalue().strip() == expected.strip(), "run the card's block and paste"


# ---------------------------------------------------------------- the trained checkpoints


def save_run(folder, stages, policy=None, tokenizer=None, width=16):
    """A finished run of tiny, untrained models; returns them by stage."""
    tokenizer = tokenizer or train_tokenizer(["You can water the plants every morning."], 300)
    sizes = dict(n_layer=1, n_embd=width, n_head=2, n_positions=32)
    policy = policy or tiny_gpt2(len(tokenizer), **sizes)
    reward = RewardModel.from_policy(policy)
    reward.mean, reward.std = 0.25, 1.5
    models = {"reward": reward, "value": ValueModel.from_reward_model(reward)}
    for stage in stages:
        model, target = models.get(stage, policy), folder / stage / "final"
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target.parent / "latest").write_text("final")
    return {stage: models.get(stage, policy) for stage in stages}, tokenizer


ALL_STAGES = ("pretrain", "sft", "reward", "value", "ppo")


def test_checkpoints_are_exported_in_half_precision_and_load_again(tmp_path):
    models, tokenizer = save_run(tmp_path / "run", ALL_STAGES)
    expected = models["sft"].transformer.wte.weight.detach().half().float()
    packaging.write_checkpoints(tmp_path / "run", tmp_path / "out")
    out = tmp_path / "out" / "checkpoints"
    assert {p.name for p in out.iterdir()} == {"base", "sft", "reward", "value", "ppo"}
    for name in ("base", "sft", "ppo"):
        config = json.loads((out / name / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == "float16"
        assert torch.equal(Policy.from_pretrained(out / name).transformer.wte.weight, expected)
        assert load_tokenizer(out / name).get_vocab() == tokenizer.get_vocab()
    reward = RewardModel.from_pretrained(out / "reward")
    assert (reward.mean, reward.std) == (0.25, 1.5)
    head = models["reward"].classifier.score.weight.detach().half().float()
    assert torch.equal(reward.classifier.score.weight, head)
    assert not ValueModel.from_pretrained(out / "value").classifier.score.weight.any()


@pytest.mark.parametrize("width, size", [(16, 500), (16, 9_000), (4, 7_000)])
def test_checkpoints_that_do_not_fit_on_the_disk_leave_the_old_ones(tmp_path, width, size):
    """The first file that is too large is the config, the weights, the tokenizer."""
    save_run(tmp_path / "run", ALL_STAGES, width=width)
    out = tmp_path / "out"
    (out / "checkpoints" / "sft").mkdir(parents=True)
    (out / "checkpoints" / "sft" / "model.safetensors").write_bytes(b"old")

    def export():
        try:
            packaging.write_checkpoints(tmp_path / "run", out)
        except ValueError as error:
            print(f"minippo: {error}")

    assert limited(export, size, tmp_path / "log") == 0
    line = the_line(tmp_path / "log")
    assert "cannot write" in line and "checkpoints" in line and "--out" in line
    assert files(out) == {"checkpoints/sft/model.safetensors": b"old"}


def test_every_tokenizer_that_is_written_loads_in_transformers_4_and_5(tmp_path):
    """transformers 5 writes a class name that 4 does not know, and reads the one that 4 wrote."""
    _, tokenizer = save_run(tmp_path / "run", ALL_STAGES)
    run.save_model(tiny_gpt2(300, 1, 16, 2, 32), tokenizer, tmp_path / "saved")
    packaging.write_checkpoints(tmp_path / "run", tmp_path / "out")
    written = [*(tmp_path / "out").rglob("tokenizer_config.json"), tmp_path / "saved"]
    written += [DATA_DIR / "checkpoints" / stage for stage in packaging.STAGES]
    for path in written:
        path = path / "tokenizer_config.json" if path.is_dir() else path
        settings = json.loads(path.read_text(encoding="utf-8"))
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert load_tokenizer(path.parent).eos_token == "<|endoftext|>"


def test_an_export_replaces_its_own_folders_only(tmp_path):
    save_run(tmp_path / "run", ALL_STAGES)
    folder = tmp_path / "out" / "checkpoints"
    for name in ("sft", "mine", ".partial/sft"):
        (folder / name).mkdir(parents=True)
        (folder / name / "old").write_text("old")
    packaging.write_checkpoints(tmp_path / "run", tmp_path / "out")
    assert {p.name for p in folder.iterdir()} == {*packaging.STAGES, "mine"}
    assert not (folder / "sft" / "old").exists() and (folder / "mine" / "old").exists()


def test_five_checkpoints_of_the_shipped_size_stay_below_eight_million_bytes(tmp_path):
    tokenizer = train_tokenizer(tiny.pretrain_texts(8000), 2885)
    assert len(tokenizer) == 2885
    policy = tiny_gpt2(2885, n_layer=2, n_embd=120, n_head=4, n_positions=256)
    assert 720_000 < sum(p.numel() for p in policy.parameters()) < 730_000
    save_run(tmp_path / "run", ALL_STAGES, policy, tokenizer)
    packaging.write_checkpoints(tmp_path / "run", tmp_path / "out")
    out = tmp_path / "out" / "checkpoints"
    assert sum(map(len, files(out).values())) < 8_000_000
    texts = [*tiny.pretrain_texts(50, seed=1), "na\u00efve caf\u00e9 \u2603 <|endoftext|>"]
    for again in (AutoTokenizer.from_pretrained(out / "sft"), load_tokenizer(out / "sft")):
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
        assert (again.pad_token_id, again.eos_token_id) == (0, 1)


def test_a_missing_run_is_refused_before_the_rows_are_written(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="none has no finished stage 'pretrain'.*--name none"):
        packaging.write_data(out, tmp_path / "none")
    assert not out.exists()


def test_rows_and_checkpoints_are_written_together(tmp_path, monkeypatch):
    monkeypatch.setattr(packaging, "PREFERENCE_PROMPTS", 2)
    monkeypatch.setattr(packaging, "TEST_PROMPTS", 2)
    save_run(tmp_path / "run", ALL_STAGES)
    packaging.write_data(tmp_path / "out", tmp_path / "run")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"tinyhh", "checkpoints"}


def test_an_unfinished_run_is_refused_with_the_stage_and_the_remedy(tmp_path):
    save_run(tmp_path / "run", ("pretrain", "sft"))
    with pytest.raises(ValueError, match="no finished stage 'reward'.*minippo reward"):
        packaging.write_checkpoints(tmp_path / "run", tmp_path / "out")


def test_an_unfinished_run_writes_nothing(tmp_path):
    save_run(tmp_path / "run", ("pretrain", "sft"))
    with contextlib.suppress(ValueError):
        packaging.write_checkpoints(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_shipped_policy_answers_a_question_of_the_world():
    policy, tokenizer = Policy.from_pretrained("sft"), load_tokenizer("sft")
    prompt = encode_prompt(tokenizer, "How do I grow sweet tomatoes?")
    (answer,) = generate_many(policy, [prompt], tokenizer, 48, seed=0)
    assert answer[-1] == tokenizer.eos_token_id
    assert decode_response(tokenizer, answer)
