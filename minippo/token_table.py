"""The x-ray: one answer token by token, with all that the models and the formulas say about it.

`xray(rollout, row, tokenizer)` gives a `TokenTable`. It prints as text, shows itself in colour in a
notebook, and goes to JSON and back. Nothing in it is random, so its text can be compared exactly.
"""

from dataclasses import dataclass
from html import escape

from torch import Tensor

from minippo.advantages import gae
from minippo.kl import kl_k1
from minippo.rollout import Rollout

SHIFT = "logits[:, t] predicts tokens[:, t + 1]"
MEANING = {
    "index": "t, the place of the token in tokens (B, T), left padding counted in",
    "predicted at": "the place whose logits gave this token: index - 1",
    "token": "its text; ␣ is a space, ⏎ a new line",
    "role": "prompt, response, EOS (the first one) or pad",
    "mask": "whether it counts",
    "logprobs": "log pi of the policy now",
    "old_logprobs": "log pi of the policy that sampled it",
    "ref_logprobs": "log pi of the reference",
    "kl": "k1: old_logprobs - ref_logprobs",
    "reward": "the KL penalty, and the score at the last token that counts",
    "value": "V of the text before this token",
    "delta": "TD error: reward + gamma * next value - value",
    "gae": "sum of this and the later deltas, each step weighted by gamma * lam",
    "advantage": "what the policy loss uses: as in the rollout, whitened if so configured",
    "return": "what the value should have been",
    "ratio": "exp(logprobs - old_logprobs)",
    "clipped": "whether the clip takes this token's gradient away",
}
COLUMNS = tuple(MEANING)
COLOURED = {"kl": 0, "reward": 0, "value": 0, "delta": 0, "gae": 0, "advantage": 0, "return": 0}
COLOURED |= {"ratio": 1}  # column -> the number that is neutral
SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
# Orange below, purple above (ColorBrewer PuOr): told apart by colour-blind readers as well.
PALETTE = ((179, 88, 6), (253, 184, 99), (247, 247, 247), (178, 171, 210), (84, 39, 136))
STEPS = 16  # shades on either side


def xray(
    rollout: Rollout,
    row: int,
    tokenizer,
    logprobs: Tensor | None = None,
    clip_range: float = 0.2,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> "TokenTable":
    """The per-token view of one answer of a rollout.

    row: which answer, 0 to B - 1
    logprobs: (B, R) log pi of the policy now, after an update; None: of the rollout
    clip_range, gamma, lam: those of the PPOConfig; other ones show what they would do
    Raises ValueError if there is no such row or logprobs has another shape.
    """
    _check(rollout, row, logprobs)
    now = rollout.logprobs if logprobs is None else logprobs.detach()
    one, now = rollout.rows([row]), now[[row]]
    numbers = _numbers(one, now, clip_range, gamma, lam)
    query_length = one.tokens.shape[1] - one.response.shape[1]
    rows = []
    for index, token in enumerate(one.tokens[0].tolist()):
        attended = bool(one.attention_mask[0, index])
        t = index - query_length
        role = _role(token, t, attended, tokenizer.eos_token_id)
        counts = role in ("response", "EOS")
        head = (index, index - 1 if counts else None, readable(tokenizer, token), role)
        tail = [numbers[c][t] if counts else None for c in COLUMNS[5:]]
        rows.append((*head, attended if t >= 0 else None, *tail))
    settings = f"clip_range {clip_range:g}, gamma {gamma:g}, lam {lam:g}"
    title = f"answer {row}: score {float(one.scores[0]):z.3f} ({settings})"
    return TokenTable(title, COLUMNS, tuple(rows))


def _check(rollout: Rollout, row: int, logprobs: Tensor | None) -> None:
    size, shape = len(rollout.tokens), tuple(rollout.logprobs.shape)
    if not 0 <= row < size:
        raise ValueError(f"row is {row}; the rollout has {size} answers, so give 0 to {size - 1}")
    if logprobs is not None and tuple(logprobs.shape) != shape:
        got = tuple(logprobs.shape)
        raise ValueError(f"logprobs has shape {got}; it must be that of the rollout's: {shape}")


def _role(token: int, t: int, attended: bool, eos_id: int) -> str:
    if not attended:
        return "pad"
    if t < 0:
        return "prompt"
    return "EOS" if token == eos_id else "response"


def _numbers(one: Rollout, now: Tensor, clip_range, gamma, lam) -> dict[str, list]:
    """The columns that have a number (or a yes) for each token of the one answer given."""
    ratio, advantage = (now - one.logprobs).exp(), one.advantages
    too_high = (advantage > 0) & (ratio > 1 + clip_range)
    too_low = (advantage < 0) & (ratio < 1 - clip_range)
    columns = {
        "logprobs": now,
        "old_logprobs": one.logprobs,
        "ref_logprobs": one.ref_logprobs,
        "kl": kl_k1(one.logprobs, one.ref_logprobs),
        "reward": one.rewards,
        "value": one.values,
        "delta": gae(one.rewards, one.values, one.mask, gamma, lam=0.0)[0],  # with lam 0 GAE is it
        "gae": gae(one.rewards, one.values, one.mask, gamma, lam)[0],
        "advantage": advantage,
        "return": one.returns,
        "ratio": ratio,
        "clipped": too_high | too_low,
    }
    return {name: column[0].tolist() for name, column in columns.items()}


def readable(tokenizer, token: int) -> str:
    """The text of one token with spaces, new lines and unprintable characters made visible."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return "".join(SIGNS.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


@dataclass(frozen=True)
class TokenTable:
    """One row a token, as plain Python data: numbers, texts, bools, None where nothing is."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]

    def to_dict(self) -> dict:
        """What `json.dump` can write."""
        rows = [list(row) for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows}

    @classmethod
    def from_dict(cls, data: dict) -> "TokenTable":
        """The table that `to_dict` came from, also after a way through JSON."""
        return cls(data["title"], tuple(data["columns"]), tuple(map(tuple, data["rows"])))

    def column(self, name: str) -> list:
        """One column, from the first token to the last."""
        return [row[self.columns.index(name)] for row in self.rows]

    def __repr__(self) -> str:
        heads = [_two_lines(name) for name in self.columns]
        body = [[_cell(value) for value in row] for row in _folded(self)]
        lines = [[h[0] for h in heads], [h[1] for h in heads], *body]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = [name in ("token", "role") for name in self.columns]
        text = ["  ".join(map(_justify, line, widths, left)).rstrip() for line in lines]
        return "\n".join([self.title, SHIFT, "", *text])

    def _repr_html_(self) -> str:
        parts = [_html_text(self), _html_shift(self), _html_table(self), _html_legend()]
        title = f'<div style="font-weight:600">{escape(self.title)}</div>'
        return f'<div style="overflow-x:auto;text-align:left">{title}{"".join(parts)}</div>'


# --- as text ----------------------------------------------------------------------------------


def _two_lines(name: str) -> tuple[str, str]:
    """ "old_logprobs" -> "old_", "logprobs": headings as narrow as their columns."""
    for gap in ("_", " "):
        before, found, after = name.partition(gap)
        if found:
            return before + found.strip(), after
    return "", name


def _justify(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:z.3f}" if isinstance(value, float) else str(value)


def _folded(table: TokenTable) -> list[tuple]:
    """The rows, with a long stretch of padding, or the early part of a prompt, folded into one."""
    roles, rows, start = table.column("role"), [], 0
    while start < len(roles):
        end = start
        while end < len(roles) and roles[end] == roles[start]:
            end += 1
        shown = {"pad": 0, "prompt": 4}.get(roles[start], end - start)
        last = max(start, end - shown)
        if last - start > 2:
            rows.append(_summary(table, start, last))
            start = last
        rows.extend(table.rows[start:end])
        start = end
    return rows


def _summary(table: TokenTable, start: int, end: int) -> tuple:
    known = {"index": f"{start}-{end - 1}", "token": f"({end - start} tokens)"}
    known["role"] = table.rows[start][table.columns.index("role")]
    return tuple(known.get(name) for name in table.columns)


# --- as html: inline styles only, since notebooks strip style sheets, scripts and drawings ----

FRAME = "border-collapse:collapse;margin:8px 0;font:11.5px/1.5 ui-monospace,Menlo,monospace"
PADDED = "padding:1px 5px;white-space:nowrap"
MUTED = "opacity:0.65"


def colour(value: float | None, limit: float) -> str:
    """A background between orange (-limit) and purple (limit) in 2 * STEPS steps, and its ink.

    value: None, NaN or a value near 0 gets no colour: it takes that of the page, light or dark
    """
    share = value / limit if value is not None and limit > 0 else 0.0
    step = round(STEPS * max(-1.0, min(1.0, share))) if share == share else 0
    if step == 0:
        return ""
    place = (step + STEPS) / (2 * STEPS) * (len(PALETTE) - 1)
    low = min(int(place), len(PALETTE) - 2)
    ends = zip(PALETTE[low], PALETTE[low + 1], strict=True)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in ends)
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 112 else "#fff"
    return f"background:rgb({red},{green},{blue});color:{ink}"


def _limits(table: TokenTable) -> dict[str, float]:
    """The largest distance from neutral in each coloured column."""
    limits = {}
    for name, neutral in COLOURED.items():
        values = [v for v in table.column(name) if v is not None] if name in table.columns else []
        limits[name] = max((abs(v - neutral) for v in values if v == v), default=0.0)
    return limits


def _style(name: str, value, limits: dict[str, float]) -> str:
    if name not in COLOURED or value is None:
        return ""
    return colour(value - COLOURED[name], limits[name])


def _html_text(table: TokenTable) -> str:
    """The answer as running text: each token over its advantage."""
    limits, prompt, answer = _limits(table), "", []
    for role, token, value in zip(*map(table.column, ("role", "token", "advantage")), strict=True):
        if role == "prompt":
            prompt += token.replace("␣", " ")
        elif value is not None:
            style = "display:inline-block;text-align:center;margin:1px;padding:0 3px;"
            number = f'<br><span style="font-size:10px">{value:z.2f}</span>'
            style += _style("advantage", value, limits)
            answer.append(f'<span style="{style}">{escape(token)}{number}</span>')
    font = "font:13px/1.4 ui-monospace,Menlo,monospace;margin:8px 0"
    asked = f'<div style="{MUTED};margin-bottom:4px">{escape(prompt)}</div>'
    note = f'<div style="{MUTED};font-size:11px">each token over its advantage</div>'
    return f'<div style="{font}">{asked}{"".join(answer)}{note}</div>'


def _html_shift(table: TokenTable) -> str:
    """The shift, drawn where the prompt ends: which place predicts which token."""
    roles = table.column("role")
    first = next((i for i, role in enumerate(roles) if role in ("response", "EOS")), None)
    if not first:  # no response, or nothing before it
        return ""
    places = range(max(0, first - 2), min(len(roles) - 1, first + 3))
    tokens, cell = table.column("token"), f'<td style="{PADDED};text-align:center;'
    lines = {"t": [], "tokens[:, t]": [], "logits[:, t] predicts": []}
    for t in places:
        used = roles[t + 1] in ("response", "EOS")
        edge = "border-left:2px solid;" if t == first else ""
        lines["t"].append(f'{cell}{edge}{MUTED}">{t}</td>')
        lines["tokens[:, t]"].append(f'{cell}{edge}">{escape(tokens[t])}</td>')
        drawn = f"↗ {escape(tokens[t + 1])}" if used else "(not used)"
        lines["logits[:, t] predicts"].append(f'{cell}{edge}{"" if used else MUTED}">{drawn}</td>')
    head = f'<th style="{PADDED};text-align:left;font-weight:400;{MUTED}">'
    body = "".join(f"<tr>{head}{name}</th>{''.join(tds)}</tr>" for name, tds in lines.items())
    note = f"the shift: {SHIFT}; the line marks where the response begins"
    return f'<table style="{FRAME}">{body}</table><div style="font-size:11px;{MUTED}">{note}</div>'


def _html_table(table: TokenTable) -> str:
    limits = _limits(table)
    cells = []
    for name in table.columns:
        side = "left" if name in ("token", "role") else "right"
        style = f"{PADDED};text-align:{side};vertical-align:bottom;border-bottom:1px solid"
        first, second = map(escape, _two_lines(name))
        meaning = escape(MEANING.get(name, ""))
        cells.append(f'<th style="{style}" title="{meaning}">{first}<br>{second}</th>')
    rows = "".join(_html_row(table.columns, row, limits) for row in _folded(table))
    return f'<table style="{FRAME}"><tr>{"".join(cells)}</tr>{rows}</table>'


def _html_row(columns, row: tuple, limits: dict[str, float]) -> str:
    cells = []
    faint = MUTED if row[columns.index("role")] in ("prompt", "pad") else ""
    for name, value in zip(columns, row, strict=True):
        side = "left" if name in ("token", "role") else "right"
        bold = "font-weight:700;" if name == "clipped" and value else ""
        style = f"{PADDED};text-align:{side};{bold}{_style(name, value, limits)}"
        cells.append(f'<td style="{style}">{escape(_cell(value))}</td>')
    return f'<tr style="{faint}">{"".join(cells)}</tr>'


def _html_legend() -> str:
    lines = "".join(f"<li><b>{escape(k)}</b>: {escape(v)}</li>" for k, v in MEANING.items())
    folded = f"<summary>the columns</summary><ul>{lines}</ul>"
    return f'<details style="font-size:12px">{folded}</details>'
