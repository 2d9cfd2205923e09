"""The HH-RLHF reader: every kind of bad row, its precedence, every source, edited files."""

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from itertools import combinations_with_replacement
from pathlib import Path

import datasets
import pyarrow
import pytest
from bounds.slow_reader import walk

from minippo import hh
from minippo.hh import (
    KINDS,
    MAX_ROW_CHARS,
    BadPair,
    format_dialogue,
    format_prompt,
    load_preferences,
    parse_dialogue,
    parse_pair,
)

H, A = "\n\nHuman: ", "\n\nAssistant: "


def make_row(number: int = 0, **others) -> dict:
    question = f"{H}question {number}?{A}"
    return {"chosen": f"{question}good {number}", "rejected": f"{question}bad {number}", **others}


def dump(rows: list) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def write(path: Path, rows: list) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write(dump(rows))
    return path


# Each row has the fault of its kind, and, where it can, faults of later kinds as well.
BAD_ROWS = {
    "not_json": ['{"chosen": "' + "x" * (MAX_ROW_CHARS + 1), "{'chosen': 1}", "[" * 100_000, "nul"],
    "too_large": [
        {"other": "x" * (MAX_ROW_CHARS + 1)},
        {"chosen": 3, "rejected": "x" * (MAX_ROW_CHARS + 1)},
        ["x" * (MAX_ROW_CHARS + 1)],
    ],
    "missing_key": [{"chosen": 3}, {"rejected": "text"}, {}, [1, 2], 7, None, "chosen rejected"],
    "not_text": [
        {"chosen": 3, "rejected": "leading"},
        {"chosen": "leading", "rejected": None},
        {"chosen": "leading", "rejected": ["leading"]},
        {"chosen": "leading", "rejected": f"{H}q{A}half a pair \ud83d"},
        make_row(margin="leading"),
        make_row(margin=float("nan")),
        make_row(margin=float("-inf")),
        make_row(margin=10**400),
        make_row(margin=True),
        make_row(margin=[]),
        make_row(margin=""),
    ],
    "leading_text": [
        {"chosen": f"so{H}q", "rejected": f"so{H}q"},
        {"chosen": f"{H}q", "rejected": f"so{H}q{A}a"},
        {"chosen": f"Human: q{A}a", "rejected": f"Human: q{A}b"},
        {"chosen": f"\nHuman: q{A}a", "rejected": f"{H}q{A}b"},
    ],
    "no_assistant_turn": [
        {"chosen": "", "rejected": ""},
        {"chosen": f"{H}q{H}", "rejected": f"{H}q{H}"},
        {"chosen": f"{A}a{A}b", "rejected": f"{H}q"},
    ],
    "not_alternating": [
        {"chosen": f"{H}q{H}q{A}a{H}", "rejected": f"{H}q{A}a"},
        {"chosen": f"{H}q{A}{A}a", "rejected": f"{H}q{A}a"},
        {"chosen": f"{A}a", "rejected": f"{A}a"},
        {"chosen": f"{H}q{A}a{H}", "rejected": f"{A}a{H}q{A}"},
    ],
    "ends_with_human": [
        {"chosen": f"{H}{A}a{H}", "rejected": f"{H}{A}a{H}"},
        {"chosen": f"{H}{A}", "rejected": f"{H}q{A}a{H}more"},
    ],
    "empty_turn": [
        {"chosen": f"{H}{A}", "rejected": f"{H}{A}"},
        {"chosen": f"{H}q{A} {H}q{A}a", "rejected": f"{H}q{A}{H}q{A}b"},
        {"chosen": f"{H}q{A}", "rejected": f"{H} \n\t{A}b"},
    ],
    "empty_answer": [
        {"chosen": f"{H}q{A}a", "rejected": f"{H}other\n\nAssistant:"},
        {"chosen": f"{H}q{A}\n \n", "rejected": f"{H}q{A}"},
    ],
    "diverging_history": [
        {"chosen": f"{H}q{A}a", "rejected": f"{H}other{A}a"},
        {"chosen": f"{H}q{A}a{H}r{A}b", "rejected": f"{H}q{A}b"},
        {"chosen": f"{H}q{A}b", "rejected": f"{H}q{A}a{H}r{A}b"},
        {"chosen": f"{H}q{A}a{H}r{A}b", "rejected": f"{H}q{A}c{H}r{A}b"},
    ],
    "identical_answers": [
        {"chosen": f"{H}q{A}a", "rejected": f"{H}q{A}a"},
        {"chosen": f"{H}q{A}a", "rejected": f"{H}q\n\nAssistant:a\n"},
    ],
}
BAD_CASES = [(kind, row) for kind, rows in BAD_ROWS.items() for row in rows]
CASE_NAMES = [f"{kind}-{i}" for kind, rows in BAD_ROWS.items() for i in range(len(rows))]


def test_kinds_are_those_of_the_format_in_their_order():
    assert isinstance(KINDS, tuple)
    assert list(KINDS) == list(BAD_ROWS)  # the table above is in order of precedence


@pytest.mark.parametrize(("kind", "row"), BAD_CASES, ids=CASE_NAMES)
def test_first_kind_that_applies_is_given(tmp_path, kind, row):
    line = row if kind == "not_json" else json.dumps(row)
    path = write(tmp_path / "rows.jsonl", [make_row(), "", line])
    with pytest.raises(BadPair) as caught:
        load_preferences(path)
    assert caught.value.reason == kind
    message = str(caught.value)
    assert message.startswith(f"rows.jsonl, row 3: {kind}: ")
    assert len(message) < 300 and message.isascii()


@pytest.mark.parametrize(("kind", "row"), [case for case in BAD_CASES if case[0] != "not_json"])
def test_parse_pair_gives_the_kind_too(kind, row):
    with pytest.raises(BadPair) as caught:
        parse_pair(row)
    assert caught.value.reason == kind and caught.value.found in str(caught.value)


def test_the_earlier_kind_of_either_dialogue_wins():
    faults = {  # a dialogue for each fault that one dialogue can have
        "leading_text": f"so{H}q{A}a",
        "no_assistant_turn": f"{H}q",
        "not_alternating": f"{H}q{H}q{A}a",
        "ends_with_human": f"{H}q{A}a{H}r",
        "empty_turn": f"{H}{A}a",
        "empty_answer": f"{H}q{A}",
    }
    assert tuple(faults) == KINDS[4:10]
    for (kind, text), (_, later) in combinations_with_replacement(faults.items(), 2):
        for chosen, rejected in ((text, later), (later, text), (text, f"{H}q{A}a")):
            with pytest.raises(BadPair, match=f"row: {kind}: "):
                parse_pair({"chosen": chosen, "rejected": rejected})


def test_message_says_which_dialogue_and_what_was_found():
    with pytest.raises(BadPair, match=r"leading_text: rejected: 'so' before the first tag"):
        parse_pair({"chosen": f"{H}q{A}a", "rejected": f"so{H}q{A}b"})
    found = r"chosen has \('Human', 'q'\), rejected \('Human', 'other'\)"
    with pytest.raises(BadPair, match=found):
        parse_pair({"chosen": f"{H}q{A}a", "rejected": f"{H}other{A}b"})
    with pytest.raises(BadPair, match=r"no rejected in \{'chosen': 'x'\}"):
        parse_pair({"chosen": "x"})


def test_row_of_exactly_the_limit_is_read():
    row = {"chosen": f"{H}q{A}a", "rejected": f"{H}q{A}"}
    row["rejected"] += "x" * (MAX_ROW_CHARS - len(row["chosen"]) - len(row["rejected"]))
    assert parse_pair(row)["chosen"] == "a"
    row["rejected"] += "x"
    with pytest.raises(BadPair, match="too_large"):
        parse_pair(row)


def test_tag_inside_a_line_or_after_one_line_break_is_text():
    answer = "I say: Human: no.\nHuman: nor this.\nAssistant: nor that. \n\nhuman:\n\n Human: me"
    pair = parse_pair({"chosen": f"{H}q{A}{answer}", "rejected": f"{H}q{A}b"})
    assert pair == {"instruction": "q", "chosen": answer, "rejected": "b", "history": []}


def test_tag_needs_no_space_after_it_and_outer_white_space_goes():
    text = "\n\nHuman:q  one\n\n\n\nAssistant:  a\n\nb \n\n\nHuman:r\n\nAssistant:c"
    expected = [("Human", "q  one"), ("Assistant", "a\n\nb"), ("Human", "r"), ("Assistant", "c")]
    assert parse_dialogue(text) == expected


HISTORY = [
    ["first", "one"],
    ["second:\n\n- a list", "Human: two"],
    ["third \u2028 \x0b x", "drei \u00e4\u20ac\U0001f600"],
]


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_parsing_gives_back_what_was_formatted(turns):
    history = HISTORY[: turns - 1]
    texts = [text for turn in history for text in turn] + ["Why?", "Because."]
    text = format_dialogue("Why?", "Because.", history)
    assert parse_dialogue(text) == list(zip(["Human", "Assistant"] * turns, texts))
    row = {"chosen": text, "rejected": format_dialogue("Why?", "No.", history)}
    expected = {"instruction": "Why?", "chosen": "Because.", "rejected": "No.", "history": history}
    assert parse_pair(row) == expected


def test_format_is_the_text_of_hh_rlhf():
    prompt = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
    assert format_prompt("q2", [("q1", "a1")]) == prompt
    assert format_dialogue("q2", "a2", [["q1", "a1"]]) == prompt + " a2"
    assert format_prompt("q") == "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize("margin", [0, 0.0, 2, -1.5, 1e308])
def test_margin_is_kept_as_a_float(margin):
    pair = parse_pair(make_row(margin=margin))
    assert pair["margin"] == margin and type(pair["margin"]) is float


def test_no_margin_and_a_null_margin_are_the_same():
    assert "margin" not in parse_pair(make_row())
    assert "margin" not in parse_pair(make_row(margin=None))


def test_columns_and_ids(tmp_path):
    others = [{}, {"id": 12}, {"id": "mine", "extra": {"a": 1}}, {"id": None}]
    rows = [make_row(number, **other) for number, other in enumerate(others)]
    data, report = load_preferences(write(tmp_path / "rows.jsonl", rows))
    text = datasets.Value("string")
    expected = dict(id=text, instruction=text, chosen=text, rejected=text)
    expected["history"] = [[text]]
    assert data.features == datasets.Features(expected)
    assert data["id"][:] == ["rows.jsonl:1", "12", "mine", "rows.jsonl:4"]
    assert data["instruction"][:] == [f"question {i}?" for i in range(4)]
    assert (report.accepted, sum(report.refused.values()), report.examples) == (4, 0, {})


def test_margin_column_exists_if_one_row_has_a_margin(tmp_path):
    data, _ = load_preferences(write(tmp_path / "rows.jsonl", [make_row(0), make_row(1, margin=2)]))
    assert data.features["margin"] == datasets.Value("float64")
    assert data["margin"][:] == [None, 2.0]


def test_skip_counts_every_kind_and_keeps_first_messages(tmp_path):
    lines = [row if kind == "not_json" else json.dumps(row) for kind, row in BAD_CASES]
    path = write(tmp_path / "rows.jsonl", [*lines, make_row()])
    data, report = load_preferences(path, on_error="skip")
    assert report.refused == {kind: len(bad) for kind, bad in BAD_ROWS.items()}
    assert len(data) == report.accepted == 1 and data[0]["id"] == f"rows.jsonl:{len(lines) + 1}"
    assert all(len(messages) == min(3, len(BAD_ROWS[k])) for k, messages in report.examples.items())
    table = str(report)
    for kind, bad in BAD_ROWS.items():
        assert re.search(rf"^  {kind} +{len(bad)}$", table, re.MULTILINE)
    assert re.search(r"^accepted +1$", table, re.MULTILINE)
    assert re.search(rf"^refused +{len(BAD_CASES)}$", table, re.MULTILINE)
    assert "rows.jsonl, row 2: not_json" in table


def test_nothing_left_is_an_error_that_shows_the_counts(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"chosen": "x"}, {"chosen": "y"}])
    with pytest.raises(ValueError, match=r"(?s)no usable preference pair.*missing_key +2\n"):
        load_preferences(path, on_error="skip")
    with pytest.raises(ValueError, match=r"(?s)no usable preference pair.*refused +0"):
        load_preferences(write(tmp_path / "empty.jsonl", []))


def test_limit_stops_reading_after_that_many_accepted_rows(tmp_path):
    rows = [make_row(0), "broken", make_row(2), make_row(3), "broken"]
    data, report = load_preferences(write(tmp_path / "r.jsonl", rows), on_error="skip", limit=2)
    assert data["id"][:] == ["r.jsonl:1", "r.jsonl:3"] and report.refused["not_json"] == 1
    broken = write(tmp_path / "b.jsonl.gz", [make_row(i) for i in range(9000)])
    broken.write_bytes(broken.read_bytes()[:-30])  # not noticed: what is behind is never read
    assert len(load_preferences(broken, limit=10)[0]) == 10


@pytest.mark.parametrize("options", [{"on_error": "ignore"}, {"limit": 0}, {"limit": -1}])
def test_wrong_options_are_refused(tmp_path, options):
    path = write(tmp_path / "rows.jsonl", [make_row()])
    with pytest.raises(ValueError, match=next(iter(options))):
        load_preferences(path, **options)


# --- sources


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "list.json"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = [make_row(i, id=i, margin=i / 4) for i in range(5)]
    path = write(tmp_path / name, [json.dumps(rows, indent=1)] if name == "list.json" else rows)
    for source in (path, str(path)):
        data, report = load_preferences(source)
        assert data["chosen"][:] == [f"good {i}" for i in range(5)] and report.accepted == 5
        assert data["margin"][:] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_line_breaks_of_windows_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second = (json.dumps(make_row(i)) for i in (0, 1))
    path.write_bytes(f"\ufeff{first}\r\n\r\n{second}\r\n".encode())
    data, _ = load_preferences(path)
    assert data["id"][:] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_unicode_line_separators_inside_a_text_do_not_break_the_row(tmp_path):
    row = {"chosen": f"{H}q{A}a\u2028b\x85c", "rejected": f"{H}q{A}d"}
    for name in ("rows.jsonl", "rows.json"):
        path = tmp_path / name
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        assert load_preferences(path)[0][0]["chosen"] == "a\u2028b\x85c"


def test_rows_of_a_json_list_are_numbered_from_one(tmp_path):
    bad = [5, "", None, json.dumps(make_row()), make_row(margin=float("nan"))]
    path = write(tmp_path / "rows.json", ["", json.dumps([make_row(), *bad], indent=2)])
    with pytest.raises(BadPair, match="rows.json, row 2: missing_key"):
        load_preferences(path)
    report = load_preferences(path, on_error="skip")[1]
    assert (report.accepted, report.refused["missing_key"], report.refused["not_text"]) == (1, 4, 1)


def test_folder_is_read_sorted_and_split_chooses_by_word(tmp_path):
    write(tmp_path / "b" / "train.jsonl", [make_row(1)])
    write(tmp_path / "b" / "test.jsonl.gz", [make_row(2)])
    write(tmp_path / "a" / "hh_test_1.json", [make_row(3)])
    write(tmp_path / "test" / "part.jsonl", [make_row(4)])
    write(tmp_path / "latest.jsonl", [make_row(5)])
    write(tmp_path / ".hidden" / "test.jsonl", ["broken"])
    write(tmp_path / "test.md", ["no data"])
    (tmp_path / "empty").mkdir()
    everything = ["a/hh_test_1.json:1", "b/test.jsonl.gz:1", "b/train.jsonl:1", "latest.jsonl:1"]
    assert load_preferences(tmp_path)[0]["id"][:] == [*everything, "test/part.jsonl:1"]
    test = load_preferences(tmp_path, split="test")[0]["id"][:]
    assert test == ["a/hh_test_1.json:1", "b/test.jsonl.gz:1", "test/part.jsonl:1"]
    assert load_preferences(tmp_path, split="train")[0]["id"][:] == ["b/train.jsonl:1"]
    with pytest.raises(ValueError, match=r"split='dev'.*latest\.jsonl"):
        load_preferences(tmp_path, split="dev")
    with pytest.raises(ValueError, match="has no file.*pass tiny_hh"):
        load_preferences(tmp_path / "empty")


def test_saved_data_sets_are_read(tmp_path):
    train, test = [make_row(0, margin=1.5), make_row(1, margin=None)], [make_row(2)]
    datasets.Dataset.from_list(train).save_to_disk(tmp_path / "one")
    data, _ = load_preferences(tmp_path / "one")
    assert data["id"][:] == ["one:1", "one:2"] and data["margin"][:] == [1.5, None]
    parts = {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert load_preferences(str(tmp_path / "two"), split="test")[0]["chosen"][:] == ["good 2"]
    with pytest.raises(ValueError, match=r"split='dev'.*\['train', 'test'\]"):
        load_preferences(tmp_path / "two", split="dev")
    with pytest.raises(ValueError, match=r"split=None.*\['train', 'test'\]"):
        load_preferences(tmp_path / "two")


def test_bad_row_of_a_saved_data_set_is_named(tmp_path):
    rows = [make_row(), {"chosen": "x", "rejected": None}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    with pytest.raises(BadPair, match="d, row 2: not_text: rejected is None"):
        load_preferences(tmp_path / "d")


def test_damaged_saved_data_set_is_a_value_error(tmp_path):
    datasets.Dataset.from_list([make_row()]).save_to_disk(tmp_path / "d")
    (tmp_path / "d" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="datasets cannot load"):
        load_preferences(tmp_path / "d")


def test_split_of_a_single_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl has no split='test'"):
        load_preferences(write(tmp_path / "rows.jsonl", [make_row()]), split="test")


def test_tiny_hh_is_the_packaged_file_of_a_split(tmp_path, monkeypatch):
    monkeypatch.setattr(hh, "DATA_DIR", tmp_path)
    write(tmp_path / "tinyhh" / "preference.jsonl.gz", [make_row(1, margin=0.5)])
    write(tmp_path / "tinyhh" / "test.jsonl.gz", [make_row(2)])
    assert load_preferences("tiny_hh", split="preference")[0]["margin"][:] == [0.5]
    for split in (None, "train"):
        with pytest.raises(ValueError, match=rf"split={split!r}.*preference.*test"):
            load_preferences("tiny_hh", split=split)


def test_edited_file_gives_its_new_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [make_row(1)])
    stamp = path.stat()
    first, _ = load_preferences(path)
    write(path, [make_row(2)])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same name, size and time
    second, _ = load_preferences(path)
    assert path.stat().st_size == stamp.st_size and path.stat().st_mtime_ns == stamp.st_mtime_ns
    assert (first["chosen"][:], second["chosen"][:]) == (["good 1"], ["good 2"])
    mapped = [d.map(lambda row: {"text": row["chosen"] + "!"})["text"][:] for d in (first, second)]
    assert mapped == [["good 1!"], ["good 2!"]]


def test_loading_leaves_no_file(tmp_path, monkeypatch):
    for folder in ("cwd", "temporary"):
        (tmp_path / folder).mkdir()
    path = write(tmp_path / "data" / "rows.jsonl", [make_row(), "broken", make_row()])
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    data, _ = load_preferences(path, on_error="skip")
    with pytest.raises(BadPair):
        load_preferences(path)
    assert data["chosen"][:] == ["good 0", "good 0"] and not data.cache_files
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_rows_are_mapped_from_the_disk_and_survive_a_copy(tmp_path):
    path = write(tmp_path / "rows.jsonl", [make_row(i, margin=i) for i in range(3000)])
    before = pyarrow.total_allocated_bytes()
    data, _ = load_preferences(path)
    assert data.data.nbytes > 100_000 > pyarrow.total_allocated_bytes() - before
    copies = [pickle.loads(pickle.dumps(data)), data.select(range(3000)), data.shuffle(seed=0)]
    del data
    for copied in copies:
        assert sorted(copied["margin"][:]) == list(map(float, range(3000)))


def test_pairs_are_written_in_batches_and_come_back_in_order(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [make_row(i) for i in range(50)])
    for size in (1, 700, 10**9):
        monkeypatch.setattr(hh, "BATCH_CHARS", size)
        data, _ = load_preferences(path)
        assert data["chosen"][:] == [f"good {i}" for i in range(50)]
    assert load_preferences(path)[0].data.column("id").num_chunks == 1


def test_a_full_disk_is_a_value_error_that_says_what_to_do(tmp_path):
    path = write(tmp_path / "rows.jsonl", [make_row(i) for i in range(50)])
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))"
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    call = "from minippo.hh import load_preferences; load_preferences(sys.argv[1])"
    code = "\n".join([limit, ignore, call])
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "ValueError: the pairs do not fit into" in last
    assert "set TMPDIR to a folder on another" in last


def test_only_the_first_messages_of_a_kind_are_kept(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{}] * 500 + [make_row()])
    report = load_preferences(path, on_error="skip")[1]
    assert report.refused["missing_key"] == 500
    rows = [message.split(": ")[0] for message in report.examples["missing_key"]]
    assert rows == [f"rows.jsonl, row {number}" for number in (1, 2, 3)]


# --- lines and sizes


def test_a_line_is_too_large_one_byte_over_the_limit_and_the_next_is_read(tmp_path, monkeypatch):
    row = json.dumps(make_row())
    limit = len(row) + 1  # with its line feed
    monkeypatch.setattr(hh, "MAX_LINE_BYTES", limit)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{row}\n{row} \n{'x' * 5 * limit}\n{row}\n{'y' * 3 * limit}")
    data, report = load_preferences(path, on_error="skip")
    assert data["id"][:] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert report.refused == {**dict.fromkeys(KINDS, 0), "too_large": 3}
    with pytest.raises(BadPair, match=f"row 2: too_large: a line of more than {limit} bytes"):
        load_preferences(path)


def test_a_json_file_over_the_limit_says_what_to_do(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.json", [json.dumps([make_row()])])
    monkeypatch.setattr(hh, "MAX_JSON_BYTES", path.stat().st_size)
    assert len(load_preferences(path)[0]) == 1
    monkeypatch.setattr(hh, "MAX_JSON_BYTES", path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"rows\.json cannot be read.*write it as \.jsonl"):
        load_preferences(path)


def test_a_row_that_is_no_utf8_is_not_json_and_the_others_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(make_row()).encode()
    latin, packed = good.replace(b"good", b"g\xfct"), gzip.compress(good)
    path.write_bytes(b"\n".join([good, latin, packed, good]))
    data, report = load_preferences(path, on_error="skip")
    assert data["id"][0] == "rows.jsonl:1" and len(data) == 2
    assert report.refused["not_json"] == sum(report.refused.values()) >= 2
    with pytest.raises(BadPair, match="rows.jsonl, row 2: not_json: .*utf-8"):
        load_preferences(path)


@pytest.mark.parametrize("key", ["chosen", "rejected", "id", "margin", "extra"])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": ', "}")])
def test_how_deep_a_row_may_be_is_ours_to_say(tmp_path, key, opening, closing):
    """Python gives up at another depth in each version, and depending on the frames above."""
    row, most = json.dumps(make_row(**{key: "deep"})), hh.MAX_DEPTH - 1  # the row is one level
    depths = (most, most + 1, 900, 1_010, 5_000)
    lines = [row.replace('"deep"', opening * n + "1" + closing * n) for n in depths]
    report = load_preferences(write(tmp_path / "rows.jsonl", [make_row(), *lines]), on_error="skip")
    found = {kind: n for kind, n in report[1].refused.items() if n}
    may_be_anything = key in ("id", "extra")
    assert found == {"not_json": 4} | ({} if may_be_anything else {"not_text": 1})
    assert f"nested deeper than {hh.MAX_DEPTH}" in report[1].examples["not_json"][0]


def test_a_json_file_too_deep_for_python_is_refused_with_what_to_do(tmp_path):
    """Python reads it as one value, and where it gives up the rows are not told apart."""
    path = tmp_path / "rows.json"
    row = json.dumps(make_row(extra="deep")).replace('"deep"', "[" * 200_000 + "]" * 200_000)
    path.write_text(f"[{dump([make_row()])}, {row}]")
    with pytest.raises(ValueError, match="nested deeper than Python reads; write .jsonl"):
        load_preferences(path, on_error="skip")


def test_a_number_of_too_many_digits_is_not_json(tmp_path):
    digits = "9" * 5000
    line = json.dumps(make_row(id="?")).replace('"?"', digits)
    with pytest.raises(BadPair, match="rows.jsonl, row 1: not_json: "):
        load_preferences(write(tmp_path / "rows.jsonl", [line]))
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in (10**5000, nested):
        with pytest.raises(BadPair, match="row: not_json: "):
            parse_pair(make_row(extra=value))
    while nested:  # taken apart here: Python would do it by recursion
        nested = nested.pop()


MISSING = ["no/such/rows.jsonl", "data/rows.json", "rows", "/no/rows"]


@pytest.mark.parametrize("source", MISSING)
def test_missing_source_is_named_with_what_is_legal(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    legal = r"is not there; pass tiny_hh.*\.jsonl\.gz.*save_to_disk.*hub"
    with pytest.raises(ValueError, match=legal):
        load_preferences(source)


def test_empty_name_is_not_the_folder_we_stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [make_row()])
    with pytest.raises(ValueError, match="'' is not of a kind we read; pass tiny_hh"):
        load_preferences("")


def test_other_kind_of_file_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "data" / "rows.csv", [make_row()])
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "data/rows.csv", "data/rows.csv"):  # or a hub name?
        with pytest.raises(ValueError, match=r"rows\.csv' is not of a kind we read; pass tiny_hh"):
            load_preferences(source)


def damage(name: str, content: bytes) -> bytes:
    if name == "cut.jsonl.gz":
        return gzip.compress(content)[:-12]
    if name == "flipped.jsonl.gz":
        packed = bytearray(gzip.compress(content))
        packed[20] ^= 255
        return bytes(packed)
    return {
        "plain.jsonl.gz": content,
        "latin.json": b"[" + content.replace(b"good", "g\u00fct".encode("latin-1")) + b"]",
        "broken.json": b"[" + content,
    }[name]


DAMAGED = ["cut.jsonl.gz", "flipped.jsonl.gz", "plain.jsonl.gz", "latin.json", "broken.json"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_damaged_file_is_a_value_error_that_names_it(tmp_path, name, on_error):
    path = tmp_path / name
    path.write_bytes(damage(name, dump([make_row(i) for i in range(50)]).encode()))
    with pytest.raises(ValueError, match=f"{name} cannot be read") as caught:
        load_preferences(path, on_error=on_error)
    assert type(caught.value) is ValueError


def test_hub_name_without_a_network_says_so():
    call = "load_preferences('Anthropic/no-such-data', 'test')"
    code = f"from minippo.hh import load_preferences; {call}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ValueError: ")
    assert "Anthropic/no-such-data" in last and "pass a local file" in last


# --- real rows


@pytest.fixture
def real_file() -> Path:
    path = os.environ.get("MINIPPO_HH_FILE")
    if not path:
        pytest.skip("MINIPPO_HH_FILE is not set: it names a jsonl.gz file of HH-RLHF rows")
    assert Path(path).is_file(), f"MINIPPO_HH_FILE names {path}, which is not there"
    return Path(path)


def independent_kind(line: str) -> str:
    row = json.loads(line)
    if set(row) != {"chosen", "rejected"} or {type(text) for text in row.values()} != {str}:
        return "unexpected"
    (kind, *chosen), (other, *rejected) = walk(row["chosen"]), walk(row["rejected"])
    if kind or other:
        order = list(BAD_ROWS)
        return min((k for k in (kind, other) if k), key=order.index)
    if chosen[0] != rejected[0]:
        return "diverging_history"
    return "identical_answers" if chosen == rejected else "accepted"


def test_independent_counter_knows_the_handmade_rows():
    for kind in list(BAD_ROWS)[4:]:
        assert {independent_kind(json.dumps(row)) for row in BAD_ROWS[kind]} == {kind}
    assert independent_kind(json.dumps(make_row())) == "accepted"


def test_counts_on_real_rows_equal_an_independent_count(real_file):
    counts = dict.fromkeys(["accepted", *KINDS], 0)
    with gzip.open(real_file, "rt", encoding="utf-8") as file:
        for line in file:
            counts[independent_kind(line)] += 1
    data, report = load_preferences(real_file, on_error="skip")
    assert {"accepted": report.accepted, **report.refused} == counts
    assert len(data) == counts["accepted"] > 0
    if report.accepted + sum(report.refused.values()) == 1500:  # the first rows of harmless-base
        found = {kind: n for kind, n in report.refused.items() if n}
        assert (report.accepted, found) == (1492, {"not_alternating": 4, "empty_answer": 4})


def test_accepted_real_rows_survive_a_round_trip(real_file):
    data, _ = load_preferences(real_file, on_error="skip")
    broken = 0
    for pair in data:
        chosen, rejected = (
            format_dialogue(pair["instruction"], pair[side], pair["history"])
            for side in ("chosen", "rejected")
        )
        again = parse_pair({"chosen": chosen, "rejected": rejected})
        broken += {"id": pair["id"], **again} != pair
    assert broken == 0
