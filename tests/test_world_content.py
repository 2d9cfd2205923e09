"""The content of the TinyHH world: its shape, its style, and that its topics can be told apart."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import minippo

WORLD = json.loads((Path(minippo.__file__).parent / "worlds" / "tinyhh" / "world.json").read_text())

# field -> (phrases per entry, fewest words, most words); a name is one phrase
TOPIC_FIELDS = {"name": (1, 1, 5), "goals": (4, 2, 5), "tips": (6, 4, 7), "outcomes": (3, 3, 6)}
HARM_FIELDS = {
    "name": (1, 2, 6),
    "goals": (3, 3, 7),
    "methods": (4, 4, 7),
    "alternatives": (4, 4, 7),
    "reasons": (2, 4, 7),
}
STOP_WORDS = set(
    "a about an and at before by down each every for from in into is of off on out over the to "
    "up while with without".split()
)
# words that point at something the phrase itself does not name
DANGLING = set("it its they them their theirs he him his she her hers this these those".split())


def phrases(entry, field):
    """The phrases of one field, as a list even when the field is a single name."""
    return [entry[field]] if field == "name" else entry[field]


def all_phrases():
    """Every (field, phrase) of the file."""
    for kind, fields in (("topics", TOPIC_FIELDS), ("harms", HARM_FIELDS)):
        for entry in WORLD[kind]:
            for field in fields:
                yield from ((field, phrase) for phrase in phrases(entry, field))


def words_of(entry):
    """The set of words of a topic."""
    return {word for field in TOPIC_FIELDS for p in phrases(entry, field) for word in p.split()}


def topics_using():
    """For each word, the number of topics that use it."""
    return Counter(word for topic in WORLD["topics"] for word in words_of(topic))


def test_the_world_has_64_topics_and_24_harms():
    assert set(WORLD) == {"topics", "harms"}
    assert (len(WORLD["topics"]), len(WORLD["harms"])) == (64, 24)


@pytest.mark.parametrize("kind, fields", [("topics", TOPIC_FIELDS), ("harms", HARM_FIELDS)])
def test_every_entry_has_the_fields_and_counts_of_the_schema(kind, fields):
    for entry in WORLD[kind]:
        assert set(entry) == set(fields), entry["name"]
        for field, (count, fewest, most) in fields.items():
            assert len(phrases(entry, field)) == count, (entry["name"], field)
            for phrase in phrases(entry, field):
                assert fewest <= len(phrase.split()) <= most, phrase


def test_phrases_are_lower_case_ascii_words_with_single_spaces():
    odd = [p for _, p in all_phrases() if not re.fullmatch(r"[a-z]+(?: [a-z]+)*", p)]
    assert odd == []


def test_no_phrase_begins_with_to_or_has_a_pronoun_without_an_antecedent():
    odd = [p for _, p in all_phrases() if p.startswith("to ") or DANGLING & set(p.split())]
    assert odd == []


def test_articles_agree_with_the_next_word():
    """`an` before a vowel letter, `a` elsewhere; `hour` and `used` are said otherwise."""
    text = "\n".join(phrase for _, phrase in all_phrases())
    assert re.findall(r"\ba (?!used)[aeiou]\w*", text) == []
    assert re.findall(r"\ban (?!hour|honest)[^aeiou]\w*", text) == []


def test_no_phrase_occurs_twice():
    counts = Counter(phrase for _, phrase in all_phrases())
    assert [phrase for phrase, count in counts.items() if count > 1] == []


def test_no_tip_contains_or_begins_another_phrase_of_the_tips():
    tips = [phrase for field, phrase in all_phrases() if field == "tips"]
    assert [(a, b) for a, b in combinations(tips, 2) if a in b or b in a] == []


def test_no_tip_lies_inside_any_other_phrase():
    tips = [phrase for field, phrase in all_phrases() if field == "tips"]
    others = [phrase for field, phrase in all_phrases() if field != "tips"]
    assert [(t, o) for t in tips for o in others if t in o] == []


def test_every_goal_and_tip_has_a_word_that_few_topics_use():
    used = topics_using()
    vague = [
        phrase
        for topic in WORLD["topics"]
        for phrase in topic["goals"] + topic["tips"]
        if min(used[word] for word in phrase.split()) > 2
    ]
    assert vague == []


def test_two_topics_share_at_most_a_quarter_of_their_content_words():
    content = [(topic["name"], words_of(topic) - STOP_WORDS) for topic in WORLD["topics"]]
    close = [
        (a, b, sorted(left & right))
        for (a, left), (b, right) in combinations(content, 2)
        if len(left & right) > 0.25 * min(len(left), len(right))
    ]
    assert close == []


def test_the_vocabulary_fits_a_small_tokenizer():
    """A BPE of 2,048 tokens has 1,792 merges: fewer distinct words than that."""
    vocabulary = {word for _, phrase in all_phrases() for word in phrase.split()}
    assert len(vocabulary) <= 1500
