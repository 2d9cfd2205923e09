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


HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
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


def _reasons(text, tag=r"\n\n(Human|Assistant):"):
    """All that is wrong with a dialogue, in the order of the table."""
    leading, *parts = re.split(tag, text)
    roles, texts = parts[::2], [part.strip() for part in parts[1::2]]
    found = {
        "leading_text": leading.strip(),
        "no_assistant_turn": "Assistant" not in roles,
        "not_alternating": "Assistant" in roles[::2] or "Human" in roles[1::2],
        "ends_with_human": roles[-1:] == ["Human"],
        "empty_turn": "" in texts[:-1],
        "empty_answer": texts[-1:] == [""],
    }
    return [reason for reason, applies in found.items() if applies]


def _needs_a_space(row):
    """Only tags with a space after them are seen."""
    for side in ("chosen", "rejected"):
        if reasons := _reasons(row[side], r"\n\n(Human|Assistant): "):
            raise BadPair(reasons[0], "")
    return _checked(row)


def _last_reason(row):
    """Of several reasons the last one of the table."""
    for side in ("chosen", "rejected"):
        if reasons := _reasons(row[side]):
            raise BadPair(reasons[-1], "")
    return _checked(row)


def _answers_compared_first(row):
    sides = [parse_dialogue(row[side]) for side in ("chosen", "rejected")]
    if sides[0][-1] == sides[1][-1]:
        raise BadPair("identical_answers", "")
    return _checked(row)


def _accepts_empty(row):
    try:
        return _checked(row)
    except BadPair as fault:
        if fault.reason != "empty_answer":
            raise
    return _put_together(*_texts(row), row)


def _changed(change):
    """The right pair with something of it changed; change(pair, row) gives what is new."""

    def wrong(row):
        pair = _checked(row)
        return pair | change(pair, row)

    return wrong


def _without_margin(row):
    pair = _checked(row)
    pair.pop("margin", None)
    return pair


def _without_a_margin_of_0(row):
    return _checked(row) if row.get("margin") else _without_margin(row)


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
        Case(
            _row(f"{START} yes", f"{START} no", margin=0.0),
            _pair("hi", "yes", "no", margin=0.0),
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
        _refused("not_alternating", f"{START} yes", f"{HUMAN}ho{START} no"),
        _refused("empty_turn", f"{HUMAN}{ASSISTANT}yes", f"{HUMAN}{ASSISTANT}no"),
        # two reasons each: the first of the table counts
        _refused("leading_text", f"well{HUMAN}hi", f"{START} no"),
        _refused("no_assistant_turn", f"{HUMAN}hi{HUMAN}ho", f"{START} no"),
        _refused("not_alternating", f"{HUMAN}hi{LONGER} so{HUMAN}bye", f"{START} no"),
        _refused("ends_with_human", f"{HUMAN}{ASSISTANT}yes{HUMAN}bye", f"{START} no"),
        _refused("empty_turn", f"{HUMAN}{ASSISTANT}", f"{START} no"),
        _refused("empty_answer", f"{HUMAN}ho{ASSISTANT}", f"{START} no"),
        _refused("diverging_history", f"{START} yes", f"{HUMAN}ho{ASSISTANT}yes"),
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
            _changed(
                lambda pair, row: {
                    "instruction": row["chosen"].rpartition("\n\nAssistant:")[0].strip()
                }
            ),
        ),
        Mistake(
            "a line that begins with Human: was taken for a tag: a tag has a blank line before it",
            _split_by(r"\n+(Human|Assistant):"),
        ),
        Mistake("the white space around the texts is still there", _unstripped),
        Mistake(
            "a tag without a space after it is not seen: the tag ends at the colon, and a space "
            "belongs to the text",
            _needs_a_space,
        ),
        Mistake("an empty answer is accepted", _accepts_empty),
        Mistake(
            "of two reasons that apply to a row the later one is given: the first in the table "
            "counts",
            _last_reason,
        ),
        Mistake(
            "the answers are compared before what stands ahead of them: where both the histories "
            "differ and the answers do not, the reason is diverging_history",
            _answers_compared_first,
        ),
        Mistake("the margin of the row is lost", _without_margin),
        Mistake(
            "a margin of 0 is lost: 0 counts as false in an if, so ask whether it is None",
            _without_a_margin_of_0,
        ),
        Mistake(
            "the margin is handed on as it stands in the row: the pair has it as a float",
            _changed(lambda pair, row: {"margin": row["margin"]} if "margin" in pair else {}),
        ),
        Mistake(
            "the turns of the history are tuples: each is a list, [query, response]",
            _changed(lambda pair, row: {"history": [tuple(turn) for turn in pair["history"]]}),
        ),
    ),
)
