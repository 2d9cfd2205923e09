"""A second reader of HH-RLHF files, written from the description of the format and not from hh.py.

It is slow on purpose: the JSON parser is the one in Python of the standard library, a dialogue is
walked line by line by a finite state machine. The fast reader uses the one in C, and a regular
expression. It gives the kind of refusal, or the pair, of every row of a file.
"""

import json
import math
from json.decoder import py_scanstring
from json.scanner import py_make_scanner

ORDER = """not_json too_large missing_key not_text leading_text no_assistant_turn not_alternating
ends_with_human empty_turn empty_answer diverging_history identical_answers""".split()
ROW, LINE = 1_000_000, 4_000_000  # characters of all fields, bytes of a line with its line feed
LEVELS = 32  # of lists and objects in one another, the row itself counted
HALVES = {chr(code) for code in range(0xD800, 0xE000)}  # halves of a character


def read(content: bytes, name: str) -> list[tuple[int, str | None, dict | None]]:
    """(line number, kind or None, pair or None) of every row of a .jsonl file."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    feeds = [1] * (len(lines) - 1) + [0]
    rows = zip(range(1, len(lines) + 1), lines, feeds)
    is_row = [bool(line.decode(errors="replace").strip()) for line in lines]
    return [(n, *outcome(line, f, f"{name}:{n}")) for n, line, f in rows if is_row[n - 1]]


def outcome(line: bytes, feed: int, place: str) -> tuple[str | None, dict | None]:
    """The first kind that applies to a line, or the pair in it."""
    if len(line) + feed > LINE:
        return "too_large", None
    try:
        row = parse_json(line.decode("utf-8"))
        if levels(row) > LEVELS:
            return "not_json", None
    except (ValueError, RecursionError):
        return "not_json", None
    kind = fault_of_fields(row)
    if kind:
        return kind, None
    (kind, *chosen), (other, *rejected) = walk(row["chosen"]), walk(row["rejected"])
    if kind or other:
        return min((k for k in (kind, other) if k), key=ORDER.index), None
    if chosen[0] != rejected[0]:
        return "diverging_history", None
    if chosen == rejected:
        return "identical_answers", None
    return None, pair_of(row, chosen, rejected, place)


def parse_json(text: str):
    """What `json.loads` gives, by the parts of it that are written in Python."""
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark that is not the file's")
    decoder = json.JSONDecoder()
    decoder.parse_string = py_scanstring
    decoder.scan_once = py_make_scanner(decoder)
    return decoder.decode(text)


def levels(value) -> int:
    """How many lists and objects are in one another, at the deepest place."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(levels, value.values() if isinstance(value, dict) else value), default=0)


def fault_of_fields(row) -> str | None:
    """What is wrong with a row before its texts are looked into."""
    values = list(row.values()) if isinstance(row, dict) else [row]
    if sum(len(v) if isinstance(v, str) else len(str(v)) for v in values) > ROW:
        return "too_large"
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= set(row):
        return "missing_key"
    texts = [row["chosen"], row["rejected"]]
    texts += [row["id"]] if isinstance(row.get("id"), str) else []
    if not all(isinstance(text, str) and HALVES.isdisjoint(text) for text in texts):
        return "not_text"
    margin = row.get("margin")
    return None if margin is None or is_finite(margin) else "not_text"


def is_finite(margin) -> bool:
    """Whether a margin is a number that a float can hold."""
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        return False
    try:
        return math.isfinite(float(margin))
    except OverflowError:
        return False


def walk(dialogue: str) -> tuple[str, list[str], str]:
    """A finite state machine over lines: (kind or "", the turns before the last, the last turn)."""
    turns, state, fault = [], "start", ""
    lines = dialogue.split("\n")
    for i, line in enumerate(lines):
        # a tag stands at a line's begin, after an empty line that is not the text's first line end
        blank_before = i >= 2 and lines[i - 1] == ""
        role = next((r for r in ("Human", "Assistant") if line.startswith(r + ":")), None)
        if blank_before and role:
            if role == state or (state == "start" and role == "Assistant"):
                fault = "not_alternating"
            state = role
            turns.append([role, [line[len(role) + 1 :]]])
        elif turns:
            turns[-1][1].append(line)
        elif line.strip():
            return "leading_text", [], ""
    if all(role == "Human" for role, _ in turns):
        return "no_assistant_turn", [], ""
    texts = ["\n".join(said).strip() for _, said in turns]
    fault = fault or ("ends_with_human" if state == "Human" else "")
    fault = fault or ("empty_turn" if not all(texts[:-1]) else "")
    return fault or ("" if texts[-1] else "empty_answer"), texts[:-1], texts[-1]


def pair_of(row: dict, chosen: list, rejected: list, place: str) -> dict:
    """The row that is handed out."""
    *before, question = chosen[0]
    history = [[before[i], before[i + 1]] for i in range(0, len(before), 2)]
    name = place if row.get("id") is None else str(row["id"])
    margin = None if row.get("margin") is None else float(row["margin"])
    answers = {"chosen": chosen[1], "rejected": rejected[1]}
    return {"id": name, "instruction": question, **answers, "history": history, "margin": margin}
