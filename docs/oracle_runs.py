"""Grades `train_ppo` on the oracle: does training end at the policy that it should end at?

    python docs/oracle_runs.py            every run, into docs/oracle_results.md (20 minutes)
    python docs/oracle_runs.py --figure   the figure and the tables of docs/oracle.md (a minute)

A run starts at the reference and is trained on samples alone. Then the policy is read in every
state, and KL(policy, goal) is computed exactly. The goal is pi* where the KL is in the reward, and
the fixed point of the KL loss where it is in the loss. A run passes if it ends within 1% of the
distance that it started from, in less than a minute of one thread. Exit status 1 says that one did
not.
"""

import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from make_results import replace_block, table
from torch import Tensor
from tqdm import tqdm

from minippo.config import PPOConfig
from minippo.models import ValueModel, frozen_copy, tiny_gpt2
from minippo.optim import Hooks
from minippo.plots import probability_bars
from minippo.ppo import train_ppo
from minippo.worlds.oracle import TabularPolicy, TabularValue, World, feelings_world

DOCS = Path(__file__).parent
BOUND, SECONDS, NATS = 0.01, 60.0, (0.5, 5.0)  # of KL(ref, goal); a run; of KL(ref, pi*)
# lam = 1 is unbiased whatever the critic says. No whitening, so that what is trained is the
# objective itself and not a multiple of it that changes from step to step. The reward is the
# world's alone: no fine for a missing EOS. The value clip is wide open: the critic starts at 0.
SETTINGS = PPOConfig(
    steps=250, batch_size=512, minibatch_size=512, micro_batch_size=512, ppo_epochs=2, lr=0.04,
    value_lr=0.05, warmup_steps=0, lam=1.0, whiten_advantages=False, missing_eos_penalty=0.0,
    value_clip_range=1e6, max_response_tokens=3,
)  # fmt: skip
BETAS = {"feelings": (0.5, 0.8, 1.4), "scattered": (0.3, 0.5, 0.8)}
# A network has more steps than a table. With the KL in the loss it has larger batches instead, in
# which rare responses that the goal wants are more likely to be found.
GPT2_RATES = {"lr": 3e-3, "value_lr": 3e-3}
GPT2 = {
    "reward": GPT2_RATES | {"ppo_epochs": 3, "steps": 500},
    "loss": GPT2_RATES | {"ppo_epochs": 2, "batch_size": 2048},
}
# What one changed setting does, on the scattered world at 0.5.
CHANGES = {
    "table": {},
    "table, whiten_advantages=True": {"whiten_advantages": True},
    "table, lam=0.5": {"lam": 0.5},
    "table, lr=0.5": {"lr": 0.5},
    "table, batch_size=8": {"batch_size": 8},
    "table, kl_estimator=full": {"kl_estimator": "full"},
    "table, kl_estimator=k3": {"kl_estimator": "k3"},
    "table, kl_estimator=mse": {"kl_estimator": "mse"},
    "table, kl_estimator=abs": {"kl_estimator": "abs"},
    "gpt2, lr=0.03": {"lr": 0.03},
    "gpt2, KL in the loss": {},
    "gpt2, KL in the loss, batch_size=512": {"batch_size": 512},
    "gpt2, KL in the loss, steps=500": {"steps": 500},
    "gpt2, KL in the loss, lr=0.001": {"lr": 1e-3},
    "gpt2, steps=250": {"steps": 250},
}


def scattered_world() -> tuple[World, Tensor]:
    """A world without structure and its reference (S, V): the numbers of oracle_world.json."""
    data = json.loads((DOCS / "oracle_world.json").read_text(encoding="utf-8"))
    world = World(data["words"], data["length"], lambda words: data["scores"][" ".join(words)])
    weights = [data["ref"][" ".join(world.text(state))] for state in world.states]
    return world, torch.tensor(weights, dtype=torch.float64).log().log_softmax(-1)


WORLDS = {"feelings": feelings_world, "scattered": scattered_world}


@dataclass(frozen=True)
class Run:
    """One training and its exact distances, in nats per response."""

    model: str  # table or gpt2
    world: str
    where: str  # the KL is in the "reward" or in the "loss"
    coef: float  # beta or c2
    seed: int
    started: float  # KL(ref, goal)
    ended: float  # KL(policy, goal)
    ref_to_best: float  # KL(ref, pi*)
    goal_to_best: float  # KL(goal, pi*): 0 if the goal is pi*
    seconds: float
    favourite: str  # the policy's likeliest response, with its probability here and in the goal
    missing: str  # how much of the goal's probability lies where the policy has hardly any

    @property
    def share(self) -> float:
        return self.ended / self.started

    @property
    def passed(self) -> bool:
        return self.share <= BOUND and self.seconds <= SECONDS


def gpt2(words: int, seed: int):
    """A tiny GPT-2 with larger weights than a fresh one has, so that it has preferences."""
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 8, "eos_id": 0}
    model, generator = tiny_gpt2(words, **sizes), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def make_models(model: str, world: World, ref: Tensor):
    """Policy and critic: tables, the policy's at the reference; or two GPT-2s."""
    if model == "table":
        return TabularPolicy(world, ref), TabularValue(world)
    critic = ValueModel.from_policy(gpt2(len(world.words), seed=6))
    torch.nn.init.zeros_(critic.classifier.score.weight)
    return gpt2(len(world.words), seed=5), critic


class Watch(Hooks):
    """Remembers how likely the policy makes each response, at first and after each step: (Y,)."""

    def __init__(self, world: World, policy):
        self.world, self.policy, self.seen = world, policy, []

    def start(self, stage: str, total: int, state: dict) -> int:
        self.look()
        return 0

    def step(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.look()

    @torch.no_grad()
    def look(self) -> None:
        logprobs_all = self.world.logprobs_all(self.policy)
        self.seen.append(self.world.response_logprobs(logprobs_all).exp())


def goals(world: World, ref: Tensor, where: str, coef: float) -> tuple[Tensor, Tensor]:
    """The policy that training should end at, and pi*."""
    best, _ = world.optimum(ref, coef)
    return (best if where == "reward" else world.kl_loss_optimum(ref, coef)), best


def train(model: str, name: str, where: str, coef: float, seed: int, **changes):
    """Trains one policy; returns its Run, the world, and (S, V) of reference, policy and goal."""
    world, ref = WORLDS[name]()
    coefficients = {"kl_coef": coef if where == "reward" else 0.0}
    coefficients["kl_loss_coef"] = coef if where == "loss" else 0.0
    changes = (GPT2[where] if model == "gpt2" else {}) | changes
    if "batch_size" in changes:  # the whole batch at once
        sizes = ("minibatch_size", "micro_batch_size")
        changes |= dict.fromkeys(sizes, changes["batch_size"])
    config = replace(SETTINGS, **coefficients, **changes)
    policy, value_model = make_models(model, world, ref)
    ref_policy, start = frozen_copy(policy), time.process_time()
    prompts = world.prompts(config.batch_size)
    models, watch = (policy, ref_policy, value_model), Watch(world, policy)
    train_ppo(*models, world.score_fn, prompts, world, config, seed=seed, hooks=watch)
    seconds = time.process_time() - start  # of the one thread, whatever else the machine does
    ref, policy = (world.logprobs_all(m).detach() for m in (ref_policy, policy))
    goal, best = goals(world, ref, where, coef)
    started, ended = float(world.kl(ref, goal)), float(world.kl(policy, goal))
    distances = started, ended, float(world.kl(ref, best)), float(world.kl(goal, best))
    seen, there = torch.stack(watch.seen), world.response_logprobs(goal).exp()
    said = favourite(world, seen[-1], there), missing(world, seen, there, config.batch_size)
    run = Run(model, name, where, coef, seed, *distances, seconds, *said)
    return run, world, (ref, policy, goal)


def favourite(world: World, here: Tensor, there: Tensor) -> str:
    """What a policy says most, and how likely that is here and in the goal; both (Y,)."""
    y = int(here.argmax())
    return f"'{' '.join(world.text(world.responses[y]))}' {here[y]:.1%}, goal {there[y]:.1%}"


def missing(world: World, seen: Tensor, there: Tensor, batch_size: int) -> str:
    """What training has not reached: responses with less than a tenth of the goal's probability.

    seen: (1 + steps, Y) the policy at first and after each step
    there: (Y,) the goal
    """
    gone = seen[-1] < there / 10
    if not gone.any():
        return "no response is missing"
    y = int((there * gone).argmax())
    rare = (batch_size * seen[:-1, y] < 1).tolist()  # less than one sample expected in a step
    since = len(rare) - rare[::-1].index(False) if False in rare else 0
    when = f"from step {since} of {len(rare)} on" if since else f"in all {len(rare)} steps"
    name, total = " ".join(world.text(world.responses[y])), float(there[gone].sum())
    return (
        f"{int(gone.sum())} responses are missing that the goal gives {total:.1%} ('{name}' "
        f"{there[y]:.1%}, at first {seen[0, y]:.2%}, here {seen[-1, y]:.4%}, less than one sample "
        f"expected {when})"
    )


def plan(seeds: int) -> list[tuple]:
    """Every graded run: (model, world, where, coefficient, seed). GPT-2 has one coefficient."""
    return [
        (model, name, where, beta, seed)
        for model in ("table", "gpt2")
        for where in ("reward", "loss")
        for name, betas in BETAS.items()
        for beta in (betas if model == "table" else betas[1:2])
        for seed in range(seeds)
    ]


def runs_table(runs: list[Run]) -> str:
    """A row for each model, world and coefficient, a column for each seed."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.world, run.where, run.coef), []).append(run)
    most = max(map(len, groups.values()))
    head = ["policy", "world", "KL in", "beta, c2", "KL(ref, pi*)", "KL(goal, pi*)"]
    head += ["KL(ref, goal)", *(f"seed {n}" for n in range(most)), "worst", "nats", "seconds"]
    rows = []
    for key, group in groups.items():
        first, shares = group[0], [run.share for run in group]
        fixed = first.ref_to_best, first.goal_to_best, first.started
        cells = [f"{share:.2%}" for share in shares] + [""] * (most - len(group))
        ends = [run.ended for run in group]
        spread = f"{min(ends):.4f} to {max(ends):.4f}"
        took = f"{max(run.seconds for run in group):.0f}"
        cells += [f"**{max(shares):.2%}**", spread, took]
        rows.append([*map(str, key), *(f"{x:.3f}" for x in fixed), *cells])
    return table(head, rows)


def summary(runs: list[Run]) -> str:
    """A row for each model and place of the KL: what is left of the way, over all its runs."""
    rows = []
    for model, where in dict.fromkeys((run.model, run.where) for run in runs):
        group = [run for run in runs if (run.model, run.where) == (model, where)]
        shares = sorted(run.share for run in group)
        nats = [run.ended for run in group]
        middle = statistics.median(shares)
        spread = f"{shares[0]:.2%} to {shares[-1]:.2%}", f"{min(nats):.4f} to {max(nats):.4f}"
        passed = f"{sum(run.passed for run in group)} of {len(group)}"
        slowest = f"{max(run.seconds for run in group):.0f}"
        rows.append([model, where, passed, f"{middle:.2%}", *spread, slowest])
    head = ["policy", "KL in", "runs within 1%", "median left", "spread", "nats", "slowest, s"]
    return table(head, rows)


def changes_table(results: dict[str, list[Run]]) -> str:
    """What one changed setting does to the end of a training."""
    rows = []
    for change, runs in results.items():
        ends = [f"{run.ended:.4f}" for run in runs]
        rows.append([f"`{change}`", *ends, f"{max(r.share for r in runs):.2%}", runs[0].favourite])
    count = len(next(iter(results.values())))
    head = ["setting", *(f"seed {n}, nats" for n in range(count)), "worst", "seed 0 says most"]
    return table(head, rows)


def failures(runs: list[Run]) -> str:
    """Every run that missed a bound, with what the policy ended at."""
    missed = [
        f"- {r.model}, {r.world}, KL in the {r.where}, {r.coef}, seed {r.seed}: {r.share:.2%} of "
        f"{r.started:.3f} nats in {r.seconds:.0f} s; says most {r.favourite}; {r.missing}"
        for r in runs
        if not r.passed
    ]
    return "\n".join(missed) or f"None of {len(runs)}."


def small_table() -> str:
    """One trained policy of the smallest world with something to see, state by state."""
    world, ref = feelings_world(length=2)
    policy = TabularPolicy(world, ref)
    config = replace(SETTINGS, kl_coef=0.8, max_response_tokens=2)
    prompts, value_model = world.prompts(config.batch_size), TabularValue(world)
    ref_policy = frozen_copy(policy)
    train_ppo(policy, ref_policy, value_model, world.score_fn, prompts, world, config)
    return world.table(world.logprobs_all(policy), world.logprobs_all(ref_policy), 0.8)


def kl_loss_text(world: World, ref: Tensor, policy: Tensor, goal: Tensor, coef: float) -> str:
    """How far from pi* the KL loss ends, in numbers."""
    best, _ = world.optimum(ref, coef)
    names = {"reference": ref, "pi*": best, "fixed point of the KL loss": goal}
    names["trained with the KL in the loss"] = policy
    rows = []
    for name, x in names.items():
        score = float((world.response_logprobs(x).exp() * world.scores).sum())
        numbers = score, float(world.kl(x, ref)), float(world.objective(x, ref, coef))
        cells = [f"{n:.3f}" for n in numbers]
        rows.append([name, *cells, f"{float(world.kl(x, best)):.4f}"])
    head = ["policy", "mean score", "KL to the reference", "objective J", "KL(policy, pi*)"]
    return table(head, rows)


def draw() -> None:
    """Writes docs/img/oracle.png and the tables of docs/oracle.md."""
    run, world, (ref, policy, best) = train("table", "feelings", "reward", 0.8, seed=0)
    shares = {"pi_ref": ref, "pi_theta, trained by PPO": policy, "pi*": best}
    groups = {n: world.response_logprobs(x).exp().tolist() for n, x in shares.items()}
    labels = [" ".join(world.text(y)) for y in world.responses]
    (DOCS / "img").mkdir(exist_ok=True)
    figure = probability_bars(labels, groups)
    figure.savefig(DOCS / "img" / "oracle.png", dpi=110, metadata={"Software": None})
    text = f"KL(ref, pi\\*) is {run.started:.3f} nats, KL(trained, pi\\*) {run.ended:.4f} nats: "
    replace_block(DOCS / "oracle.md", "distance", f"{text}{run.share:.2%} of the way is left.")
    replace_block(DOCS / "oracle.md", "states", f"```text\n{small_table()}\n```")
    _, world, tables = train("table", "feelings", "loss", 0.5, seed=0)
    replace_block(DOCS / "oracle.md", "kl-loss", kl_loss_text(world, *tables, 0.5))


def one_run(case: tuple, changes: dict) -> Run:
    """A training of the plan, in a process of its own."""
    return train(*case, **changes)[0]


def main(seeds: int = 8, change_seeds: int = 3, processes: int = 2, figure: bool = False) -> None:
    """Grade train_ppo against the exact optimum of two small worlds.

    Args:
        seeds: Trainings of each model, world, coefficient and place of the KL.
        change_seeds: Trainings with each of the changed settings that the results show.
        processes: Trainings at a time, each on one thread.
        figure: Only draw the figure and fill in the tables of docs/oracle.md; no grading.
    """
    torch.set_num_threads(1)
    if figure:
        draw()
        return
    graded, changed = plan(seeds), []
    for name in CHANGES:
        where = "loss" if "KL in the loss" in name else "reward"
        case = name.split(",")[0], "scattered", where, 0.5
        changed += [(*case, seed) for seed in range(change_seeds)]
    settings = [{}] * len(graded) + [c for c in CHANGES.values() for _ in range(change_seeds)]
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        todo = pool.map(one_run, graded + changed, settings)
        done = list(tqdm(todo, desc="trainings", unit="run", total=len(settings)))
    runs, rest = done[: len(graded)], iter(done[len(graded) :])
    results = {name: [next(rest) for _ in range(change_seeds)] for name in CHANGES}
    for name, text in (("runs", runs_table(runs)), ("failures", failures(runs)),
                       ("changes", changes_table(results))):  # fmt: skip
        replace_block(DOCS / "oracle_results.md", name, text)
    replace_block(DOCS / "results.md", "oracle", summary(runs))
    missed = [run for run in runs if not run.passed]
    outside = [r for r in runs if not NATS[0] <= r.ref_to_best <= NATS[1]]
    print(f"{len(runs) - len(missed)} of {len(runs)} runs pass; {len(outside)} have KL(ref, pi*) "
          f"outside {NATS[0]} to {NATS[1]} nats")  # fmt: skip
    sys.exit(1 if missed or outside else 0)


if __name__ == "__main__":
    tyro.cli(main)
