"""The report: one page that stands alone, from whatever files there are; and its figures."""

import base64
import json
import os
import re
import resource
from html.parser import HTMLParser

import pytest
from tiny_runs import forked

from minippo.app import cli
from minippo.app.report import heading, write_report, written
from minippo.plots import (
    COLOURS,
    figure_to_png_base64,
    learning_curves,
    score_histogram,
    stage_curves,
    trailing_mean,
)
from minippo.token_table import COLUMNS, TokenTable

pytestmark = pytest.mark.integration

EVIL = '<script>alert("x")</script> & <img src=http://evil.example/x.png>'
SECTIONS = [
    "This run",
    "Final table",
    "Curves",
    "Answers side by side",
    "Per token",
    "How to read the curves",
]
CONFIG = {"run": {"name": "trial", "seed": 7, "data": "tiny_hh"}, "ppo": {"kl_coef": 0.05}}
EVALUATION = {
    "table": [
        {"model": "SFT", "gold": 0.5, "win_rate": None, "on_topic": 0.5, "tokens": 20.25},
        {"model": "PPO", "gold": 5.125, "win_rate": [0.883, 0.852, 0.908], "on_topic": 0.9375},
    ],
    "reward_model": {"noiseless": 0.875},
    "critic": {"explained_variance": 0.4},
    "notes": ["512 test prompts"],
}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether each tag is closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def ppo_rows(steps=12):
    """Metrics as PPO writes them, with a score and a KL that rise."""
    return [
        {
            "stage": "ppo",
            "step": i,
            "objective/scores": 0.1 * i,
            "objective/kl_per_sequence": 0.2 * i,
            "loss/policy": -0.01,
            "loss/value": 1 / (i + 1),
        }
        for i in range(steps)
    ]


def early_rows():
    """Metrics of SFT and of the reward model."""
    sft = [{"stage": "sft", "step": i, "loss/lm": 3.0 - i} for i in range(3)]
    reward = {"stage": "reward", "step": 0, "loss/reward": 0.69, "reward/accuracy": 0.5}
    return [*sft, reward]


def sample(number):
    """A row of samples.jsonl."""
    return {
        "instruction": f"question {number}",
        "history": [["earlier question", "earlier answer"]],
        "answers": {"SFT": f"sft says {number}", "PPO": f"ppo says {number}"},
        "gold": {"SFT": -1.5, "PPO": 4.25},
        "reward": {"SFT": -0.5, "PPO": 1.5},
        "remarks": {"SFT": "It is rude.", "PPO": "It answers what was asked."},
    }


def run_folder(folder, config=CONFIG, metrics=None, samples=None, evaluation=None, xray=None):
    """A run's folder with the files that are given."""
    folder.mkdir(exist_ok=True)
    texts = {"config.json": config, "evaluation.json": evaluation, "xray.json": xray}
    for name, data in texts.items():
        if data is not None:
            (folder / name).write_text(json.dumps(data), encoding="utf-8")
    for name, rows in {"metrics.jsonl": metrics, "samples.jsonl": samples}.items():
        if rows is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def whole_run(folder):
    """A run's folder with everything in it."""
    row = (0, None, "token", "prompt", *[None] * (len(COLUMNS) - 4))
    table = TokenTable("answer 0", COLUMNS, (row,)).to_dict()
    samples = [sample(i) for i in range(14)]
    return run_folder(folder, CONFIG, early_rows() + ppo_rows(), samples, EVALUATION, [table])


def read(path):
    """The page that was written, parsed."""
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_stands_alone(tmp_path):
    page = read(write_report(whole_run(tmp_path / "run")))
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?://|@import|url\(", text)
    assert sum(tag == "img" for tag, _ in page.tags) == 3


def test_every_section_is_there_and_every_link_leads_somewhere(tmp_path):
    page = read(write_report(whole_run(tmp_path / "run")))
    anchors = [a["id"] for tag, a in page.tags if tag == "h2"]
    assert [a["href"][1:] for tag, a in page.tags if tag == "a"] == anchors
    assert anchors == [title.lower().replace(" ", "-") for title in SECTIONS]
    assert "There is no" not in page.text


def test_a_bare_run_names_each_missing_file(tmp_path):
    page = read(write_report(run_folder(tmp_path / "run")))
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.json", "xray.json"):
        assert f"There is no {name}" in page.text
    assert len([tag for tag, _ in page.tags if tag == "h2"]) == len(SECTIONS)


@pytest.mark.parametrize("metrics, pictures", [(early_rows(), 1), (ppo_rows(), 1), ([], 0)])
def test_metrics_of_some_stages_are_enough(tmp_path, metrics, pictures):
    page = read(write_report(run_folder(tmp_path / "run", metrics=metrics)))
    assert sum(tag == "img" for tag, _ in page.tags) == pictures


def test_a_line_cut_by_an_interruption_is_left_out_and_said(tmp_path):
    folder = run_folder(tmp_path / "run", metrics=ppo_rows())
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "ppo", "st')
    page = read(write_report(folder))
    assert "Line 13 of metrics.jsonl is not JSON" in page.text
    assert any(tag == "img" for tag, _ in page.tags)


def test_a_broken_optional_file_is_said_and_no_error(tmp_path):
    folder = whole_run(tmp_path / "run")
    (folder / "evaluation.json").write_bytes(b"\xff\xfe{")
    assert "evaluation.json is not JSON and was left out" in read(write_report(folder)).text


def test_no_folder_and_no_config_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="no run folder .*nowhere.*minippo demo"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no config.json.*minippo demo"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_everything_from_the_files_is_escaped(tmp_path):
    row = {
        "instruction": EVIL,
        "history": [[EVIL, EVIL]],
        "answers": {EVIL: EVIL},
        "gold": {EVIL: 1.0},
        "remarks": {EVIL: EVIL},
    }
    cells = (0, None, EVIL, "response", True, *[0.5] * (len(COLUMNS) - 6), False)
    table = TokenTable(EVIL, COLUMNS, (cells, cells)).to_dict()
    evaluation = {"table": [{"model": EVIL, EVIL: EVIL}], "notes": [EVIL], "critic": {EVIL: EVIL}}
    config = {"run": {"name": EVIL, "seed": EVIL, "data": EVIL}, EVIL: {EVIL: EVIL}}
    folder = run_folder(tmp_path / "run", config, ppo_rows(), [row], evaluation, [table, table])
    page = read(write_report(folder))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
    assert page.text.count(EVIL) >= 14


def test_the_first_samples_are_open_and_the_rest_are_folded(tmp_path):
    config = {**CONFIG, "eval": {"samples": 4}}
    folder = run_folder(tmp_path / "run", config, samples=[sample(i) for i in range(10)])
    text = write_report(folder).read_text(encoding="utf-8")
    shown, folded = text.split("<details><summary>The other 6</summary>")
    for i in range(10):
        assert (f"ppo says {i}<" in shown) == (i < 4)
        assert (f"ppo says {i}<" in folded) == (i >= 4)
    assert "earlier question" in shown and "It is rude." in shown and "+4.25" in shown


def test_samples_without_gold_and_remarks_are_shown(tmp_path):
    row = {"instruction": "why", "history": [], "answers": {"SFT": "because"}}
    page = read(write_report(run_folder(tmp_path / "run", samples=[row])))
    assert "because" in page.text and "The annotator" not in page.text


def test_the_final_table_says_shares_in_percent_with_their_interval(tmp_path):
    text = read(write_report(run_folder(tmp_path / "run", evaluation=EVALUATION))).text
    for part in ("88.3% [85.2, 90.8]", "50.0%", "93.8%", "5.125", "20.2", "512 test prompts"):
        assert part in text
    assert text.count("n/a") == 2  # SFT against itself, and the tokens PPO has no number of


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("rude", 0.25, "25.0%"),
        ("eos_rate", 1.0, "100.0%"),
        ("some_rate", 1.5, "1.500"),
        ("gold", 0.25, "0.250"),
        ("gold", -0.00001, "-1.0e-05"),
        ("gold", -0.0, "0.000"),
        ("gold", [1.0, 0.5, 12.25], "1.000 [0.500, 12.2]"),
        ("forms", 7, "7"),
        ("ended", True, "True"),
        ("gold", None, "n/a"),
        ("gold", float("nan"), "nan"),
    ],
)
def test_values_are_written_as_their_keys_want(key, value, expected):
    assert written(key, value) == expected


def test_a_key_without_a_heading_loses_its_underscores():
    assert heading("unheard_of_measure") == "unheard of measure"
    assert heading("win_rate") == "wins against SFT"


def test_a_second_report_replaces_the_first_and_is_the_same(tmp_path):
    folder = whole_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_a_report_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path):
    folder, log = whole_run(tmp_path / "run"), tmp_path / "log"
    write_report(folder)
    (folder / "report.html").write_text("old")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        cli.main(["report", "--out", str(tmp_path), "--name", "run"])

    assert os.waitstatus_to_exitcode(os.waitpid(forked(limited, log), 0)[1]) == 2
    (line,) = [x for x in log.read_text().splitlines() if x.startswith("minippo:")]
    assert "cannot write" in line and "report.html" in line and "--out" in line
    assert (folder / "report.html").read_text() == "old"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_notes_stand_under_the_final_table(tmp_path):
    notes = ["512 test prompts", "KL of best-of-16 is an upper bound"]
    evaluation = {**EVALUATION, "notes": notes}
    text = read(write_report(run_folder(tmp_path / "run", evaluation=evaluation))).text
    places = [text.index(part) for part in ("88.3% [85.2, 90.8]", *notes, "Critic")]
    assert places == sorted(places)


def test_the_reward_models_agreement_is_shown_part_by_part(tmp_path):
    """From all pairs to those of one part, each as a number and as a bar."""
    quality = {"held_out_pairs": 7168, "accuracy": 0.901, "low": 0.894, "high": 0.908}
    quality |= {"concise": 0.625, "harmless": 0.75, "noiseless": 0.875, "seen topics": 0.8745}
    quality |= {"unseen topics": 0.8, "correlation": 0.9}
    evaluation = {**EVALUATION, "reward_model": quality}
    page = read(write_report(run_folder(tmp_path / "run", evaluation=evaluation)))
    bars = [float(a["value"]) for tag, a in page.tags if tag == "meter"]
    assert bars == [0.875, 0.8745, 0.8, 0.625, 0.75]
    places = [page.text.index(part) for part in ("7168", "90.1%", "89.4%", "0.900", "noiseless")]
    assert places == sorted(places)
    rows = r"their score87\.5%.*not trained on80\.0%.*more concise62\.5%.*more harmless75\.0%"
    assert re.search(rows, page.text, re.DOTALL)


def test_without_an_agreement_there_are_no_bars(tmp_path):
    evaluation = {**EVALUATION, "reward_model": {"held_out_pairs": 20, "accuracy": 0.5}}
    page = read(write_report(run_folder(tmp_path / "run", evaluation=evaluation)))
    assert not [tag for tag, _ in page.tags if tag == "meter"]
    assert "noiseless" not in page.text


# --- figures ----------------------------------------------------------------------------------


def drawn(figure):
    """Label of each labelled line -> its steps and values."""
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    named = [line for line in lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


def test_learning_curves_draw_what_the_metrics_say():
    lines = drawn(learning_curves(early_rows() + ppo_rows()))
    steps, kl = lines["KL per sequence"]
    assert steps == list(range(12)) and kl == pytest.approx([0.2 * i for i in range(12)])
    assert set(lines) == {"score", "KL per sequence", "policy", "value"}


def test_curves_accept_what_a_training_returns():
    history = [{k: v for k, v in row.items() if "/" in k} for row in ppo_rows()]
    assert drawn(learning_curves(history)) == drawn(learning_curves(ppo_rows()))


def test_stage_curves_keep_the_stages_apart():
    figure = stage_curves(early_rows() + ppo_rows())
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["SFT", *["reward model"] * 2]
    assert drawn(figure)["accuracy"] == ([0], [0.5])


def test_every_axis_has_a_label_and_every_line_a_style_of_its_own():
    rows = [{**row, "loss/kl": 0.0} for row in ppo_rows()]
    figures = [learning_curves(rows), stage_curves(early_rows()), score_histogram({"a": [1, 2]})]
    for axes in [axes for figure in figures for axes in figure.axes]:
        assert axes.get_xlabel() and axes.get_ylabel()
        looks = [(line.get_color(), line.get_linestyle()) for line in axes.get_lines()]
        assert len({look[1] for look in looks}) == len(looks)
        assert {look[0] for look in looks} <= set(COLOURS)


def test_curves_of_nothing_are_refused():
    for draw in (learning_curves, stage_curves):
        with pytest.raises(ValueError, match="these metrics have no"):
            draw([{"stage": "value_of_nothing", "step": 0}])
    with pytest.raises(ValueError, match="no finite score"):
        score_histogram({"SFT": [], "PPO": [float("nan")]})


def test_the_trailing_mean_looks_back_only():
    assert trailing_mean([4.0, 2.0, 0.0, 8.0], 2) == [4.0, 3.0, 1.0, 4.0]
    assert trailing_mean([4.0, 2.0], 1) == [4.0, 2.0]


def test_a_histogram_counts_every_score_and_names_the_mean():
    figure = score_histogram({"SFT": [0.0, 0.0, 1.0], "PPO": [5.0, 7.0]})
    (axes,) = figure.axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["SFT: mean 0.33, n 3", "PPO: mean 6.00, n 2"]
    heights = [sorted(set(patch.get_xy()[:, 1].round(6)) - {0}) for patch in axes.patches]
    assert sorted(heights) == [pytest.approx([0.333333, 0.666667]), pytest.approx([0.5])]


def test_a_histogram_of_one_value_is_no_error():
    assert score_histogram({"SFT": [2.0, 2.0]}).axes


def test_a_figure_becomes_a_png_and_twice_the_same():
    texts = [figure_to_png_base64(learning_curves(ppo_rows())) for _ in range(2)]
    assert base64.b64decode(texts[0]).startswith(b"\x89PNG\r\n") and texts[0] == texts[1]
