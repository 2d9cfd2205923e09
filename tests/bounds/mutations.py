"""Rows of HH-RLHF, damaged in every way we could think of; both readers must say the same of them.

A mutation takes a row's bytes, and hands back bytes: one line, more, or none.
"""

import gzip
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minippo.config import DATA_DIR
from minippo.hh import BadPair, load_preferences

from . import slow_reader

H, A = "\n\nHuman:", "\n\nAssistant:"
GOOD = json.dumps({"chosen": f"{H} q{A} a", "rejected": f"{H} q{A} b", "id": "good"}).encode()
VALUES = [None, True, 0, 1.5, -3, 10**30, 10**400, float("nan"), float("-inf"), "", " ", "text"]
VALUES += [[], {}, ["text"], {"chosen": "text"}, [None]]
TURNS = [f"{H} more", f"{A} more", H, A, f"{H} \t{A} \n", "Human: no blank line", f"{A}{H} q{A} a"]


def seeds(count: int = 1500) -> list[bytes]:
    """Rows to start from: those of MINIPPO_HH_FILE if it is set, else TinyHH's."""
    path = os.environ.get("MINIPPO_HH_FILE") or DATA_DIR / "tinyhh" / "preference.jsonl.gz"
    with gzip.open(path, "rb") as file:
        return [line for line, _ in zip(file, range(count))]


# --- of bytes -----------------------------------------------------------------------------------


def flip_bytes(row: bytes, rng: random.Random) -> bytes:
    """A few bits, anywhere."""
    changed = bytearray(row)
    for _ in range(rng.randint(1, 6) if row else 0):
        changed[rng.randrange(len(row))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(row: bytes, rng: random.Random) -> bytes:
    """The end is missing, or the beginning."""
    place = rng.randint(0, len(row))
    return rng.choice([row[:place], row[place:]])


def insert_bytes(row: bytes, rng: random.Random) -> bytes:
    """Something that is no UTF-8, no JSON, or looks like the end of a line."""
    bad = [b"\xff", b"\xc3", b"\xed\xa0\xbd", b"\xf5\x80\x80\x80", b"\x00", b"\r", b"\r\n", b"\n"]
    bad += [b"\xef\xbb\xbf", b"\x1e", b"\\u0000", b"\\ud83d", b"\\udc00\\ud83d", b"\\x", b'"', b"}"]
    bad += [c.encode() for c in "\u2028\u2029\x85\xa0\ufffe\U0001f600"]
    place = rng.choice([0, len(row.rstrip()), len(row), rng.randint(0, len(row))])
    return row[:place] + rng.choice(bad) + row[place:]


def break_lines(row: bytes, rng: random.Random) -> bytes:
    """Other line ends, blank lines of all kinds, two rows on a line."""
    line = row.rstrip(b"\n")
    blank = [b"\r\n", b"\n\n", b" \t\n", "\u2028\n".encode(), b"\x1f\n", b"\x00\n", b"\x0b\x0c"]
    return rng.choice([line + rng.choice(blank) + line, line + line, line + b"\r\n", b"\r" + line])


def nest(row: bytes, rng: random.Random) -> bytes:
    """Brackets in brackets, around the row or in a field; a number of many digits."""
    depth = rng.choice([1, 3, 30, 31, 32, 40, 5_000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    deep = opening * depth + b"1" + closing * depth
    deep = rng.choice([deep, opening * depth, b"1" * 5_000, b"-" + b"9" * 4_000, b"1e999"])
    key = rng.choice([b"chosen", b"rejected", b"id", b"margin", b"extra"])
    added = b'{"%s": %s, ' % (key, deep) + row.lstrip(b" {")
    appended = row.rstrip(b"\n }") + b', "%s": %s}\n' % (key, deep)
    return rng.choice([opening * depth + row + closing * depth, added, appended, deep])


# --- of fields ----------------------------------------------------------------------------------


def edit(change: Callable[[dict, str, random.Random], object]) -> Callable:
    """A mutation of a row's object, one of its texts being chosen; other rows it leaves alone."""

    def mutate(row: bytes, rng: random.Random) -> bytes:
        try:
            fields = json.loads(row.decode())
        except (ValueError, RecursionError):
            return row
        if slow_reader.fault_of_fields(fields):
            return row
        change(fields, rng.choice(["chosen", "rejected"]), rng)
        return json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")

    return mutate


@edit
def wrong_type(row: dict, side: str, rng: random.Random) -> None:
    """A field of another type, a further field, or one less."""
    key = rng.choice([side, "id", "margin", "extra"])
    if rng.random() < 0.3:
        row.pop(side)
    else:
        row[key] = rng.choice(VALUES)


@edit
def huge(row: dict, side: str, rng: random.Random) -> None:
    """A text about as long as is allowed, or far too long."""
    key = rng.choice([side, "id", "extra"])
    length = rng.choice([990_000, 1_000_001, 5_000_000])
    row[key] = str(row.get(key, "")) + rng.choice("x\u20ac") * length


@edit
def half_a_character(row: dict, side: str, rng: random.Random) -> None:
    """Half a surrogate pair, in a text, an id, or where nobody looks."""
    key = rng.choice([side, "id", "extra", "\udfff"])
    row[key] = str(row.get(key, "")) + rng.choice(["\ud83d", "\udc00"])


@edit
def turn(row: dict, side: str, rng: random.Random) -> None:
    """A further turn somewhere, one less, or an answer that is empty."""
    text = row[side]
    tags = [m.start() for m in re.finditer(f"{H}|{A}", text)] or [0]
    place = rng.choice(tags)
    end = min([t for t in tags if t > place], default=len(text))
    new = rng.choice(TURNS)
    choices = [text + new, text[:place] + new + text[place:], text[:place] + text[end:]]
    choices += [text[:place], new + text, text[: text.rfind(":") + 1], text.replace(H, A, 1)]
    row[side] = rng.choice(choices)


@edit
def both_sides(row: dict, side: str, rng: random.Random) -> None:
    """The same answer twice, another question, or a tag changed in both."""
    tag = rng.choice([H, A])
    new = rng.choice(TURNS + ["", "\nHuman:", "\n\n Assistant:", "\u2028\u2028Human:"])
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    row.update(rng.choice([
        {other: row[side]},
        {other: row[side] + " \n"},
        {side: row[side].replace(tag, f"{tag} another", 1)},
        {key: row[key].replace(tag, new, 1) for key in (side, other)},
        {key: row[key] + new for key in (side, other)},
    ]))  # fmt: skip


@edit
def white_space(row: dict, side: str, rng: random.Random) -> None:
    """White space of many kinds around a tag or a text."""
    space = rng.choice([*" \n\t\xa0\u2028\x1f\ufeff\x00\u200b", "\r\n"])
    tag = rng.choice([H, A])
    new = rng.choice([tag + space, space + tag, f"\n{space}\n{tag[2:]}"])
    row[side] = rng.choice([row[side].replace(tag, new), space + row[side], row[side] + space])


def repeat_key(row: bytes, rng: random.Random) -> bytes:
    """A key twice: Python's reader takes the later one."""
    key, value = rng.choice(["chosen", "rejected", "id"]), json.dumps(rng.choice([1, "a", None]))
    pair = f'"{key}": {value}'.encode()
    ends = row.lstrip(b" {"), row.rstrip(b"\n }")
    return rng.choice([b"{" + pair + b", " + ends[0], ends[1] + b", " + pair + b"}\n"])


MUTATIONS = [flip_bytes, truncate, insert_bytes, break_lines, nest, repeat_key, wrong_type]
MUTATIONS += [half_a_character, white_space, *[turn, both_sides] * 3]
HUGE = 0.01  # share of rows that are made huge as well: these take long


def mutants(count: int, seed: int) -> list[bytes]:
    """`count` rows with one to three mutations each."""
    rng, rows = random.Random(seed), seeds()
    return [mutant(rng.choice(rows), rng) for _ in range(count)]


def mutant(row: bytes, rng: random.Random) -> bytes:
    """One row, mutated."""
    steps = [rng.choice(MUTATIONS) for _ in range(rng.choice([1, 1, 2, 3]))]
    for step in [huge] * (rng.random() < HUGE) + steps:
        row = step(row, rng)
    return row


# --- comparing ----------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What came of reading mutated rows with both readers, and with both values of `on_error`."""

    rows: int = 0
    kinds: Counter = field(default_factory=Counter)  # by the slow reader; None where accepted
    disagreements: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds of CPU time for one row, read twice


def compare(rows: list[bytes], folder: Path, progress=iter) -> Comparison:
    """Reads every row from a file of its own, then all of them from one, with both readers."""
    result = Comparison()
    for number, row in enumerate(progress(rows)):
        path, content = folder / "row.jsonl", row.rstrip(b"\n") + b"\n" + GOOD + b"\n"
        path.write_bytes(content)
        expected = slow_reader.read(content, path.name)
        start = time.process_time()
        got = outcomes(path)
        result.slowest = max(result.slowest, time.process_time() - start)
        result.rows += 1
        result.kinds.update(kind for _, kind, _ in expected[:-1])
        if got != wanted(expected, path.name):
            result.disagreements.append(f"row {number}: {row[:200]!r}")
    path, content = folder / "all.jsonl", b"\n".join([b"", *rows, GOOD])
    path.write_bytes(content)
    if outcomes(path) != wanted(slow_reader.read(content, path.name), path.name):
        result.disagreements.append("all rows in one file")
    return result


def outcomes(path: Path) -> tuple:
    """(pairs, number of each kind, place and kind that "raise" stops at) by the package."""
    data, report = load_preferences(path, on_error="skip")
    pairs = [{"margin": None, **pair} for pair in data]
    counts = {kind: n for kind, n in report.refused.items() if n}
    try:
        strict, _ = load_preferences(path, on_error="raise")
    except BadPair as fault:
        place = str(fault).split(": ")[0]
        return pairs, counts, (place, fault.reason)
    return pairs, counts, None if strict.to_list() == data.to_list() else "other rows"


def wanted(rows: list[tuple], name: str) -> tuple:
    """The same from what the slow reader found."""
    pairs = [pair for _, kind, pair in rows if kind is None]
    bad = [(f"{name}, row {number}", kind) for number, kind, _ in rows if kind]
    return pairs, dict(Counter(kind for _, kind in bad)), bad[0] if bad else None
