"""The check of `parse_pair`: a row of HH-RLHF taken apart, and rows that are no pair."""

import re

from minippo.checks.checking import Case, Check, Mistake
from minippo.hh import BadPair, parse_dialogue


def _row(chosen, rejected, **more):
    return dict(row=dict(chosen=chosen, rejected=rejected, **more))


def _pair(instruction, chosen, rejected, history=(), **more):
    turns = [list(turn) for turn in history]
    return dict(instruction=instruction, chosen=chosen, rejected=rejected, history=turns, **more)


def _refused(kind, chosen, rejected):
    return Case(_row(chosen, rejected), BadPair(kind, ""), edge=True)


START = "\n\nHuman: hi\n\nAssistant:"
LONGER = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"


def _put_together(chosen, rejected, row, swap=False, history=True, strip=True):
    """A pair from the texts of two dialogues, human and assistant in turn."""
    texts = [[text.strip() if strip else text for text in side] for side in (chosen, rejected)]
    *earlier, instruction, answer = texts[0]
    other = texts[1][-1]
    turns = list(zip(earlier[::2], earlier[1::2], strict=False)) if history else []
    pair = _pair(instruction, *((other, answer) if swap else (answer, other)), turns)
    return pair if row.get("margin") is None else pair | {"margin": float(row["margin"])}


def _checked(row, diverging=True, identical=True, **options):
    """minippo's steps with some left out."""
    sides = [[text for _, text in parse_dialogue(row[side])] for side in ("chosen", "rejected")]
    if diverging and sides[0][:-1] != sides[1][:-1]:
        raise BadPair("diverging_history", "")
    if identical and sides[0] == sides[1]:
        raise BadPair("identical_answers", "")
    return _put_together(*sides, row, **options)


def _split_by(pattern, **options):
    """A parser that cuts at a pattern, and is otherwise right."""

    def wrong(row):
        sides = {side: re.sub(pattern, r"\n\n\1:", row[side]) for side in ("chosen", "rejected")}
        return _checked(row | sides, **options)

    return wrong


def _texts(row):
    """The texts of both sides as they stand between the tags."""
    tag = r"\n\n(?:Human|Assistant):"
    return [re.split(tag, row[side])[1:] for side in ("chosen", "rejected")]


def _unstripped(row):
    _checked(row)
    return _put_together(*_texts(row), row, strip=False)


def _first_answer(row):
    """The answer begins at the first Assistant tag, and all the rest belongs to it."""
    _checked(row)
    texts = [row[side].partition("\n\nAssistant:") for side in ("chosen", "rejected")]
    question = texts[0][0].removeprefix("\n\nHuman:").strip()
    return _pair(question, texts[0][2].strip(), texts[1][2].strip())


def _first_exchange(row):
    pair = _checked(row)
    instruction, answer, *later = [text.strip() for text in _texts(row)[0]]
    history = [list(turn) for turn in zip(later[::2], later[1::2], strict=True)]
    return pair | dict(instruction=instruction, chosen=answer, history=history)


def _needs_a_space(row):
    """Only tags with a space after them are seen."""
    for side in ("chosen", "rejected"):
        if row[side].endswith("Assistant:"):
            raise BadPair("ends_with_human", "")
    return _checked(row)


def _accepts_empty(row):
    try:
        return _checked(row)
    except BadPair as fault:
        if fault.reason != "empty_answer":
            raise
    return _put_together(*_texts(row), row)


def _without_margin(row):
    pair = _checked(row)
    pair.pop("margin", None)
    return pair


def _instruction_with_history(row):
    pair = _checked(row)
    return pair | {"instruction": row["chosen"].rpartition("\n\nAssistant:")[0].strip()}


check_parse_pair = Check(
    name="parse_pair",
    module="hh",
    cases=(
        Case(_row(f"{START} yes", f"{START} no"), _pair("hi", "yes", "no")),
        Case(_row(f"{START} yes\nand so on ", f"{START}no"), _pair("hi", "yes\nand so on", "no")),
        Case(
            _row(f"{START} yes", f"{START} no", margin=2),
            _pair("hi", "yes", "no", margin=2.0),
            edge=True,
        ),
        Case(  # a tag begins after a blank line; this is text
            _row(f"{START} say\nHuman: ok", f"{START} no"), _pair("hi", "say\nHuman: ok", "no")
        ),
        Case(_row(f"{LONGER} so", f"{LONGER} no"), _pair("why?", "so", "no", [("hi", "hello")])),
        _refused("identical_answers", f"{START} yes", f"{START} yes"),
        _refused("empty_answer", f"{START} yes", START),
        _refused("diverging_history", f"{START} yes", "\n\nHuman: ho\n\nAssistant: no"),
        _refused("diverging_history", f"{LONGER} so", f"{LONGER.replace('hello', 'ho')} no"),
        _refused("no_assistant_turn", f"{START} yes", "\n\nHuman: hi"),
        _refused("ends_with_human", f"{START} yes", f"{START} no\n\nHuman: bye"),
        _refused("leading_text", f"{START} yes", f"well{START} no"),
    ),
    outputs=("pair",),
    mistakes=(
        Mistake(
            "the answer begins at the first Assistant tag: it is what follows the last one",
            _first_answer,
        ),
        Mistake(
            "the first question and answer were taken for the last ones",
            _first_exchange,
        ),
        Mistake(
            "the two histories are not compared: some pairs differ before their last answer, and "
            "these answer different questions",
            lambda row: _checked(row, diverging=False),
        ),
        Mistake(
            "two equal answers are accepted: there is nothing to prefer",
            lambda row: _checked(row, identical=False),
        ),
        Mistake("chosen and rejected have changed places", lambda row: _checked(row, swap=True)),
        Mistake("the earlier turns are lost", lambda row: _checked(row, history=False)),
        Mistake(
            "the instruction is the whole dialogue so far: it is the last human turn alone",
            _instruction_with_history,
        ),
        Mistake(
            "a line that begins with Human: was taken for a tag: a tag has a blank line before it",
            _split_by(r"\n+(Human|Assistant):"),
        ),
        Mistake("the white space around the texts is still there", _unstripped),
        Mistake(
            "a tag without a space after it is not seen: an empty answer ends in `Assistant:`",
            _needs_a_space,
        ),
        Mistake("an empty answer is accepted", _accepts_empty),
        Mistake("the margin of the row is lost", _without_margin),
    ),
)
