"""Figures: learning curves and histograms from metrics.jsonl, and the oracle's policies.

Each function returns a `matplotlib.figure.Figure` of its own, without pyplot: importing this module
chooses no backend, and no figure stays behind. In a notebook, `%matplotlib inline` shows them.
"""

import base64
import io
import math
from dataclasses import dataclass

from matplotlib.figure import Figure

# Okabe and Ito 2008: told apart by colour-blind readers; the line style says the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
WIDTH = 10.8  # inches, of every figure


@dataclass(frozen=True)
class Panel:
    """One small plot: what is on its axis, and the log keys drawn in it with their names."""

    title: str
    unit: str
    lines: dict[str, str]
    limits: tuple[float | None, float | None] = (None, None)  # of the vertical axis


PPO_PANELS = (
    Panel(
        "score",
        "standardised score",
        {"objective/scores": "score", "objective/rewards": "score with KL penalty"},
    ),
    Panel(
        "KL, policy to reference",
        "nats per answer",
        {"objective/kl_per_sequence": "KL per sequence"},
    ),
    Panel("entropy", "nats per token", {"objective/entropy": "entropy"}),
    Panel("length", "tokens per answer", {"objective/response_tokens": "response tokens"}),
    Panel("ending", "share of answers", {"objective/eos_rate": "ends with EOS"}, (-0.03, 1.03)),
    Panel("approx_kl, old to new", "nats per token", {"policy/approx_kl": "approx_kl"}),
    Panel(
        "clipping",
        "share of tokens",
        {"policy/clip_frac": "policy ratio", "value/clip_frac": "value"},
        (-0.01, None),
    ),
    Panel(
        "critic",
        "explained variance",
        {"value/explained_variance": "explained variance"},
        (None, 1.03),
    ),
    Panel("policy loss", "loss", {"loss/policy": "policy", "loss/kl": "KL term"}),
    Panel("value loss", "loss", {"loss/value": "value"}),
    Panel(
        "gradients before clipping",
        "norm",
        {"grad_norm/policy": "policy", "grad_norm/value": "critic"},
    ),
    Panel("KL coefficient", "kl_coef", {"objective/kl_coef": "kl_coef"}),
)
STAGE_PANELS = {
    "pretrain": (Panel("pretraining", "nats per token", {"loss/lm": "loss"}),),
    "sft": (Panel("SFT", "nats per token", {"loss/lm": "loss"}),),
    "reward": (
        Panel("reward model", "nats per pair", {"loss/reward": "loss"}),
        Panel("reward model", "pairs in order", {"reward/accuracy": "accuracy"}, (None, 1.03)),
    ),
    "value": (Panel("critic warm-up", "half squared error", {"loss/value": "loss"}),),
}


def of_stage(metrics: list[dict], stage: str) -> list[dict]:
    """The rows of one stage; a row that names no stage, as trainings return them, fits any."""
    return [row for row in metrics if row.get("stage", stage) == stage]


def learning_curves(metrics: list[dict]) -> Figure:
    """PPO in small plots: score, KL, entropy, length, clipping, critic, losses.

    metrics: rows of metrics.jsonl, or what `train_ppo` returned
    Raises ValueError if there is no row of PPO.
    """
    rows = of_stage(metrics, "ppo")
    panels = [(panel, rows) for panel in PPO_PANELS if _drawn(panel, rows)]
    if not panels:
        raise ValueError("these metrics have no step of PPO; run `minippo ppo` or `minippo demo`")
    return _small_multiples(panels)


def stage_curves(metrics: list[dict]) -> Figure:
    """Losses and accuracy of the stages before PPO, as far as they are there.

    Raises ValueError if none of them is.
    """
    stages = {stage: [r for r in metrics if r.get("stage") == stage] for stage in STAGE_PANELS}
    panels = [
        (panel, stages[stage])
        for stage, group in STAGE_PANELS.items()
        for panel in group
        if _drawn(panel, stages[stage])
    ]
    if not panels:
        wanted = ", ".join(STAGE_PANELS)
        raise ValueError(f"these metrics have no row of a stage before PPO ({wanted})")
    return _small_multiples(panels)


def score_histogram(groups: dict[str, list[float]], label: str = "gold score") -> Figure:
    """Scores of several models in one histogram, each with its mean.

    groups: name of the model -> its scores, one per prompt
    Raises ValueError if there is no finite score.
    """
    finite = {name: [s for s in scores if math.isfinite(s)] for name, scores in groups.items()}
    finite = {name: scores for name, scores in finite.items() if scores}
    if not finite:
        raise ValueError("no finite score to draw; score_histogram wants {name: [score, ...]}")
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    low, high = min(map(min, finite.values())), max(map(max, finite.values()))
    width = (high - low or 1.0) / 24
    edges = [low - width / 2 + i * width for i in range(26)]
    for i, (name, scores) in enumerate(finite.items()):
        mean = sum(scores) / len(scores)
        look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
        weights, text = [1 / len(scores)] * len(scores), f"{name}: mean {mean:.2f}, n {len(scores)}"
        axes.hist(scores, edges, weights=weights, histtype="step", lw=1.8, label=text, **look)
        axes.axvline(mean, lw=1, alpha=0.7, **look)
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("share of answers", fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _clean(axes)
    return figure


def probability_bars(labels: list[str], groups: dict[str, list[float]], most: int = 24) -> Figure:
    """Probabilities of the same things under several policies, side by side, likeliest first.

    labels: what each thing is called
    groups: name of the policy -> its probabilities, one for each label; the last group orders them
    most: so many are drawn; the rest are summed up in a last bar
    Raises ValueError if a group has not one probability for each label.
    """
    wrong = [name for name, shares in groups.items() if len(shares) != len(labels)]
    if wrong or not groups:
        raise ValueError(f"{len(labels)} labels, and not as many probabilities in {wrong}")
    *_, last = groups.values()
    order = sorted(range(len(labels)), key=lambda i: -last[i])
    shown, rest = order[:most], order[most:]
    names = [labels[i] for i in shown] + ([f"the other {len(rest)}"] if rest else [])
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(groups)
    for g, (name, shares) in enumerate(groups.items()):
        heights = [shares[i] for i in shown] + ([sum(shares[i] for i in rest)] if rest else [])
        places = [i + (g - (len(groups) - 1) / 2) * width for i in range(len(heights))]
        axes.bar(places, heights, width, label=name, color=COLOURS[g % len(COLOURS)])
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_ylabel("probability", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    _clean(axes)
    return figure


def figure_to_png_base64(figure: Figure, dpi: int = 120) -> str:
    """The figure as the text of a PNG picture, for `data:image/png;base64,...`."""
    buffer = io.BytesIO()
    # Without the name of the software the same figure gives the same bytes in the next version.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def trailing_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and the width - 1 before it, of fewer at the beginning."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _drawn(panel: Panel, rows: list[dict]) -> bool:
    return any(key in row for key in panel.lines for row in rows)


def _small_multiples(panels: list[tuple[Panel, list[dict]]]) -> Figure:
    columns = 4 if len(panels) == 4 else min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH, 2.45 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (panel, rows) in zip(grid, panels, strict=False):
        _draw(axes, panel, rows)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    return figure


def _draw(axes, panel: Panel, rows: list[dict]) -> None:
    """Each value in pale, its trailing mean in full where there are many."""
    for i, (key, name) in enumerate(panel.lines.items()):
        points = [(row.get("step", n), row[key]) for n, row in enumerate(rows) if key in row]
        if not points:
            continue
        steps, values = map(list, zip(*points, strict=True))
        width = max(1, len(values) // 20)
        look = {"color": COLOURS[i], "linestyle": STYLES[i]}
        if width > 1:
            axes.plot(steps, values, color=COLOURS[i], lw=0.8, alpha=0.35)
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, trailing_mean(values, width), lw=1.7, marker=marker, label=name, **look)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.set_ylim(*panel.limits)
    _clean(axes)


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.tick_params(labelsize=8)
