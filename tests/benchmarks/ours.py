"""minippo's side: each public function runs in a process of its own and takes turns."""

import itertools
import time

import torch

from minippo.advantages import gae
from minippo.app.launch import keep_freed_memory
from minippo.batching import epoch_batches, left_pad
from minippo.config import PPOConfig, RewardConfig
from minippo.generation import generate
from minippo.models import Policy, RewardModel, frozen_copy
from minippo.optim import Hooks, adamw, finite_metrics
from minippo.ppo import ppo_update
from minippo.reward_training import train_reward_model
from minippo.rollout import collect_rollout, rollout_metrics

from .gold import PROMPTS, judged
from .turns import Pace, Turns
from .workloads import WORKLOADS, World, build, lr_factor, pairs_of, ranked_answers, shipped_world


class Trainer:
    """The body of `train_ppo`'s loop, one step a call, so that it can wait between two."""

    def __init__(self, world: World, config: PPOConfig, seed: int = 0):
        keep_freed_memory()  # as the command does
        self.world, self.config, self.seed = world, config, seed
        self.models = (world.policy, frozen_copy(world.policy), world.value_model)
        for model in (*self.models, world.reward_model):
            model.eval()
        trained = {"policy": world.policy, "value": world.value_model}
        self.optimizer = adamw(trained, {"policy": config.lr, "value": config.value_lr})
        lengths = [len(prompt) for prompt in world.prompts]
        epochs = (epoch_batches(lengths, config.batch_size, seed, e) for e in itertools.count())
        self.plan = enumerate(itertools.chain.from_iterable(epochs))

    def step(self, lr_factor: float = 1.0):
        """One PPO step; returns its rollout and its metrics."""
        world, config = self.world, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        step, rows = next(self.plan)
        rollout = collect_rollout(
            *self.models, world.reward_model, [world.prompts[i] for i in rows], world.tokenizer,
            config, score_stats=world.stats, seed=self.seed, step=step, rows=rows,
        )  # fmt: skip
        acted = finite_metrics("ppo", step, rollout_metrics(rollout, world.tokenizer.eos_token_id))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        stats = ppo_update(*self.models, self.optimizer, rollout, config, generator)
        return rollout, acted | finite_metrics("ppo", step, stats, self.optimizer)


def ppo_steps(turns: Turns, workload: str, count: int) -> None:
    """A turn is one PPO step; sends the (query, response) lengths of its answers."""
    trainer = Trainer(build(WORKLOADS[workload]), WORKLOADS[workload].config(count, ours=True))
    turns.ready()
    for _ in range(count):
        turns.begin()
        rollout, _ = trainer.step()
        turns.end(lengths=query_and_response(rollout.attention_mask, rollout.mask.shape[1]))


def query_and_response(attention_mask: torch.Tensor, response_length: int) -> list[tuple[int, int]]:
    """(query, response) tokens of each row of a mask (B, T)."""
    query = attention_mask[:, :-response_length].sum(1).tolist()
    response = attention_mask[:, -response_length:].sum(1).tolist()
    return list(zip(query, response, strict=True))


def rate(turns: Turns, count: int) -> None:
    """A turn measures the rate of large float32 matrix products."""
    from minippo.app.stages import matmul_gflops  # whose imports would be charged to the PPO side

    turns.ready()
    for _ in range(count):
        turns.begin()
        turns.end(gflops=matmul_gflops())


def generation(turns: Turns, workload: str, count: int) -> None:
    """A turn samples an answer to each prompt of a workload."""
    world, limit = build(WORKLOADS[workload]), WORKLOADS[workload].response_tokens
    pad_id, eos_id = world.tokenizer.pad_token_id, world.tokenizer.eos_token_id
    query, query_mask = left_pad(world.prompts, pad_id)
    turns.ready()
    for step in range(count):
        turns.begin()
        response = generate(world.policy, query, query_mask, limit, eos_id, pad_id, 0, step)
        turns.end(work=int((response != pad_id).sum()))


def advantages(turns: Turns, calls: int, answers: int, length: int, count: int) -> None:
    """A turn is `calls` times GAE over answers of full length."""
    rewards, values = torch.randn(2, answers, length)
    mask = torch.ones(answers, length, dtype=torch.bool)
    turns.ready()
    for _ in range(count):
        turns.begin()
        for _ in range(calls):
            gae(rewards, values, mask)
        turns.end(work=calls)


class TurnHooks(Hooks):
    """Hooks that let a training wait for its turn."""

    def __init__(self, pace: Pace):
        self.pace = pace

    def start(self, stage, total, state) -> int:
        self.pace.start()
        return 0

    def step(self, stage, step, metrics) -> None:
        self.pace.step(step + 1)


def reward_training(
    turns: Turns, rankings: int, rankings_a_step: int, as_pairs: bool, count: int
) -> None:
    """A turn is one pass over the rankings, as they are or as all their pairs."""
    rows, batch_size = ranked_answers(rankings), rankings_a_step
    pairs = pairs_of(rows)
    if as_pairs:
        rows, batch_size = pairs, rankings_a_step * len(pairs) // rankings
    sizes = {"batch_size": batch_size, "micro_batch_size": batch_size}
    config = RewardConfig(epochs=count, lr=1e-4, **sizes)
    policy = Policy.from_pretrained("sft")
    pace = Pace(turns, len(rows) // batch_size, count, lambda: {"work": len(pairs)})
    reward_model = RewardModel.from_policy(policy)
    pad_id = policy.config.pad_token_id
    train_reward_model(reward_model, rows, config, pad_id=pad_id, hooks=TurnHooks(pace))


def train_for(turns: Turns, seconds: float, seed: int, held_out: int, count: int) -> None:
    """PPO from the shipped models for so many seconds; sends the gold of what came out.

    seconds: 0 judges the SFT policy as it is
    """
    world = shipped_world(PROMPTS)
    config, steps = PPOConfig(), 0
    trainer = Trainer(world, config, seed)
    turns.ready()
    turns.begin()
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        trainer.step(lr_factor(1 - spent / seconds, steps, config.warmup_steps))
        steps += 1
    facts = {"steps": steps, "trained_seconds": spent}
    turns.end(**facts, **judged(world.policy, world.tokenizer, held_out, seed))
