"""The per-token view: its numbers by hand, its text exactly, its HTML safe and self-sufficient."""

import json
import math
import re

import pytest
import torch

from minippo.pretrain import train_tokenizer
from minippo.rollout import Rollout
from minippo.token_table import COLUMNS, STEPS, TokenTable, colour, readable, xray

TEXTS = ["Hi there.\n\nYou can water the roots <b>now</b> & then."] * 4
PAD, EOS = 0, 1
Q, R = 3, 4


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer; <|pad|> is 0 and <|endoftext|> 1."""
    return train_tokenizer(TEXTS, 300)


def letter(tokenizer, text):
    """The id of a text that is one token."""
    (token,) = tokenizer.encode(text)
    return token


@pytest.fixture
def rollout(tokenizer):
    """Two answers: one of three tokens with EOS and padding, one cut at the limit."""
    a, b, c = (letter(tokenizer, x) for x in "abc")
    tokens = [[PAD, a, b, c, a, EOS, PAD], [a, b, c, a, b, c, a]]
    attention = [[0, 1, 1, 1, 1, 1, 0], [1] * 7]
    mask = torch.tensor(attention)[:, Q:].bool()
    per_token = {
        "logprobs": [[-1.0, -2.0, -0.5, 0], [-1.0, -1.5, -0.25, -3.0]],
        "ref_logprobs": [[-1.5, -1.75, -0.5, 0], [-2.0, -1.5, -0.75, -2.5]],
        "values": [[0.5, 0.25, 1.0, 0], [-0.5, 0.75, 0.125, 0.5]],
        "kl": [[0.125, 0.03125, 0, 0], [0.5, 0, 0.125, 0.125]],  # charged: k2
        "entropy": [[1.0] * 3 + [0], [1.0] * 4],
        "rewards": [[-0.05, 0.025, 2.0, 0], [-0.1, 0, -0.05, -0.95]],
        "advantages": [[1.0, -1.0, 0.5, 0], [-0.5, 0.5, -1.5, 1.25]],
        "returns": [[1.5, 1.75, 2.0, 0], [-1.0, -1.0, -1.0, -0.95]],
    }
    views = {name: torch.tensor(rows) for name, rows in per_token.items()}
    tokens, scores = torch.tensor(tokens), torch.tensor([2.0, -1.0])
    return Rollout(
        tokens=tokens,
        attention_mask=torch.tensor(attention).bool(),
        response=tokens[:, Q:],
        mask=mask,
        raw_scores=scores * 3,
        scores=scores,
        **views,
    )


NOW = torch.tensor([[-0.5, -2.5, -0.4, math.nan], [-2.0, -1.0, -0.2, -4.0]])


def by_hand(rollout, row, now, clip_range, gamma, lam):
    """The numbers of one answer by a plain loop over Python floats, from the last token back."""
    count = int(rollout.mask[row].sum())
    get = {f: getattr(rollout, f)[row].tolist() for f in ("logprobs", "rewards", "values")}
    get["advantages"], now = rollout.advantages[row].tolist(), now[row].tolist()
    lines, later_value, later_gae = [], 0.0, 0.0
    for t in reversed(range(count)):
        delta = get["rewards"][t] + gamma * later_value - get["values"][t]
        later_gae = delta + gamma * lam * later_gae
        later_value = get["values"][t]
        ratio, advantage = math.exp(now[t] - get["logprobs"][t]), get["advantages"][t]
        inside = min(max(ratio, 1 - clip_range), 1 + clip_range)
        clipped = inside * advantage < ratio * advantage  # the smaller objective is the clipped one
        lines.append({"delta": delta, "gae": later_gae, "ratio": ratio, "clipped": clipped})
    return lines[::-1]


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("settings", [(0.2, 1.0, 0.95), (0.1, 0.9, 0.5), (0.8, 1.0, 0.0)])
def test_delta_gae_ratio_and_clipping_equal_a_plain_loop(rollout, tokenizer, row, settings):
    table = xray(rollout, row, tokenizer, NOW, *settings)
    expected = by_hand(rollout, row, NOW, *settings)
    for t, line in enumerate(expected):
        got = dict(zip(table.columns, table.rows[Q + t], strict=True))
        assert got["clipped"] is line["clipped"]
        for name in ("delta", "gae", "ratio"):
            assert got[name] == pytest.approx(line[name], rel=1e-5, abs=1e-6)


def test_worked_example(rollout, tokenizer):
    # last token: 2.0 - 1.0 = 1.0; middle: 0.025 + 1.0 - 0.25; first: -0.05 + 0.25 - 0.5
    table = xray(rollout, 0, tokenizer)
    assert table.column("delta")[Q : Q + 3] == pytest.approx([-0.3, 0.775, 1.0])
    assert table.column("kl")[Q : Q + 3] == pytest.approx([0.5, -0.25, 0.0])  # k1
    assert table.column("reward")[Q : Q + 3] == pytest.approx([-0.05, 0.025, 2.0])
    assert table.column("value")[Q : Q + 3] == [0.5, 0.25, 1.0]
    assert table.column("return")[Q : Q + 3] == [1.5, 1.75, 2.0]


def test_clipping_wants_both_the_side_and_the_sign(rollout, tokenizer):
    # row 1: A = -0.5, 0.5, -1.5, 1.25; ratios = e^-1, e^0.5, e^0.05, e^-1
    assert xray(rollout, 1, tokenizer, NOW).column("clipped")[Q:] == [True, True, False, False]


def test_without_new_logprobs_every_ratio_is_one_and_nothing_is_clipped(rollout, tokenizer):
    table = xray(rollout, 1, tokenizer)
    assert table.column("logprobs") == table.column("old_logprobs")
    assert table.column("ratio")[Q:] == [1.0] * R and not any(table.column("clipped")[Q:])


def test_roles_mask_and_shift(rollout, tokenizer):
    table = xray(rollout, 0, tokenizer)
    roles = ["pad", "prompt", "prompt", "response", "response", "EOS", "pad"]
    assert table.column("role") == roles
    assert table.column("mask") == [None] * 3 + [True] * 3 + [False]
    assert table.column("index") == list(range(7))
    assert table.column("predicted at") == [None] * 3 + [2, 3, 4, None]


def test_prompt_and_padding_carry_no_numbers(rollout, tokenizer):
    table = xray(rollout, 0, tokenizer, NOW)  # NOW holds a NaN at the padding
    for place in (0, 1, 2, 6):
        assert set(table.rows[place][5:]) == {None}


def test_holes_in_the_mask_are_stepped_over(rollout, tokenizer):
    rollout.mask[1, 1] = rollout.attention_mask[1, Q + 1] = False
    # the first token's next value is that of the third
    delta = xray(rollout, 1, tokenizer).column("delta")
    assert delta[Q] == pytest.approx(-0.1 + 0.125 + 0.5) and delta[Q + 1] is None


def test_tokens_show_spaces_new_lines_and_control_characters(tokenizer):
    assert readable(tokenizer, letter(tokenizer, " ")) == "␣"
    assert readable(tokenizer, letter(tokenizer, "\n")) == "⏎"
    assert readable(tokenizer, letter(tokenizer, "\x1b")) == "\\x1b"
    assert readable(tokenizer, EOS) == "<|endoftext|>"


def test_wrong_row_and_wrong_shape_are_refused_by_name(rollout, tokenizer):
    with pytest.raises(ValueError, match="row is 2.*0 to 1"):
        xray(rollout, 2, tokenizer)
    with pytest.raises(ValueError, match=r"logprobs has shape \(2, 3\).*\(2, 4\)"):
        xray(rollout, 0, tokenizer, NOW[:, :3])


def test_a_table_goes_to_json_and_back(rollout, tokenizer):
    table = xray(rollout, 0, tokenizer, NOW)
    back = TokenTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert back == table and repr(back) == repr(table)
    assert back._repr_html_() == table._repr_html_()


def test_the_text_is_exactly_this(rollout, tokenizer):
    table = xray(rollout, 0, tokenizer, NOW)
    few = [COLUMNS.index(c) for c in ("index", "predicted at", "token", "role", "kl", "clipped")]
    columns, rows = (COLUMNS[i] for i in few), (tuple(r[i] for i in few) for r in table.rows)
    short = TokenTable("two words", tuple(columns), tuple(rows))
    assert repr(short).split("\n") == [
        "two words",
        "logits[:, t] predicts tokens[:, t + 1]",
        "",
        "       predicted",
        "index         at  token          role          kl  clipped",
        "    0             <|pad|>        pad",
        "    1             a              prompt",
        "    2             b              prompt",
        "    3          2  c              response   0.500      yes",
        "    4          3  a              response  -0.250      yes",
        "    5          4  <|endoftext|>  EOS        0.000       no",
        "    6             <|pad|>        pad",
    ]


def test_long_prompts_and_padding_are_folded_in_the_text_only():
    places = [(i, "pad", "pad") for i in range(9)] + [(i, f"p{i}", "prompt") for i in range(9, 19)]
    table = TokenTable("t", ("index", "token", "role"), (*places, (19, "r", "response")))
    lines = [line.split() for line in repr(table).split("\n")[5:]]
    assert lines[:2] == [["0-8", "(9", "tokens)", "pad"], ["9-14", "(6", "tokens)", "prompt"]]
    assert [line[0] for line in lines[2:]] == ["15", "16", "17", "18", "19"]
    assert len(table.rows) == 20


def test_tokens_are_escaped_in_html(rollout, tokenizer):
    bad = [letter(tokenizer, x) for x in "<&"]
    rollout.tokens[0, Q : Q + 2] = rollout.response[0, :2] = torch.tensor(bad)
    page = xray(rollout, 0, tokenizer)._repr_html_()
    assert "&lt;|endoftext|&gt;" in page and "&amp;" in page
    assert not re.search(r"&(?!(amp|lt|gt|quot|#x27|#39);)", page)
    tags = set(re.findall(r"<(?!/)([^\s>]*)", page))
    assert tags <= set("div span br table tr th td details summary ul li b".split())


def test_html_has_inline_styles_only_and_nothing_random(rollout, tokenizer):
    page = xray(rollout, 0, tokenizer, NOW)._repr_html_()
    assert not re.search(r"<(style|script|svg)|\bid=|\bclass=|\bon\w+=|0x[0-9a-f]{6}", page)
    assert page == xray(rollout, 0, tokenizer, NOW)._repr_html_()


def test_html_shows_the_numbers_and_draws_the_shift(rollout, tokenizer):
    page = xray(rollout, 0, tokenizer, NOW)._repr_html_()
    for number in ("-0.300", "0.775", "1.649", "-2.500"):
        assert f">{number}</td>" in page
    assert "logits[:, t] predicts tokens[:, t + 1]" in page
    assert page.count("↗") == 3  # from places 2, 3 and 4


def luminance(red, green, blue):
    """Relative luminance as WCAG defines it."""
    parts = [c / 255 for c in (red, green, blue)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_are_few_and_their_ink_is_readable():
    styles = {colour(value / 500, 1.0) for value in range(-500, 501)}
    assert len(styles) == 2 * STEPS + 1  # with the empty one about 0
    for style in styles - {""}:
        match = re.fullmatch(r"background:rgb\((\d+),(\d+),(\d+)\);color:(#\w+)", style)
        *back, ink = match.groups()
        shine = luminance(*map(int, back))
        other = 1.0 if ink == "#fff" else 0.0
        assert (max(shine, other) + 0.05) / (min(shine, other) + 0.05) >= 4.5


def test_no_number_and_no_range_have_no_colour():
    assert colour(None, 1.0) == colour(math.nan, 1.0) == colour(1.0, 0.0) == colour(0.01, 1.0) == ""
    assert colour(5.0, 1.0) == colour(1.0, 1.0) != colour(-1.0, 1.0)
