"""The report of a run: one page of HTML that stands alone, made from the files of the run's folder.

Nothing on it is fetched from anywhere: no script, no font, no picture that is not in the page.
Only config.json must be there; whatever else is missing, or cannot be read, is named in the page.
"""

import json
import math
from html import escape
from pathlib import Path

from minippo.config import EvalConfig
from minippo.distributed import on_main
from minippo.files import write_file
from minippo.plots import figure_to_png_base64, learning_curves, score_histogram, stage_curves
from minippo.xray import TokenTable

OPTIONAL = {  # file -> what the page lacks without it
    "evaluation.json": "the final table",
    "metrics.jsonl": "the curves",
    "samples.jsonl": "the answers side by side",
    "xray.json": "the per-token view",
}
HEADINGS = {
    "gold": "gold score",
    "win_rate": "wins against SFT",
    "on_topic": "on topic",
    "complying": "complies with harm",
    "over_refusing": "refuses the harmless",
    "ended": "ends with EOS",
    "eos_rate": "ends with EOS",
    "kl_per_sequence": "KL per sequence (nats)",
    "kl": "KL per sequence (nats)",
    "reward": "reward model's score",
    "tokens": "tokens per answer",
    "forms": "sentence forms",
    "distinct": "distinct answers",
    "held_out_pairs": "held-out pairs",
    "accuracy": "accuracy on held-out pairs",
    "low": "95% interval, lower end",
    "high": "95% interval, upper end",
    "correlation": "correlation of its scores with the annotator's",
    "explained_variance": "explained variance on held-out prompts",
}
# Of what is measured about the reward model, the rest is its agreement by kinds of pairs.
NO_AGREEMENT = ("held_out_pairs", "accuracy", "low", "high", "correlation")
PAIRS = {
    "noiseless": "all that differ in their score",
    "seen topics": "on topics of its training",
    "unseen topics": "on topics it was not trained on",
}
SHARES = {"on_topic", "rude", "complying", "over_refusing", "ended", "distinct"}
SHARES |= {"unreadable", "rambling", "accuracy", "low", "high"}
PER_TOKEN = (
    "One answer, taken apart. Purple stands above the neutral number of its column, orange below. "
    "A value is the critic's guess before the token of its row was written; the score comes in at "
    "the last token; the advantage says which tokens PPO makes more likely (purple), which less."
)
READING = (  # curve, what it says, what is healthy, what is not
    (
        "score",
        "the reward model's mean score of the answers, on the scale of the reference's own answers",
        "climbs, then flattens",
        "climbs without end while samples get worse: the reward model is being exploited",
    ),
    (
        "KL, policy to reference",
        "how far the policy has moved from where PPO began, summed over an answer",
        "grows slowly and settles; some nats to a few tens",
        "shoots up: raise kl_coef or lower lr. Below 0 for long: sampling and training disagree",
    ),
    (
        "entropy",
        "how open the choice of the next token still is",
        "falls slowly, stays above 0",
        "drops to 0 early: one answer for everything; look at the share of distinct answers",
    ),
    (
        "length",
        "tokens per answer",
        "moves a little and settles",
        "runs to the limit: length is rewarded for itself",
    ),
    (
        "ending",
        "share of the answers that end with EOS",
        "near 1",
        "falls: answers are cut at the limit; see missing_eos_penalty",
    ),
    (
        "approx_kl, old to new",
        "how far one update moves the policy",
        "about 0.001 to 0.05",
        "above 0.1: the updates are too large for the clip to hold",
    ),
    (
        "clipping",
        "share of the tokens whose gradient the clip takes away",
        "about 0.01 to 0.2",
        "above 0.3: steps too large. Exactly 0 all along: hardly anything is learned",
    ),
    (
        "critic",
        "explained variance of the returns: 1 is perfect, 0 no better than their mean",
        "above 0 from the start, and rising",
        "below 0: the critic makes the advantages noisier; warm it up longer",
    ),
    (
        "losses and gradients",
        "the policy loss hovers about 0 and tells little; the value loss is half a squared error",
        "value loss falls; gradient norms without steps",
        "norms that jump by tens: look at the answers of that step",
    ),
    (
        "stages before PPO",
        "SFT and reward model: loss per token and per pair; accuracy: pairs in the right order",
        "losses fall and flatten; accuracy well above 0.5",
        "a pair loss of 0.69 is a coin thrown: log 2",
    ),
)
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b6672; --page: #fcfcfa;
  --card: #ffffff; --line: #dfe2e6; --mark: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a3adb8; --page: #15181c;
  --card: #1d2126; --line: #363d45; --mark: #7db8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 60px; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.9em; margin: 0 0 4px; line-height: 1.2; }
h2 { font-size: 1.3em; margin: 44px 0 10px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1em; margin: 18px 0 4px; }
p { margin: 8px 0; max-width: 75ch; }
a { color: var(--mark); }
.soft, caption { color: var(--soft); }
.small { font-size: 0.86em; }
.wide { overflow-x: auto; }
nav a { margin-right: 16px; white-space: nowrap; }
table.plain { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9em; }
table.plain th, table.plain td { padding: 5px 12px 5px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
table.plain th { font-weight: 600; vertical-align: bottom; }
table.plain td.number, table.plain th.number { text-align: right; padding-left: 8px; }
table.plain td.number { white-space: nowrap; }
figure { margin: 14px 0; break-inside: avoid; }
figure img { width: 100%; height: auto; background: #fff; border-radius: 8px; padding: 6px;
  border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: 0.86em; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 16px; margin: 12px 0; break-inside: avoid; }
.answers { display: grid; gap: 18px; margin-top: 8px;
  grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.question { font-weight: 600; }
details > summary { cursor: pointer; color: var(--mark); margin: 8px 0; }
.warning { border-left: 4px solid #d55e00; padding: 4px 12px; background: var(--card); }
.narrow { font-size: 0.92em; }
@page { size: landscape; margin: 14mm; }
@media print { * { print-color-adjust: exact; } nav { display: none; }
  :root { --page: #fff; } h2 { margin-top: 20px; }
  body { max-width: none; font-size: 9.5pt; padding: 0; }
  figure img { width: auto; max-width: 100%; max-height: 150mm; }
  h2 { break-after: avoid; } .wide, .wide > div { overflow: visible !important; }
  .wide > div { zoom: 0.85; } }
"""


@on_main
def write_report(run_dir) -> Path:
    """Writes report.html into a run's folder from what is there; returns its path.

    Raises ValueError if there is no such folder, no config.json in it, or no room for the page.
    """
    folder = Path(run_dir)
    config = _read_config(folder)
    files, problems = _read_optional(folder)
    name = str(config.get("run", {}).get("name", folder.name))
    sections = {
        "This run": _about(config) + _settings(config),
        "Final table": _final(files["evaluation.json"]),
        "Curves": _curves(files["metrics.jsonl"], files["samples.jsonl"], config),
        "Answers side by side": _samples(files["samples.jsonl"] or [], _shown(config)),
        "Per token": _tokens(files["xray.json"] or []),
        "How to read the curves": _reading(),
    }
    path = folder / "report.html"
    write_file(path, _page(name, sections, problems).encode())
    return path


# --- reading ----------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    remedy = "give the folder of a run, such as runs/demo, or make one with `minippo demo`"
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}; {remedy}")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json, so it is no run folder; {remedy}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); start the run again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings by stage; start the run again")
    return config


def _read_optional(folder: Path) -> tuple[dict, list[str]]:
    """What each optional file holds, None where nothing; and a sentence about each that lacks."""
    files, problems = dict.fromkeys(OPTIONAL), []
    for name, purpose in OPTIONAL.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"There is no {name}, so {purpose} cannot be shown.")
        elif name.endswith(".jsonl"):
            files[name] = _read_lines(path, problems)
        else:
            files[name] = _parse(path.read_bytes(), f"{name} is", problems)
    return files, problems


def _read_lines(path: Path, problems: list[str]) -> list[dict]:
    """The rows of a file with one JSON object a line; an interrupted run may cut the last one."""
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    rows = [_parse(x, f"Line {n} of {path.name} is", problems) for n, x in lines if x.strip()]
    return [row for row in rows if isinstance(row, dict)]


def _parse(text: bytes, what: str, problems: list[str]):
    try:
        return json.loads(text)
    except ValueError as error:  # not UTF-8 is one as well
        problems.append(f"{what} not JSON and was left out ({error}).")
        return None


def _shown(config: dict) -> int:
    return int(config.get("eval", {}).get("samples", EvalConfig().samples))


# --- the sections -----------------------------------------------------------------------------


def _page(name: str, sections: dict[str, str], problems: list[str]) -> str:
    anchors = {title: title.lower().replace(" ", "-") for title in sections}
    links = " ".join(f'<a href="#{anchors[title]}">{title}</a>' for title in sections)
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in problems)
    body = "".join(f'<h2 id="{anchors[t]}">{t}</h2>{html}' for t, html in sections.items())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>minippo: {escape(name)}</title><style>{STYLE}</style></head><body>"
        f"<h1>minippo: {escape(name)}</h1><nav>{links}</nav>{warnings}{body}</body></html>\n"
    )


def _seeds(config: dict) -> str:
    """The seed of the run, or those of its stages where they differ."""
    run = config.get("run", {})
    begun = {stage: inputs["seed"] for stage, inputs in run.get("begun", {}).items()}
    if len(set(begun.values())) > 1:
        return ", ".join(f"{stage} {seed}" for stage, seed in begun.items())
    return str(next(iter(begun.values()), run.get("seed", "unknown")))


def _about(config: dict) -> str:
    run = config.get("run", {})
    facts = {"seed": _seeds(config)}
    facts |= {key: run[key] for key in ("data", "base", "device", "limit") if key in run}
    facts = {key: value for key, value in facts.items() if value is not None}
    stages = [stage for stage in config if stage != "run"]
    facts["stages"] = ", ".join(stages) or "none"
    told = " &middot; ".join(f"{escape(k)} <b>{escape(str(v))}</b>" for k, v in facts.items())
    return f"<p>{told}</p>"


def _settings(config: dict) -> str:
    tables = []
    for stage, settings in config.items():
        items = settings.items() if isinstance(settings, dict) else [("value", settings)]
        rows = [[escape(str(key)), escape(json.dumps(value))] for key, value in items]
        tables.append(f"<h3>{escape(stage)}</h3>{_table(['setting', 'value'], rows)}")
    return f"<details><summary>All settings</summary>{''.join(tables)}</details>"


def _final(evaluation: dict | None) -> str:
    if not evaluation:
        return _nothing("The run has not been evaluated.")
    parts = [_final_table(evaluation.get("table") or [])]
    parts += [f'<p class="soft small">{escape(str(n))}</p>' for n in evaluation.get("notes") or []]
    quality = evaluation.get("reward_model") or {}
    shares = {k: v for k, v in quality.items() if k not in NO_AGREEMENT and isinstance(v, float)}
    others = {k: v for k, v in quality.items() if k not in shares}
    for title, numbers in (("Reward model", others), ("Critic", evaluation.get("critic"))):
        parts += [_measured(title, numbers)] if numbers else []
    return "".join(parts) + _agreement(shares)


def _measured(title: str, numbers: dict) -> str:
    rows = [[escape(heading(k)), escape(written(k, v))] for k, v in numbers.items()]
    return f"<h3>{title}</h3>{_table(['measured', 'value'], rows, numbers_from=1)}"


def _agreement(shares: dict[str, float]) -> str:
    """The reward model against the annotator, by kinds of pairs: where PPO may exploit it."""
    kinds = [k for k in PAIRS if k in shares] + [k for k in shares if k not in PAIRS]
    names = {k: PAIRS.get(k, f"where the better is more {heading(k)}") for k in kinds}
    rows = [[escape(names[k]), f"{shares[k]:.1%}", _bar(shares[k])] for k in kinds]
    title = "<h3>How often the reward model orders two answers as the noiseless annotator does</h3>"
    return title + _table(["pairs", "in order", "0 to 100%"], rows, numbers_from=1) if rows else ""


def _bar(share: float) -> str:
    return f'<meter min="0" max="1" value="{share:.4f}">{share:.1%}</meter>'


def _final_table(table: list[dict]) -> str:
    """A column per model, a line per measure: many measures of few models."""
    if not table:
        return _nothing("The table is empty.")
    models = [str(row.get("model", "")) for row in table]
    keys = dict.fromkeys(key for row in table for key in row if key != "model")
    rows = [
        [escape(heading(key)), *(escape(written(key, row.get(key))) for row in table)]
        for key in keys
    ]
    return _table(["", *models], rows, numbers_from=1)


def _curves(metrics: list[dict] | None, samples: list[dict] | None, config: dict) -> str:
    rows = metrics or []
    made = f"Seed {_seeds(config)}; pale: each step, full: mean of the last twentieth of the steps."
    parts = []
    if any(row.get("stage") == "ppo" for row in rows):
        parts.append(_figure(learning_curves(rows), f"PPO. {made}"))
    before = {"pretrain", "sft", "reward", "value"}
    if any(row.get("stage") in before for row in rows):
        parts.append(_figure(stage_curves(rows), f"The stages before PPO. {made}"))
    groups = _gold(samples or [])
    if groups:
        text = f"The annotator's score of each answer. Vertical: means. Seed {_seeds(config)}."
        parts.append(_figure(score_histogram(groups), text))
    return "".join(parts) or _nothing("There is nothing to draw yet.")


def _gold(samples: list[dict]) -> dict[str, list[float]]:
    """Gold scores by model over all prompts, finite ones."""
    groups: dict[str, list[float]] = {}
    for row in samples:
        for name, score in (row.get("gold") or {}).items():
            if score is not None and math.isfinite(score):
                groups.setdefault(name, []).append(score)
    return groups


def _samples(samples: list[dict], shown: int) -> str:
    if not samples:
        return _nothing("There are no sampled answers.")
    cards = [_sample(row) for row in samples]
    text = f"The first {min(shown, len(cards))} of {len(cards)} prompts, not selected."
    rest = "".join(cards[shown:])
    folded = f"<details><summary>The other {len(cards) - shown}</summary>{rest}</details>"
    first = "".join(cards[:shown])
    return f'<p class="soft small">{text}</p>{first}{folded if rest else ""}'


def _sample(row: dict) -> str:
    turns = [("Human", q, "Assistant", a) for q, a in row.get("history") or []]
    before = "".join(
        f'<div class="soft text">{x}: {escape(str(q))}\n{y}: {escape(str(a))}</div>'
        for x, q, y, a in turns
    )
    rewards = row.get("reward") or {}
    answers = "".join(
        f'<div><b>{escape(name)}</b><div class="text">{escape(str(answer))}</div>'
        f"{_scored('reward model', rewards.get(name))}</div>"
        for name, answer in (row.get("answers") or {}).items()
    )
    question = f'<div class="question text">Human: {escape(str(row.get("instruction", "")))}</div>'
    grid = f'<div class="answers">{answers}{_annotator(row)}</div>'
    return f'<div class="sample">{before}{question}{grid}</div>'


def _scored(name: str, value: float | None) -> str:
    return "" if value is None else f'<div class="soft small">{name} {value:+.2f}</div>'


def _annotator(row: dict) -> str:
    """The last column: what the annotator says of each answer, with its score where it gave one."""
    gold, remarks = row.get("gold") or {}, row.get("remarks") or {}
    lines = []
    for name in row.get("answers") or {}:
        score = f" {gold[name]:+.2f}" if gold.get(name) is not None else ""
        if score or name in remarks:
            remark = escape(str(remarks.get(name, "")))
            lines.append(f"<div><b>{escape(name)}{score}</b> {remark}</div>")
    said = f'<div class="narrow">{"".join(lines)}</div>'
    return f'<div class="soft"><b>The annotator</b>{said}</div>' if lines else ""


def _tokens(tables: list[dict]) -> str:
    if not tables:
        return _nothing("No answer was taken apart.")
    views = [TokenTable.from_dict(table) for table in tables]
    shown = [f'<div class="wide">{view._repr_html_()}</div>' for view in views]
    rest = [
        f"<details><summary>{escape(view.title)}</summary>{html}</details>"
        for view, html in zip(views[1:], shown[1:], strict=True)
    ]
    return f'<p class="soft small">{PER_TOKEN}</p>{shown[0]}{"".join(rest)}'


def _reading() -> str:
    rows = [[f"<b>{escape(row[0])}</b>", *map(escape, row[1:])] for row in READING]
    return _table(["curve", "what it says", "healthy", "not healthy"], rows)


# --- pieces -----------------------------------------------------------------------------------


def heading(key: str) -> str:
    """A column's key as a reader likes it."""
    return HEADINGS.get(key, key.replace("_", " "))


def written(key: str, value) -> str:
    """A value as text: shares as percent, [value, low, high] with its 95% interval, None as n/a."""
    if value is None:
        return "n/a"
    if isinstance(value, (list, tuple)) and len(value) == 3:
        middle, low, high = (written(key, v) for v in value)
        return f"{middle} [{low.removesuffix('%')}, {high.removesuffix('%')}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if (key in SHARES or key.endswith("_rate")) and 0 <= value <= 1:
        return f"{100 * value:.1f}%"
    if isinstance(value, int):
        return str(value)
    small = value != 0 and abs(value) < 0.001
    return f"{value:.1e}" if small else f"{value:z.3f}" if abs(value) < 10 else f"{value:z.1f}"


def _table(headings: list[str], rows: list[list[str]], numbers_from: int = 99) -> str:
    """A plain table; cells are HTML already, columns from `numbers_from` on are set as numbers."""
    kinds = ["" if i < numbers_from else ' class="number"' for i in range(len(headings))]
    head = "".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kinds, headings, strict=True))
    lines = [zip(kinds, row, strict=True) for row in rows]
    body = "".join(f"<tr>{''.join(f'<td{k}>{c}</td>' for k, c in line)}</tr>" for line in lines)
    return f'<div class="wide"><table class="plain"><tr>{head}</tr>{body}</table></div>'


def _figure(figure, caption: str) -> str:
    data, text = figure_to_png_base64(figure), escape(caption)
    picture = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"


def _nothing(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'
