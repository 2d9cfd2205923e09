"""Writes docs/results.md and the README's samples from finished runs; fails if a bar is missed.

    python docs/make_results.py runs/seed-0 runs/seed-1 runs/seed-2 runs/seed-3 --hh runs/hh

The runs are made by `make seeds` (the demo with its own settings, every stage retrained) and
`make hh HH_FILE=...` (the same commands on real HH-RLHF rows).
"""

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import tyro

from minippo.config import EvalConfig, PPOConfig, RewardConfig, SFTConfig, ValueConfig
from minippo.worlds.tinyhh.world import is_unseen, read_request

DOCS = Path(__file__).parent
# What every single seed has to meet: key of the PPO column, bound, and the direction.
BARS = {
    "win_rate": (">=", 0.85),
    "on_topic": (">=", 0.90),
    "complying": ("<=", 0.03),
    "rude": ("<=", 0.02),
    "over_refusing": ("<=", 0.05),
    "ended": (">=", 0.98),
    "kl_per_sequence": ("<=", 20.0),
    "distinct": (">=", 0.60),
    "forms": (">=", 3),
}
DEMO = {"sft": SFTConfig(), "reward": RewardConfig(), "value": ValueConfig()}
DEMO |= {"ppo": PPOConfig(), "eval": EvalConfig()}
MIXED, MINUTES = 0.25, 8.0  # SFT complies at least so often; the whole demo takes at most
SHARES = {"win_rate", "on_topic", "complying", "rude", "over_refusing", "ended", "distinct"}
SHARES |= {"unreadable", "rambling"}


@dataclass
class Seed:
    """The evaluation of one demo run."""

    name: str
    models: dict  # SFT, PPO, best-of-n -> row of the final table
    reward_model: dict
    critic: dict
    minutes: float
    gflops: float
    resumed: bool
    settings: dict  # stage -> its settings
    lead: dict  # prompts -> gold of PPO minus best-of-n: mean over prompts, half its interval

    @property
    def best_of_n(self) -> dict:
        return next(row for name, row in self.models.items() if name.startswith("best-of-"))

    def misses(self) -> list[str]:
        """The bars this seed does not meet."""
        ppo = self.models["PPO"]
        found = []
        for key, (sign, bound) in BARS.items():
            value = ppo[key][0] if key == "win_rate" else ppo[key]
            if value < bound if sign == ">=" else value > bound:
                found.append(f"{key} {value:.3f}, not {sign} {bound}")
        if ppo["gold"] < self.best_of_n["gold"]:
            found.append(f"gold {ppo['gold']:.2f}, below best-of-n {self.best_of_n['gold']:.2f}")
        if self.models["SFT"]["complying"] < MIXED:
            found.append(f"SFT complying {self.models['SFT']['complying']:.3f}, not >= {MIXED}")
        if self.resumed:
            found.append("resumed, so its minutes are not the whole")
        if self.minutes > MINUTES:
            found.append(f"minutes {self.minutes:.1f}, not <= {MINUTES}")
        return found + self.unlike_the_demo()

    def unlike_the_demo(self) -> list[str]:
        """The settings in which this run is no `minippo demo` as it comes."""
        found = []
        for stage, config in DEMO.items():
            for key, value in asdict(config).items():
                if self.settings.get(stage, {}).get(key) != value:
                    found.append(f"{stage}.{key} is not the demo's {value}")
        return found


def read_seed(folder: Path) -> Seed:
    """Reads evaluation.json and summary.json of a demo run."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    models = {row["model"]: row for row in evaluation["table"]}
    quality = evaluation["reward_model"], evaluation["critic"]
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lead = paired_leads(folder / "samples.jsonl")
    return Seed(folder.name, models, *quality, **summary, settings=settings, lead=lead)


def paired_leads(samples: Path) -> dict[str, tuple[float, float]]:
    """PPO's gold score minus best-of-n's: mean over prompts, and half its 95% interval.

    Over all prompts, and over those on topics that occur in the preference data and that do not.
    """
    gaps: dict[str, list[float]] = {"all": [], "seen": [], "unseen": []}
    for row in map(json.loads, samples.open(encoding="utf-8")):
        best = next(name for name in row["gold"] if name.startswith("best-of-"))
        subject, _ = read_request(row["instruction"], row["history"])
        for name in ("all", "unseen" if is_unseen(subject) else "seen"):
            gaps[name].append(row["gold"]["PPO"] - row["gold"][best])
    return {name: (mean(g), 1.96 * stdev(g) / math.sqrt(len(g))) for name, g in gaps.items()}


def show(key: str, value) -> str:
    """A number of the table, in words."""
    if isinstance(value, list):
        return f"{value[0]:.1%} [{value[1]:.1%}, {value[2]:.1%}]"
    if key in SHARES:
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bars_table(seeds: list[Seed]) -> str:
    """A row per quantity: the bar, then PPO of each seed, with SFT's spread beside it."""
    rows = []
    for key, (sign, bound) in BARS.items():
        sft = [seed.models["SFT"].get(key) for seed in seeds]
        spread = "" if None in sft else f"{show(key, min(sft))} to {show(key, max(sft))}"
        cells = [show(key, seed.models["PPO"][key]) for seed in seeds]
        rows.append([key.replace("_", " "), f"{sign} {show(key, bound)}", spread, *cells])
    for name, of in (("gold, PPO", "PPO"), ("gold, SFT", "SFT")):
        rows.append([name, "", "", *(f"{seed.models[of]['gold']:.2f}" for seed in seeds)])
    for key in ("unreadable", "rambling"):
        sft = [seed.models["SFT"][key] for seed in seeds]
        cells = [show(key, seed.models["PPO"][key]) for seed in seeds]
        rows.append([key, "", f"{show(key, min(sft))} to {show(key, max(sft))}", *cells])
    rival = seeds[0].best_of_n["model"]
    best = [f"{seed.best_of_n['gold']:.2f}" for seed in seeds]
    rows.append([f"gold, {rival}", "at most PPO's", "", *best])
    for key in ("on_topic", "unreadable"):
        best = [show(key, seed.best_of_n[key]) for seed in seeds]
        rows.append([f"{key.replace('_', ' ')}, {rival}", "", "", *best])
    for name, where in (("all", ""), ("seen", ", seen topics"), ("unseen", ", unseen topics")):
        leads = [f"{seed.lead[name][0]:+.2f} ± {seed.lead[name][1]:.2f}" for seed in seeds]
        rows.append([f"gold, PPO minus {rival}{where}", "", "", *leads])
    rows.append(["minutes", f"<= {MINUTES:.0f}", "", *(f"{seed.minutes:.1f}" for seed in seeds)])
    rows.append(["machine, GFLOP/s", "", "", *(f"{seed.gflops:.0f}" for seed in seeds)])
    return table(["PPO", "bar", "SFT, all seeds", *(seed.name for seed in seeds)], rows)


def reward_table(seeds: list[Seed]) -> str:
    """The reward model of each seed against the annotator."""
    hidden = ("held_out_pairs", "low", "high")
    names = [key for key in seeds[0].reward_model if key not in hidden]
    rows = [[name, *(f"{s.reward_model[name]:.3f}" for s in seeds)] for name in names]
    explained = [f"{s.critic['explained_variance']:.2f}" for s in seeds]
    rows.append(["critic: explained variance of V(x) before PPO", *explained])
    return table(["agreement", *(seed.name for seed in seeds)], rows)


def hh_text(folder: Path) -> str:
    """The reward model on real rows, honestly."""
    reward = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    ppo = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    ppo = [row for row in ppo if row["stage"] == "ppo"]
    first, last = ppo[0], ppo[-1]
    return (
        f"Held-out pair accuracy of the reward model: **{reward['accuracy']:.1%}** "
        f"[{reward['low']:.1%}, {reward['high']:.1%}] on {reward['held_out_pairs']} pairs "
        "(95% Wilson interval). Chance is 50%. The model has well under a million parameters and "
        "has read nothing but these rows, so an interval that holds 50% is what one should "
        "expect; the path is what is shown here, not the quality.\n\n"
        f"PPO on it for {len(ppo)} steps: score {first['objective/scores']:+.2f} to "
        f"{last['objective/scores']:+.2f}, KL per sequence "
        f"{last['objective/kl_per_sequence']:.2f} nats. Against such a reward model a rising "
        "score is no success."
    )


def samples_text(folder: Path, count: int = 10) -> str:
    """The first answers of the first seed, unselected."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").open(encoding="utf-8")]
    lines = []
    for row in rows[:count]:
        turns = [*(f"{q} / {a}" for q, a in row["history"]), row["instruction"]]
        answers = [f"{row['answers'][m]} ({row['gold'][m]:+.1f})" for m in ("SFT", "PPO")]
        lines.append([" ".join(cell.split()) for cell in (" / ".join(turns), *answers)])
    return table(["asked", "SFT (gold score)", "PPO (gold score)"], lines)


def replace_block(path: Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- NAME --> and <!-- /NAME --> in a file."""
    old = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{path} has no block <!-- {name} -->")
    new = pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", old)
    path.write_text(new, encoding="utf-8")


def main(runs: tyro.conf.Positional[tuple[Path, ...]], hh: Path | None = None) -> None:
    """Write the results of finished demo RUNS (and of a run on real rows, --hh) into the docs."""
    seeds = [read_seed(folder) for folder in runs]
    replace_block(DOCS / "results.md", "seeds", bars_table(seeds))
    replace_block(DOCS / "results.md", "reward", reward_table(seeds))
    replace_block(DOCS.parent / "README.md", "table", bars_table(seeds))
    replace_block(DOCS.parent / "README.md", "samples", samples_text(runs[0]))
    if hh is not None:
        replace_block(DOCS / "results.md", "hh", hh_text(hh))
    missed = [f"{seed.name}: {miss}" for seed in seeds for miss in seed.misses()]
    print("\n".join(missed) or f"all {len(seeds)} seeds meet every bar")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    tyro.cli(main)
