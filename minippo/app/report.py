"""The report of a run: one page of HTML that stands alone, made from the files of the run's folder.

Nothing on it is fetched from anywhere: no script, no font, no picture that is not in the page.
Only config.json must be there; whatever else is missing, or cannot be read, is named in the page.
"""

import json
import math
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from minippo.config import EvalConfig
from minippo.engine.checkpoints import read_settings
from minippo.engine.files import write_file
from minippo.engine.ranks import on_main
from minippo.plots import figure_to_png_base64, learning_curves, score_histogram, stage_curves
from minippo.token_table import TokenTable

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
    "kl_per_sequence": "KL per sequence (nats)",
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


@on_main
def write_report(run_dir) -> Path:
    """Writes report.html into a run's folder from what is there; returns its path.

    Raises ValueError if there is no such folder, no config.json in it, or no room for the page.
    """
    folder = Path(run_dir)
    config = _read_config(folder)
    files, problems = _read_optional(folder)
    samples = files["samples.jsonl"] or []
    page = _template().render(
        name=config.get("run", {}).get("name", folder.name),
        problems=problems,
        facts=_facts(config),
        config=config,
        final=_final(files["evaluation.json"] or {}),
        figures=_figures(files["metrics.jsonl"] or [], samples, _seeds(config)),
        samples=samples,
        shown=int(config.get("eval", {}).get("samples", EvalConfig().samples)),
        token_tables=[TokenTable.from_dict(table) for table in files["xray.json"] or []],
    )
    path = folder / "report.html"
    write_file(path, page.encode())
    return path


def _template():
    """The page, in which all text is escaped, and a name that is not given is an error."""
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    templates = Environment(loader=PackageLoader("minippo.app"), autoescape=True, **options)
    templates.globals |= {"heading": heading, "written": written, "dumps": json.dumps}
    templates.globals |= {"signed": "{:+.2f}".format, "percent": "{:.1%}".format}
    return templates.get_template("report.html")


# --- reading ----------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict:
    remedy = "give the folder of a run, such as runs/demo, or make one with `minippo demo`"
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}; {remedy}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is no run folder; {remedy}")
    try:
        return read_settings(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; start the run again") from error


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


# --- what the page shows ----------------------------------------------------------------------


def _seeds(config: dict) -> str:
    """The seed of the run, or those of its stages where they differ."""
    run = config.get("run", {})
    begun = {stage: inputs["seed"] for stage, inputs in run.get("begun", {}).items()}
    if len(set(begun.values())) > 1:
        return ", ".join(f"{stage} {seed}" for stage, seed in begun.items())
    return str(next(iter(begun.values()), run.get("seed", "unknown")))


def _facts(config: dict) -> dict:
    """What is said of the run in its first lines."""
    run = config.get("run", {})
    facts = {"seed": _seeds(config)}
    facts |= {key: run.get(key) for key in ("data", "base", "device", "limit")}
    facts["stages"] = ", ".join(stage for stage in config if stage != "run") or "none"
    return {key: value for key, value in facts.items() if value is not None}


def _final(evaluation: dict) -> dict:
    """The final table, a line per measure, since there are many of few models; what else was found.

    The agreement is the reward model's with the annotator by kinds of pairs: it shows where PPO may
    exploit it.
    """
    models, quality = evaluation.get("table") or [], evaluation.get("reward_model") or {}
    shares = {k: v for k, v in quality.items() if k not in NO_AGREEMENT and isinstance(v, float)}
    others = {k: v for k, v in quality.items() if k not in shares}
    kinds = [k for k in PAIRS if k in shares] + [k for k in shares if k not in PAIRS]
    names = {k: PAIRS.get(k, f"where the better is more {heading(k)}") for k in kinds}
    return evaluation and {
        "models": models,
        "measures": dict.fromkeys(key for row in models for key in row if key != "model"),
        "notes": evaluation.get("notes") or [],
        "measured": {"Reward model": others, "Critic": evaluation.get("critic")},
        "agreement": [(names[k], shares[k]) for k in kinds],
    }


def _figures(metrics: list[dict], samples: list[dict], seeds: str) -> list[tuple[str, str]]:
    """(PNG in base64, caption) of all there is to draw."""
    stages, drawn = {row.get("stage") for row in metrics}, []
    made = f"Seed {seeds}; pale: each step, full: mean of the last twentieth of the steps."
    if "ppo" in stages:
        drawn.append((learning_curves(metrics), f"PPO. {made}"))
    if stages & {"pretrain", "sft", "reward", "value"}:
        drawn.append((stage_curves(metrics), f"The stages before PPO. {made}"))
    if groups := _gold(samples):
        text = f"The annotator's score of each answer. Vertical: means. Seed {seeds}."
        drawn.append((score_histogram(groups), text))
    return [(figure_to_png_base64(figure), caption) for figure, caption in drawn]


def _gold(samples: list[dict]) -> dict[str, list[float]]:
    """Gold scores by model over all prompts, finite ones."""
    groups: dict[str, list[float]] = {}
    for row in samples:
        for name, score in (row.get("gold") or {}).items():
            if score is not None and math.isfinite(score):
                groups.setdefault(name, []).append(score)
    return groups


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
