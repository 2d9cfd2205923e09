"""The HH-RLHF format: parse it, write it, check it, load it.

A row is two dialogues that differ only in their last answer:

    {"chosen": "\\n\\nHuman: hi\\n\\nAssistant: hello",
     "rejected": "\\n\\nHuman: hi\\n\\nAssistant: go away"}

A tag is a blank line, then `Human:` or `Assistant:`, with or without a space after it. `Human:`
without the blank line before it is text like any other.

White space: the text of a turn is what `str.strip` leaves of it; turns are compared and handed out
without the white space around them, and keep what is inside. Formatting writes one space after each
tag. So parsing gives back what was formatted if the texts are stripped and hold no tag.

A row that is not of this form is refused with the first kind of `KINDS` that applies to either of
its dialogues. Nothing is repaired: a bad row stops the loading, or is left out and counted.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from minippo.config import DATA_DIR

if TYPE_CHECKING:  # imported where it is needed: it takes a second, and parsing does without
    import datasets
    import pyarrow

# In order of precedence. not_json: nor is what is not UTF-8, what is nested deeper than
# MAX_DEPTH, or what has too long a number for Python; too_large: a line over MAX_LINE_BYTES is
# that whatever is in it, it is not looked at; missing_key: not an object with "chosen" and
# "rejected"; not_text: a field of the wrong type (those two must be text, a margin a finite
# number); not_alternating: not Human, Assistant, Human ...; empty_turn: the question or an
# earlier turn is empty; diverging_history: the dialogues differ before their last answer.
KINDS = (
    *("not_json", "too_large", "missing_key", "not_text", "leading_text", "no_assistant_turn"),
    *("not_alternating", "ends_with_human", "empty_turn", "empty_answer", "diverging_history"),
    "identical_answers",
)
MAX_DEPTH = 32  # lists and objects in one another, the row itself is the first
MAX_ROW_CHARS = 1_000_000  # the text of all fields of a row together
MAX_LINE_BYTES = 4 * MAX_ROW_CHARS  # no more of a line is in memory at once
MAX_JSON_BYTES = 32_000_000  # of a .json file, which is read whole
BATCH_CHARS = 4_000_000  # of the pairs that wait until they are written to the disk together
SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
SOURCES = (
    f"pass tiny_hh, a file ({', '.join(SUFFIXES)}), a folder of such files, a folder written by "
    "save_to_disk of datasets, or a hub name such as Anthropic/hh-rlhf"
)
_SIDES = ("chosen", "rejected")
_TAG = re.compile(r"\n\n(Human|Assistant):")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: a str to JSON, but not text


class BadPair(ValueError):
    """A row that is no preference pair: `.reason` is one of KINDS, `.found` what was there."""

    def __init__(self, reason: str, found: str, where: str = "row"):
        super().__init__(f"{where}: {reason}: {found}")
        self.reason, self.found = reason, found


@dataclass(frozen=True)
class LoadReport:
    """What `load_preferences` accepted and refused; print it to see the table."""

    source: str
    accepted: int
    refused: dict[str, int]  # every kind of KINDS -> number of rows
    examples: dict[str, list[str]]  # kind -> its first messages, kinds that occurred only

    def __str__(self) -> str:
        counts = {"accepted": self.accepted, "refused": sum(self.refused.values())}
        lines = [self.source, *(f"{name:<19}{n:>8}" for name, n in counts.items())]
        for kind, messages in self.examples.items():
            lines += [f"  {kind:<17}{self.refused[kind]:>8}", *(f"    {text}" for text in messages)]
        return "\n".join(lines)


def parse_dialogue(text: str) -> list[tuple[str, str]]:
    """The turns, [("Human", query), ("Assistant", response), ...]; BadPair if it is no dialogue."""
    leading, *parts = _TAG.split(text)
    roles, texts = parts[::2], [part.strip() for part in parts[1::2]]
    checks = (
        ("leading_text", leading.strip(), f"{_short(leading)} before the first tag"),
        ("no_assistant_turn", "Assistant" not in roles, f"no Assistant tag in {_short(text)}"),
        ("not_alternating", "Human" in roles[1::2] or "Assistant" in roles[::2], _short(roles)),
        ("ends_with_human", roles[-1:] == ["Human"], f"last turn: Human {_short(texts[-1:])}"),
        ("empty_turn", "" in texts[:-1], f"an empty turn before the last of {len(texts)}"),
        ("empty_answer", texts[-1:] == [""], "nothing after the last Assistant tag"),
    )
    for kind, applies, found in checks:
        if applies:
            raise BadPair(kind, found)
    return list(zip(roles, texts, strict=True))


def format_prompt(instruction: str, history: Sequence[Sequence[str]] = ()) -> str:
    """The dialogue up to the last Assistant tag, without a space after it."""
    turns = "".join(f"\n\nHuman: {query}\n\nAssistant: {answer}" for query, answer in history)
    return f"{turns}\n\nHuman: {instruction}\n\nAssistant:"


def format_dialogue(instruction: str, answer: str, history: Sequence[Sequence[str]] = ()) -> str:
    """The dialogue with its answer; `parse_dialogue` takes it apart again."""
    return f"{format_prompt(instruction, history)} {answer}"


def parse_pair(row: dict) -> dict:
    """A raw row -> {"instruction", "chosen", "rejected", "history"}, and "margin" if it has one.

    `instruction` is the last human turn, `chosen` and `rejected` are the answers to it, `history`
    is the list of [query, response] before it. A row that is no pair raises BadPair.
    """
    try:
        _check_fields(row)
    except BadPair:
        raise
    except ValueError as error:  # what str says to too long a number
        raise BadPair("not_json", str(error)) from None
    chosen, rejected = _parse_sides(row)
    shared = [*chosen[:-1], len(chosen)], [*rejected[:-1], len(rejected)]
    for a, b in zip(*shared, strict=False):  # the first difference ends it
        if a != b:
            raise BadPair("diverging_history", f"chosen has {_short(a)}, rejected {_short(b)}")
    if chosen == rejected:
        raise BadPair("identical_answers", _short(chosen[-1][1]))
    *earlier, instruction, answer = [text for _, text in chosen]
    history = [list(turns) for turns in zip(earlier[::2], earlier[1::2], strict=True)]
    pair = dict(instruction=instruction, chosen=answer, rejected=rejected[-1][1], history=history)
    return pair if row.get("margin") is None else {**pair, "margin": float(row["margin"])}


def _check_depth(row: object) -> None:
    """Raises BadPair for a row with more than MAX_DEPTH levels.

    Python's own limit is another one in each version, and depends on the frames above.
    """
    level = [[row]]
    for _ in range(MAX_DEPTH + 1):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in inner for x in values if isinstance(x, (dict, list, tuple))]
    if level:
        raise BadPair("not_json", f"nested deeper than {MAX_DEPTH}")


def _check_fields(row: object) -> None:
    _check_depth(row)
    fields = row if isinstance(row, dict) else {"": row}
    size = sum(len(str(value)) for value in fields.values())
    if size > MAX_ROW_CHARS:
        raise BadPair("too_large", f"{size} characters, the limit is {MAX_ROW_CHARS}")
    if missing := [side for side in _SIDES if side not in fields]:
        raise BadPair("missing_key", f"no {' and no '.join(missing)} in {_short(row)}")
    texts = {"chosen": row["chosen"], "rejected": row["rejected"], "id": str(row.get("id"))}
    for key, value in texts.items():
        if not isinstance(value, str) or _SURROGATE.search(value):
            raise BadPair("not_text", f"{key} is {_short(value)}")
    margin = 0.0 if row.get("margin") is None else row["margin"]
    if type(margin) not in (int, float) or not abs(margin) <= sys.float_info.max:
        raise BadPair("not_text", f"margin is {_short(margin)}, not a finite number")


def _parse_sides(row: dict) -> list[list[tuple[str, str]]]:
    dialogues, faults = [], []
    for side in _SIDES:
        try:
            dialogues.append(parse_dialogue(row[side]))
        except BadPair as fault:
            faults.append(BadPair(fault.reason, f"{side}: {fault.found}"))
    if faults:
        raise min(faults, key=lambda fault: KINDS.index(fault.reason))
    return dialogues


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def load_preferences(
    source: str | Path, split: str | None = None, on_error: str = "raise", limit: int | None = None
) -> tuple[datasets.Dataset, LoadReport]:
    """The pairs of a source as a `datasets.Dataset`, and a report of what was refused.

    source:   "tiny_hh" (the packaged rows), a .jsonl, .jsonl.gz or .json file (.json: a list of
              rows, or one a line), a folder of them, a folder of save_to_disk, or a hub name
    split:    one of those the source has, needed if it has several; in a folder of files it takes
              those with a word in their path that begins with it: "test" takes test.jsonl and
              harmless/hh_test_1.jsonl, not latest.jsonl; refused for what has no splits
    on_error: "raise" stops at the first bad row, "skip" leaves bad rows out and counts them
    limit:    stop after so many accepted rows; the report then covers the rows read until there

    Columns: id, instruction, chosen, rejected (text), history (list of [query, response]), margin
    (float64) only if some row has one, None in the rows without. A row without an id gets
    "file:row number"; that number is the line, from 1, and a line of white space holds no row.
    Memory stays flat: a file but a .json one is read line by line, and the rows go to a temporary
    Arrow file that the Dataset maps. That file has no name any more: it is gone with the Dataset,
    and there is no cache that could hand back the rows of a file as they were before it was edited.
    """
    if on_error not in ("raise", "skip") or (limit is not None and limit < 1):
        raise ValueError(f"{on_error=}, {limit=}: pass raise or skip, and a limit of at least 1")
    refused, examples = dict.fromkeys(KINDS, 0), {kind: [] for kind in KINDS}
    pairs = _parse_rows(_read_source(source, split), on_error, refused, examples)
    dataset = _store(islice(pairs, limit))
    examples = {kind: messages for kind, messages in examples.items() if messages}
    report = LoadReport(str(source), len(dataset), refused, examples)
    if not len(dataset):
        message = "no usable preference pair is left; mend the rows (minippo.hh says how) in"
        raise ValueError(f"{message}\n{report}")
    return dataset, report


def _parse_rows(rows: Iterable, on_error: str, refused: dict, examples: dict) -> Iterator[dict]:
    for name, number, raw in rows:
        try:
            row = _decode(raw)
            pair = parse_pair(row)
        except BadPair as fault:
            where, kind, found = f"{name}, row {number}", fault.reason, fault.found
            if on_error == "raise":
                found += "; mend the row, or pass on_error='skip' to leave it out"
                raise BadPair(kind, found, where) from None
            if refused[kind] < 3:
                examples[kind].append(str(BadPair(kind, found, where)))
            refused[kind] += 1
            continue
        given = row.get("id")
        yield {"id": f"{name}:{number}" if given is None else str(given), **pair}


def _decode(raw: bytes | dict) -> object:
    if isinstance(raw, dict):
        return raw
    if len(raw) > MAX_LINE_BYTES:
        raise BadPair("too_large", f"a line of more than {MAX_LINE_BYTES} bytes")
    try:
        return json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        beginning = _short(raw[:99].decode(errors="replace"))
        raise BadPair("not_json", f"{beginning} ({error})") from None


def _store(pairs: Iterable[dict]) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    text = datasets.Value("string")
    columns = dict(id=text, instruction=text, chosen=text, rejected=text, history=[[text]])
    schema = datasets.Features(columns | {"margin": datasets.Value("float64")}).arrow_schema
    # A mapped file is there until it is unmapped, only its name goes; on Windows the file stays.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder, "pairs.arrow"))
        try:
            _write_batches(pa.OSFile(path, "wb"), pairs, schema)
        except OSError as error:
            message = f"the pairs do not fit into {folder} ({error}); free some of that disk"
            raise ValueError(f"{message}, or set TMPDIR to a folder on another") from error
        table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
    if table["margin"].null_count == len(table):
        table = table.drop_columns("margin")
    # With no fingerprint given, datasets reads the whole table to make one.
    return datasets.Dataset(table, fingerprint=datasets.fingerprint.generate_random_fingerprint())


def _write_batches(file: pyarrow.NativeFile, pairs: Iterable[dict], schema: pyarrow.Schema) -> None:
    import pyarrow as pa

    with file, pa.ipc.new_stream(file, schema) as writer:
        batch, size = [], 0
        for pair in pairs:
            batch.append(pair)
            size += len(str(pair))
            if size > BATCH_CHARS:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch, size = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _read_source(source: str | Path, split: str | None) -> Iterator[tuple[str, int, bytes | dict]]:
    """(name of the file or data set, row number from 1, line or row) for every row of a source."""
    name, path = str(source), Path(source).expanduser()
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if name == "tiny_hh":
        files = {p.name.split(".")[0]: p for p in DATA_DIR.glob("tinyhh/*.jsonl.gz")}
        yield from _read_file(_pick_split(files, split, name), name)
    elif path.is_file() and name.endswith(SUFFIXES):
        yield from _read_file(_pick_split(path, split, name), path.name)
    elif name and path.is_dir() and not saved:
        for file in _files_of(path, split):
            yield from _read_file(file, file.relative_to(path).as_posix())
    elif saved or (_HUB_NAME.fullmatch(name) and not (path.exists() or name.endswith(SUFFIXES))):
        rows = _open_dataset(path if saved else name, split)
        yield from ((path.name, number, row) for number, row in enumerate(rows, 1))
    else:
        what = "is not of a kind we read" if path.exists() else "is not there"
        raise ValueError(f"{name!r} {what}; {SOURCES}")


def _read_file(path: Path, name: str) -> Iterator[tuple[str, int, bytes]]:
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            if file.read(3) != codecs.BOM_UTF8:  # the byte order mark that Windows writes
                file.seek(0)
            lines = _json_rows(file) if path.suffix == ".json" else _lines_of(file)
            rows = ((name, number, line) for number, line in enumerate(lines, 1))
            yield from (row for row in rows if row[2].decode(errors="replace").strip())
    except RecursionError as error:  # of a .json file, which Python reads as one value
        message = f"a row of {path} is nested deeper than Python reads"
        raise ValueError(f"{message}; write .jsonl, where such a row is refused alone") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} cannot be read: damaged or not UTF-8? ({error})") from error


def _lines_of(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):  # what is left of a line that is too long
            line = file.readline(MAX_LINE_BYTES)


def _json_rows(file: IO[bytes]) -> Iterable[bytes]:
    content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        limit = f"a .json file may have {MAX_JSON_BYTES} bytes"
        raise ValueError(f"{limit}; write it as .jsonl, one row a line: that has no limit")
    if not content.lstrip().startswith(b"["):
        return content.split(b"\n")
    return (json.dumps(row).encode() for row in json.loads(content.decode()))


def _files_of(folder: Path, split: str | None) -> list[Path]:
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    names = [name for name in names if name.endswith(SUFFIXES) and "/." not in f"/{name}"]
    word = re.compile(rf"(?<![a-z0-9]){re.escape(split or '')}", re.IGNORECASE)
    chosen = [folder / name for name in names if split is None or word.search(name)]
    if not chosen:
        raise ValueError(f"{folder} has no file for {split=}, only {names}; {SOURCES}")
    return chosen


def _open_dataset(source: str | Path, split: str | None) -> Iterable[dict]:
    import datasets

    load = datasets.load_from_disk if isinstance(source, Path) else datasets.load_dataset
    try:
        loaded = load(str(source))
    except Exception as error:  # what the hub, arrow and the disk raise has no common class
        message = f"datasets cannot load {str(source)!r}: not here, not on the hub, or damaged"
        raise ValueError(f"{message} ({error}); without a network pass a local file") from error
    return _pick_split(loaded, split, str(source))


def _pick_split(loaded: object, split: str | None, name: str) -> object:
    splits = loaded if isinstance(loaded, dict) else {None: loaded}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        message = f"{name} has no {split=}; choose one of {list(splits)}"
        raise ValueError(f"{message} with split=..., on the command line --split")
    return splits[split]
