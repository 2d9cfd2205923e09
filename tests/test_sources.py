"""Where rows come from: what is held out, what stays together, what is refused."""

import json

import pytest
from tiny_runs import write_pairs

from minippo.app.sources import Source
from minippo.hh import format_dialogue, format_prompt
from minippo.preferences import ranking_to_pairs


def write_rankings(path, prompts: int, answers: int, margins: bool = True):
    """All pairs of one ranking of `answers` answers for each prompt, shuffled over the file."""
    lines = []
    for number in range(prompts):
        row = {"id": str(number), "instruction": f"What is {number}?", "history": []}
        texts = [f"It is {number}, rank {place}." for place in range(answers)]
        scores = [float(-place) for place in range(answers)] if margins else None
        for pair in ranking_to_pairs(row, texts, scores):
            both = ("chosen", "rejected")
            sides = {k: format_dialogue(row["instruction"], pair[k]) for k in both}
            lines.append({**sides, **({"margin": pair["margin"]} if margins else {})})
    lines = lines[::2] + lines[1::2]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def prompts_of(rows):
    return {format_prompt(row["instruction"], row["history"]) for row in rows}


def test_the_last_tenth_of_the_prompts_is_in_no_training(tmp_path):
    source = Source(write_rankings(tmp_path / "pairs.jsonl", prompts=30, answers=3))
    train, held_out = source.pairs()
    assert len(prompts_of(held_out)) == 3 and len(prompts_of(train)) == 27
    assert prompts_of(train) & prompts_of(held_out) == set()
    assert len(train) + len(held_out) == 30 * 3
    assert prompts_of(source.demonstrations()) == prompts_of(source.prompts("ppo", 999))
    assert prompts_of(source.prompts("test", 999)) == prompts_of(held_out)
    assert not any(prompt in text for prompt in prompts_of(held_out) for text in source.texts())


def test_the_pairs_of_one_ranking_become_one_row_best_first(tmp_path):
    source = Source(write_rankings(tmp_path / "pairs.jsonl", prompts=20, answers=4))
    train, held_out = source.rankings()
    assert len(train) == 18 and len(held_out) == 2
    for row in train + held_out:
        ranks = [int(text.rstrip(".").split()[-1]) for text in row["candidates"]]
        assert ranks == [0, 1, 2, 3]


def test_validation_prompts_are_tinyhhs_own_and_a_file_has_none(tmp_path):
    world = Source("tiny_hh")
    validation, test = (prompts_of(world.prompts(name, 300)) for name in ("validation", "test"))
    assert len(validation) == len(test) == 300 and validation & test == set()
    source = Source(write_rankings(tmp_path / "pairs.jsonl", prompts=20, answers=2))
    with pytest.raises(ValueError, match="has no validation prompts; use --prompts-of test"):
        source.prompts("validation", 5)


def test_the_packaged_rankings_are_of_four_answers_and_no_prompt_is_on_both_sides():
    train, held_out = Source("tiny_hh").rankings()
    assert len(train) == 3600 and len(held_out) == 400
    assert {len(row["candidates"]) for row in train + held_out} == {4}
    assert prompts_of(train) & prompts_of(held_out) == set()


def test_prompts_of_a_file_are_different_and_as_many_as_there_are(tmp_path):
    source = Source(write_rankings(tmp_path / "pairs.jsonl", prompts=20, answers=4))
    for split, count in (("ppo", 18), ("test", 2)):
        rows = source.prompts(split, 999)
        assert len(rows) == len(prompts_of(rows)) == count
    assert len(source.prompts("ppo", 5)) == 5


def test_a_file_with_pairs_of_a_single_prompt_is_refused(tmp_path):
    path = write_rankings(tmp_path / "one.jsonl", prompts=1, answers=3)
    with pytest.raises(ValueError, match=r"one\.jsonl.*1 prompt only; at least 2"):
        Source(path)


@pytest.mark.parametrize("options", [{"limit": 5}, {"split": "train"}])
def test_options_of_files_are_refused_for_tinyhh(options):
    with pytest.raises(ValueError, match="--limit and --split belong to --data FILE"):
        Source("tiny_hh", **options)


def test_a_limit_uses_the_first_rows_only(tmp_path):
    path = write_rankings(tmp_path / "pairs.jsonl", prompts=30, answers=2)
    train, held_out = Source(path, limit=10).pairs()
    assert len(train) + len(held_out) == 10


def test_one_of_several_splits_is_chosen_by_name_and_asked_for_if_none_is(tmp_path):
    import datasets

    splits = {}
    for split, count in (("train", 20), ("test", 10)):
        path = write_pairs(tmp_path / f"{split}.jsonl", count)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        splits[split] = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"\['train', 'test'\].*--split"):
        Source(str(tmp_path / "saved"))
    train, held_out = Source(str(tmp_path / "saved"), split="test").pairs()
    assert len(train) + len(held_out) == 10
