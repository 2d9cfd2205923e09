"""Padding by hand, round trips through the tokenizer, length limits, and the batches of a seed."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from minippo import batching
from minippo.batching import (
    batch_plan,
    check_context,
    decode_response,
    encode_prompt,
    encode_response,
    encode_rows,
    epoch_batches,
    left_pad,
    right_pad,
)
from minippo.models import tiny_gpt2
from minippo.pretrain import EOS, PAD, encode_texts, train_tokenizer

TEXTS = [
    "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour, water and yeast.",
    "\n\nHuman: Who are you?\n\nAssistant: I am a small model.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def row(instruction="Who are you?", history=(), **answers):
    return {"instruction": instruction, "history": list(history), **answers}


# --- padding ----------------------------------------------------------------------------------


def test_left_pad_by_hand():
    ids, mask = left_pad([[5, 6, 7], [8], [9, 4]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    assert ids.dtype == torch.long and mask.dtype == torch.bool


def test_right_pad_by_hand():
    ids, mask = right_pad([[5, 6, 7], [8], [9, 4]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 4, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert ids.dtype == torch.long and mask.dtype == torch.bool


@pytest.mark.parametrize("pad, side", [(left_pad, "left"), (right_pad, "right")])
def test_masks_come_from_lengths_where_pad_is_a_real_token(pad, side):
    rows = [[2, 2, 2, 2], [2], [7, 2]]  # every token may be the padding token
    ids, mask = pad(rows, 2)
    assert mask.sum(1).tolist() == [4, 1, 2]
    for tokens, padded, counts in zip(rows, ids, mask, strict=True):
        assert padded[counts].tolist() == tokens
        assert bool(counts[-1 if side == "left" else 0])


def test_padding_does_not_change_the_rows_it_is_given():
    rows = [[1, 2, 3], [4]]
    left_pad(rows, 0), right_pad(rows, 0)
    assert rows == [[1, 2, 3], [4]]


# --- text and tokens --------------------------------------------------------------------------


def test_special_tokens_have_the_documented_ids(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.convert_ids_to_tokens([0, 1]) == [PAD, EOS]


def test_a_prompt_is_the_dialogue_up_to_the_tag_and_a_response_begins_with_a_space(tokenizer):
    prompt = encode_prompt(tokenizer, "Why?", [["Who?", "Me."]])
    text = "\n\nHuman: Who?\n\nAssistant: Me.\n\nHuman: Why?\n\nAssistant:"
    assert tokenizer.decode(prompt) == text
    response = encode_response(tokenizer, "Because.")
    assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(response[:-1]) == " Because."


@pytest.mark.parametrize(
    "answer",
    [
        "I am a small model.",
        "Na\u00efve caf\u00e9, \u6f22\u5b57, \U0001f35e and \u0645\u0631\u062d\u0628\u0627!",
        "spaces , before . punctuation ! and  two",
        "a tab\tand a\n\nblank line, no tag",
        "don't  'm  n't  <|not special|>",
        "",
    ],
)
def test_any_stripped_answer_survives_encoding_and_decoding(tokenizer, answer):
    ids = encode_response(tokenizer, answer)
    assert decode_response(tokenizer, ids) == answer
    assert decode_response(tokenizer, torch.tensor(ids)) == answer
    assert decode_response(tokenizer, ids + [tokenizer.pad_token_id] * 3) == answer


def test_white_space_around_an_answer_is_taken_off_and_nothing_else(tokenizer):
    assert decode_response(tokenizer, encode_response(tokenizer, "   two  words ")) == "two  words"


@pytest.fixture(scope="module")
def bos_tokenizer():
    """One that puts a BOS before every text and an EOS after it, as some of the Llama family."""
    from tokenizers import processors

    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {EOS}", special_tokens=[("<s>", first), (EOS, last)]
    )
    assert tokenizer.encode("")[0] == first == len(tokenizer) - 1
    return tokenizer


def test_a_prompt_begins_with_bos_where_the_tokenizer_puts_one(tokenizer, bos_tokenizer):
    plain, first = encode_prompt(tokenizer, "Why?"), bos_tokenizer.bos_token_id
    assert encode_prompt(bos_tokenizer, "Why?") == [first, *plain]
    assert encode_response(bos_tokenizer, "So.") == encode_response(tokenizer, "So.")
    assert decode_response(bos_tokenizer, encode_response(bos_tokenizer, "So.")) == "So."
    (sequence,), _ = encode_texts(bos_tokenizer, ["yes"], 10)
    assert (sequence[0], sequence[-1]) == (first, bos_tokenizer.eos_token_id)
    assert sequence.count(first) == sequence.count(sequence[-1]) == 1


def test_a_bos_counts_as_a_token_of_the_prompt(bos_tokenizer):
    count = len(encode_prompt(bos_tokenizer, "Who are you?"))
    (kept,), _ = encode_rows([row()], bos_tokenizer, count, 1)
    assert kept.prompt[0] == bos_tokenizer.bos_token_id
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        encode_rows([row()], bos_tokenizer, count - 1, 1)


def test_decoding_stops_at_the_first_eos(tokenizer):
    ids = encode_response(tokenizer, "yes") + encode_response(tokenizer, "no")
    assert decode_response(tokenizer, ids) == "yes"


def test_an_answer_without_eos_loses_its_padding_only(tokenizer):
    ids = encode_response(tokenizer, "yes")[:-1] + [tokenizer.pad_token_id] * 2
    assert decode_response(tokenizer, ids) == "yes"


def test_padding_in_the_middle_of_an_answer_stays_visible(tokenizer):
    yes, no = (encode_response(tokenizer, text)[:-1] for text in ("yes", "no"))
    assert PAD in decode_response(tokenizer, [*yes, tokenizer.pad_token_id, *no])


def test_an_answer_that_spells_the_eos_token_ends_at_its_end_only(tokenizer):
    ids = encode_response(tokenizer, f"write {EOS} to stop")
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_a_saved_tokenizer_encodes_and_decodes_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again, text = AutoTokenizer.from_pretrained(tmp_path), "spaces , here . caf\u00e9 don't"
    ids = encode_response(tokenizer, text)
    assert encode_response(again, text) == ids and decode_response(again, ids) == text


# --- length limits ----------------------------------------------------------------------------


def test_rows_that_are_too_long_are_dropped_and_counted(tokenizer):
    rows = [row(a="yes"), row("long " * 60, a="yes"), row(a="long " * 60), row(a="no")]
    kept, dropped = encode_rows(rows, tokenizer, 60, 20, ("a",))
    assert [e.row for e in kept] == [0, 3] and dropped == 2
    assert [decode_response(tokenizer, e.responses[0]) for e in kept] == ["yes", "no"]


def test_a_limit_is_kept_to_the_token(tokenizer):
    prompt = len(encode_prompt(tokenizer, "Who are you?"))
    response = len(encode_response(tokenizer, "I am a small model."))
    rows = [row(a="I am a small model.")]
    assert len(encode_rows(rows, tokenizer, prompt, response, ("a",))[0]) == 1
    for limits in ((prompt - 1, response), (prompt, response - 1)):
        with pytest.raises(ValueError, match="max_prompt_tokens.*max_response_tokens"):
            encode_rows(rows, tokenizer, *limits, ("a",))


def test_one_answer_that_is_too_long_drops_the_whole_row(tokenizer):
    rows = [row(c=["yes", "long " * 60]), row(c=["yes", "no"])]
    kept, dropped = encode_rows(rows, tokenizer, 60, 20, ("c",))
    assert [e.row for e in kept] == [1] and dropped == 1


def test_answers_come_in_the_order_of_their_columns(tokenizer):
    rows = [row(chosen="good", rejected="bad", c=["one", "two", "three"])]
    (pair,), _ = encode_rows(rows, tokenizer, 60, 20, ("chosen", "rejected"))
    (ranked,), _ = encode_rows(rows, tokenizer, 60, 20, ("c",))
    (alone,), _ = encode_rows(rows, tokenizer, 60, 20)
    texts = [[decode_response(tokenizer, r) for r in e.responses] for e in (pair, ranked, alone)]
    assert texts == [["good", "bad"], ["one", "two", "three"], []]


def test_texts_get_an_eos_and_those_beyond_the_context_are_dropped_and_counted(tokenizer):
    sequences, dropped = encode_texts(tokenizer, ["yes", "long " * 60, "no"], 10)
    assert dropped == 1 and all(ids[-1] == tokenizer.eos_token_id for ids in sequences)
    assert [tokenizer.decode(ids[:-1]) for ids in sequences] == ["yes", "no"]
    with pytest.raises(ValueError, match="context"):
        encode_texts(tokenizer, ["long " * 60], 10)


def test_a_text_that_spells_the_eos_token_ends_at_its_end_only(tokenizer):
    text = f"before {EOS} and {PAD} after"
    (sequence,), _ = encode_texts(tokenizer, [text], 99)
    assert sequence.index(tokenizer.eos_token_id) == len(sequence) - 1
    assert tokenizer.pad_token_id not in sequence
    assert tokenizer.decode(sequence[:-1]) == text


def test_prompt_and_response_must_fit_the_context_together():
    model = tiny_gpt2(20, n_layer=1, n_embd=8, n_head=2, n_positions=32)
    check_context(model, 20, 12)
    with pytest.raises(ValueError, match="33.*32"):
        check_context(model, 20, 13)
    check_context(model, 32)  # a row as a whole
    with pytest.raises(ValueError, match="33.*32.*GPT2LMHeadModel.*max_prompt_tokens"):
        check_context(model, 33)
    check_context(lambda *args: None, 10_000)  # a rule has no context
    check_context(SimpleNamespace(config=SimpleNamespace()), 10_000, 10_000)  # no limit is known


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count, size", [(64, 8), (65, 8), (7, 8), (200, 3), (1, 1), (300, 16)])
def test_an_epoch_has_every_index_at_most_once_and_drops_less_than_a_batch(count, size):
    lengths = [(i * 7) % 23 + 1 for i in range(count)]
    batches = epoch_batches(lengths, size, seed=1, epoch=2)
    seen = [i for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(count))
    if count < size:
        assert sorted(seen) == list(range(count))
    else:
        assert len(batches) == count // size and all(len(batch) == size for batch in batches)


def test_batches_depend_on_seed_and_epoch_alone():
    lengths = [(i * 7) % 23 + 1 for i in range(100)]
    first = epoch_batches(lengths, 8, 0, 0)
    assert first == epoch_batches(lengths, 8, 0, 0)
    assert first != epoch_batches(lengths, 8, 0, 1) and first != epoch_batches(lengths, 8, 1, 0)


def test_rows_of_similar_length_share_a_batch():
    lengths = [(i * 37) % 101 + 1 for i in range(512)]
    batches = epoch_batches(lengths, 8, 0, 0)
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches)
    # Eight uniform lengths of 1..101 span 100 * 7/9 = 78 on average; sorted ones about 6.
    assert spread / len(batches) < 20


def test_the_longest_row_is_not_dropped_in_every_epoch():
    lengths = list(range(1, 21))  # 20 rows, batches of 8: 4 rows are left over in each epoch
    seen = Counter(i for e in range(200) for b in epoch_batches(lengths, 8, 0, e) for i in b)
    # Without a bias a row is in 80% of the epochs: 160 of 200, standard deviation 5.7.
    assert min(seen[i] for i in range(20)) > 160 - 6 * 5.7


def test_the_order_of_batches_is_not_the_order_of_lengths():
    lengths = list(range(1, 129))
    firsts = [max(batch) for batch in epoch_batches(lengths, 8, 0, 0)]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


@pytest.mark.parametrize("count, size, steps", [(20, 8, 9), (8, 8, 3), (5, 8, 4), (33, 4, 16)])
def test_a_plan_has_as_many_batches_as_steps_and_goes_through_the_epochs(count, size, steps):
    lengths = [i % 5 + 1 for i in range(count)]
    plan = batch_plan(lengths, size, steps, seed=3)
    epochs = [b for e in range(steps) for b in epoch_batches(lengths, size, 3, e)]
    assert len(plan) == steps and plan == epochs[:steps]


def test_a_longer_plan_begins_like_a_shorter_one():
    lengths = [i % 5 + 1 for i in range(20)]
    assert batch_plan(lengths, 4, 30, 0)[:7] == batch_plan(lengths, 4, 7, 0)


def test_a_plan_over_no_rows_is_refused(monkeypatch):
    calls, real = [], batching.epoch_batches

    def counting(*args):
        calls.append(args)
        assert len(calls) < 10, "batch_plan goes on for ever when there are no rows"
        return real(*args)

    monkeypatch.setattr(batching, "epoch_batches", counting)
    with pytest.raises(ValueError):
        batch_plan([], 4, 3, 0)
