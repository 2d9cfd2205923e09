"""TRL's side, and that of `transformers`: the same weights, prompts and settings in their trainers.

The settings that cost time without being PPO are off: logging, saving, evaluation, tables of
samples. README.md in this folder says what is equal and what is not.
"""

import contextlib
import inspect
import io
import tempfile
import textwrap
import time

import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig, PrinterCallback, TrainerCallback

from minippo.batching import left_pad
from minippo.config import PPOConfig
from minippo.models import Policy, RewardModel, frozen_copy, load_tokenizer

from .gold import PROMPTS, judged
from .turns import Pace, Turns
from .workloads import (
    WORKLOADS,
    World,
    build,
    lr_factor,
    pairs_of,
    plain_gelu,
    ranked_answers,
    shipped_world,
)

QUIET = {
    "report_to": "none", "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no",
    "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "seed": 0,
}  # fmt: skip


def standardised_head(reward_model: RewardModel, mean: float, std: float) -> nn.Module:
    """The classifier inside a reward model, giving (score - mean) / std: TRL has no such option."""
    classifier = frozen_copy(reward_model.classifier)
    head = nn.Linear(classifier.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(classifier.score.weight / std)
        head.bias.fill_(-mean / std)
    classifier.score = head
    return classifier.eval().requires_grad_(False)


def settings(config: PPOConfig, folder: str, ends: bool, **options):
    """TRL's settings for what `config` says.

    One micro-batch is a minibatch: with gradient accumulation TRL's optimizer would step once per
    epoch, whatever the number of minibatches.
    ends: whether answers may end in EOS
    """
    from trl.experimental.ppo import PPOConfig as Settings

    stop = {"stop_token": "eos", "missing_eos_penalty": config.missing_eos_penalty} if ends else {}
    return Settings(
        output_dir=folder, per_device_train_batch_size=config.batch_size,
        num_mini_batches=config.batch_size // config.minibatch_size,
        num_ppo_epochs=config.ppo_epochs, total_episodes=config.steps * config.batch_size,
        local_rollout_forward_batch_size=config.batch_size, num_sample_generations=0,
        response_length=config.max_response_tokens, temperature=config.temperature,
        kl_coef=config.kl_coef, kl_estimator="k1", cliprange=config.clip_range,
        cliprange_value=config.value_clip_range, vf_coef=config.vf_coef, gamma=config.gamma,
        lam=config.lam, **stop, **{**QUIET, **options},
    )  # fmt: skip


def trainer(world: World, config: PPOConfig, folder: str, callback, ends=True, lr=None, seed=0):
    """TRL's PPOTrainer on a world's models; the critic has a learning rate of its own, as ours.

    lr: step -> factor of both learning rates; 1 if None
    """
    from trl.experimental.ppo import PPOTrainer

    value_model = world.value_model.classifier
    groups = [{"params": list(world.policy.parameters()), "lr": config.lr}]
    groups += [{"params": list(value_model.parameters()), "lr": config.value_lr}]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr or (lambda step: 1.0))
    world.tokenizer.padding_side = "left"
    made = PPOTrainer(
        args=settings(config, folder, ends, seed=seed), processing_class=world.tokenizer,
        model=world.policy, ref_model=frozen_copy(world.policy),
        reward_model=standardised_head(world.reward_model, *world.stats),
        value_model=value_model, train_dataset=Dataset.from_dict({"input_ids": world.prompts}),
        optimizers=(optimizer, schedule), callbacks=[callback],
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


class Lengths:
    """Reads the lengths of the answers where the reward model is asked: the only time it is."""

    def __init__(self, reward_model: nn.Module, response_length: int):
        self.response_length, self.rows = response_length, []
        reward_model.base_model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, arguments, named) -> None:
        """The hook; the last `response_length` columns are the response."""
        mask = named["attention_mask"]
        query = mask[:, : -self.response_length].sum(1).tolist()
        response = mask[:, -self.response_length :].sum(1).tolist()
        self.rows = list(zip(query, response, strict=True))


class TurnCallback(TrainerCallback):
    """A callback that lets a trainer wait for its turn."""

    def __init__(self, pace: Pace):
        self.pace = pace

    def on_train_begin(self, args, state, control, **others) -> None:
        self.pace.start()

    def on_step_end(self, args, state, control, **others) -> None:
        self.pace.step(state.global_step)


def ppo_steps(turns: Turns, workload: str, count: int) -> None:
    """A turn is one step of TRL's PPOTrainer; sends the (query, response) lengths of its answers.

    A turn ends where a step does, after its metrics; what TRL frees after that belongs to the next.
    """
    chosen = WORKLOADS[workload]
    callback = TurnCallback(Pace(turns, 1, count, lambda: {"lengths": lengths.rows}))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ends = chosen.shape is None
        world = build(chosen)
        if chosen.shape is not None:
            plain_gelu(world)  # a GPT-2 as transformers makes it
        made = trainer(world, chosen.config(count), folder, callback, ends)
        lengths = Lengths(made.reward_model, chosen.response_tokens)
        made.train()


def generation(turns: Turns, workload: str, count: int) -> None:
    """A turn samples an answer to each prompt with `model.generate`."""
    world, limit = build(WORKLOADS[workload]), WORKLOADS[workload].response_tokens
    pad_id, eos_id = world.tokenizer.pad_token_id, world.tokenizer.eos_token_id
    query, query_mask = left_pad(world.prompts, pad_id)
    query = query.masked_fill(~query_mask, 0)
    ends = {"eos_token_id": eos_id, "pad_token_id": pad_id}
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    config = GenerationConfig(max_new_tokens=limit, **sampling, **ends)
    turns.ready()
    for _ in range(count):
        turns.begin()
        with torch.no_grad():
            tokens = world.policy.generate(
                input_ids=query, attention_mask=query_mask.long(), generation_config=config
            )
        turns.end(work=int((tokens[:, query.shape[1] :] != pad_id).sum()))


def advantage_lines() -> str:
    """TRL's own lines for GAE, which stand inside its `train`."""
    from trl.experimental.ppo import PPOTrainer

    source = inspect.getsource(PPOTrainer.train)
    begin, end = "# 6. compute advantages and returns\n", "advantages = masked_whiten"
    return textwrap.dedent(source[source.index(begin) + len(begin) : source.index(end)].rstrip(" "))


def advantages(turns: Turns, calls: int, answers: int, length: int, count: int) -> None:
    """A turn is `calls` times GAE by TRL's own lines."""
    rewards, values = torch.randn(2, answers, length)
    names = {"torch": torch, "rewards": rewards, "values": values, "args": PPOConfig()}
    names["responses"], code = rewards, compile(advantage_lines(), "trl", "exec")
    turns.ready()
    for _ in range(count):
        turns.begin()
        for _ in range(calls):
            exec(code, names)
        turns.end(work=calls)


def reward_training(turns: Turns, rankings: int, rankings_a_step: int, count: int) -> None:
    """A turn is one pass of TRL's RewardTrainer over all pairs of the rankings."""
    from trl import RewardConfig, RewardTrainer

    pairs, tokenizer = pairs_of(ranked_answers(rankings)), load_tokenizer("sft")
    batch_size = rankings_a_step * len(pairs) // rankings
    sides = [[row.prompt + row.responses[side] for row in pairs] for side in (0, 1)]
    dataset = Dataset.from_dict({"chosen_ids": sides[0], "rejected_ids": sides[1]})
    steps, facts = len(pairs) // batch_size, {"work": len(pairs)}
    callback = TurnCallback(Pace(turns, steps, count, lambda: facts))
    options = {"learning_rate": 1e-4, "num_train_epochs": count, "adam_epsilon": 1e-5}
    options |= {"per_device_train_batch_size": batch_size, "warmup_steps": 20}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = RewardConfig(output_dir=folder, **options, **QUIET)
        made = RewardTrainer(
            model=RewardModel.from_policy(Policy.from_pretrained("sft")).classifier, args=args,
            train_dataset=dataset, processing_class=tokenizer, callbacks=[callback],
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        made.train()


class TimeIsUp(Exception):
    """Raised at the end of a step: TRL's loop has no other way out."""


class Clock(TrainerCallback):
    """Stops a training after so many seconds; its learning rate falls with the time."""

    def __init__(self, turns: Turns, seconds: float, warmup_steps: int):
        self.turns, self.seconds, self.warmup_steps = turns, seconds, warmup_steps
        self.began, self.spent, self.steps = None, 0.0, 0

    def factor(self, step: int) -> float:
        """Of the learning rate; asked once before the training begins."""
        spent = time.perf_counter() - self.began if self.began else 0.0
        return lr_factor(1 - spent / self.seconds, step, self.warmup_steps)

    def on_train_begin(self, args, state, control, **others) -> None:
        self.turns.ready()
        self.turns.begin()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **others) -> None:
        self.spent, self.steps = time.perf_counter() - self.began, state.global_step
        if self.spent >= self.seconds:
            raise TimeIsUp


def train_for(turns: Turns, seconds: float, seed: int, held_out: int, count: int) -> None:
    """TRL's PPO from the shipped models for so many seconds; sends the gold of what came out."""
    config = PPOConfig(steps=100_000)
    world, clock = shipped_world(PROMPTS), Clock(turns, seconds, config.warmup_steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        made = trainer(world, config, folder, clock, lr=clock.factor, seed=seed)
        with contextlib.suppress(TimeIsUp):
            made.train()
    facts = {"steps": clock.steps, "trained_seconds": clock.spent}
    turns.end(**facts, **judged(world.policy, world.tokenizer, held_out, seed))
