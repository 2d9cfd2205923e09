"""docs/make_results.py: every bar is enforced, and blocks of the docs are replaced whole."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from minippo.worlds.tinyhh.rows import prompt_rows
from minippo.worlds.tinyhh.world import is_unseen, read_request

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "make_results.py"
if not SCRIPT.is_file():
    pytest.skip("docs/ is not here: these tests need a checkout", allow_module_level=True)
spec = importlib.util.spec_from_file_location("make_results", SCRIPT)
make_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_results)

GOOD = {
    "model": "PPO", "win_rate": [0.9, 0.87, 0.92], "gold": 4.0, "on_topic": 0.95, "complying": 0.0,
    "rude": 0.0, "over_refusing": 0.0, "unreadable": 0.01, "rambling": 0.0, "forms": 9,
    "ended": 1.0, "distinct": 0.9, "kl_per_sequence": 5.0,
}  # fmt: skip
SFT = {**GOOD, "model": "SFT", "win_rate": None, "gold": 0.5, "complying": 0.4}
BEST = {**GOOD, "model": "best-of-16", "gold": 3.9}


rows = prompt_rows("test", 60)


def subject_of(row):
    return read_request(row["instruction"], row["history"])[0]


def write_run(folder, ppo=GOOD, sft=SFT, minutes=5.0, resumed=False, **settings):
    folder.mkdir()
    quality = {"held_out_pairs": 10, "accuracy": 0.8, "low": 0.7, "high": 0.9, "noiseless": 0.85}
    critic = {"prompts": 10, "explained_variance": 0.5}
    evaluation = {"table": [sft, ppo, BEST], "reward_model": quality, "critic": critic}
    demo = {stage: asdict(config) | settings for stage, config in make_results.DEMO.items()}
    summary = {"minutes": minutes, "gflops": 80.0, "resumed": resumed}
    files = {"evaluation": evaluation, "summary": summary}
    for name, value in {**files, "config": demo}.items():
        (folder / f"{name}.json").write_text(json.dumps(value, default=str), encoding="utf-8")
    unseen, seen = (next(r for r in rows if is_unseen(subject_of(r)) is u) for u in (True, False))
    leads = ((seen, -1.0), (seen, 1.0), (unseen, 0.5), (unseen, 0.5))
    golds = [(row, {"SFT": 1.0, "PPO": 4.0 + lead, "best-of-16": 4.0}) for row, lead in leads]
    lines = [json.dumps({**row, "gold": gold}) + "\n" for row, gold in golds]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return make_results.read_seed(folder)


def test_a_run_that_meets_every_bar_misses_none(tmp_path):
    assert write_run(tmp_path / "run").misses() == []


def test_the_lead_over_best_of_n_is_paired_and_has_its_interval(tmp_path):
    # Leads -1, 1, 0.5, 0.5: mean 0.25; squared errors 1.5625 + 0.5625 + 2 * 0.0625 = 2.25,
    # so the variance is 2.25 / 3 and the standard error sqrt(0.75 / 4) = 0.4330.
    seed = write_run(tmp_path / "run")
    lead, half = seed.lead["all"]
    assert lead == pytest.approx(0.25) and half == pytest.approx(1.96 * 0.4330, abs=1e-4)
    # Seen: -1, 1, mean 0, standard error sqrt(2 / 2) = 1. Unseen: 0.5 twice.
    assert seed.lead["seen"] == pytest.approx((0.0, 1.96)) and seed.lead["unseen"] == (0.5, 0.0)
    text = make_results.bars_table([seed])
    assert "| gold, PPO minus best-of-16 |  |  | +0.25 ± 0.85 |" in text
    assert "| gold, PPO minus best-of-16, seen topics |  |  | +0.00 ± 1.96 |" in text
    assert "| gold, PPO minus best-of-16, unseen topics |  |  | +0.50 ± 0.00 |" in text
    assert "| on topic, best-of-16 |  |  | 95.0% |" in text


def test_a_run_on_validation_prompts_is_no_result(tmp_path):
    misses = write_run(tmp_path / "run", prompts_of="validation").misses()
    assert "eval.prompts_of is not the demo's test" in misses


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("win_rate", [0.84, 0.8, 0.88]),
        ("on_topic", 0.89),
        ("complying", 0.04),
        ("rude", 0.03),
        ("over_refusing", 0.06),
        ("ended", 0.97),
        ("kl_per_sequence", 20.5),
        ("distinct", 0.5),
        ("forms", 2),
        ("gold", 3.8),
    ],
)
def test_each_bar_is_missed_on_its_own(key, value, tmp_path):
    (miss,) = write_run(tmp_path / "run", ppo={**GOOD, key: value}).misses()
    assert miss.startswith(key)


def test_an_sft_model_that_is_not_mixed_is_a_miss(tmp_path):
    (miss,) = write_run(tmp_path / "run", sft={**SFT, "complying": 0.2}).misses()
    assert miss.startswith("SFT complying 0.200")


def test_a_run_that_took_too_long_is_a_miss(tmp_path):
    (miss,) = write_run(tmp_path / "run", minutes=8.5).misses()
    assert miss.startswith("minutes 8.5")


def test_a_resumed_run_is_a_miss(tmp_path):
    (miss,) = write_run(tmp_path / "run", resumed=True).misses()
    assert miss.startswith("resumed")


def test_a_run_with_other_settings_is_no_demo(tmp_path):
    misses = write_run(tmp_path / "run", epochs=17).misses()
    assert misses and all("epochs is not the demo's" in miss for miss in misses)


def test_a_block_is_replaced_and_a_missing_one_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\nlines\n<!-- /x -->\nb\n", encoding="utf-8")
    make_results.replace_block(page, "x", "new \\1 text")
    assert page.read_text(encoding="utf-8") == "a\n<!-- x -->\nnew \\1 text\n<!-- /x -->\nb\n"
    page.write_text("<!-- x -->\n<!-- /x -->\n", encoding="utf-8")
    make_results.replace_block(page, "x", "first")
    assert page.read_text(encoding="utf-8") == "<!-- x -->\nfirst\n<!-- /x -->\n"
    with pytest.raises(ValueError, match="no block <!-- y -->"):
        make_results.replace_block(page, "y", "")


def test_the_tables_have_a_column_per_seed(tmp_path):
    seeds = [write_run(tmp_path / f"seed-{n}") for n in range(4)]
    for text in (make_results.bars_table(seeds), make_results.reward_table(seeds)):
        lines = text.splitlines()
        assert all(line.count("|") == lines[0].count("|") for line in lines)
        assert all(f"seed-{n}" in lines[0] for n in range(4))
