"""Every setting of every stage, in frozen dataclasses; the command line is made from them.

Each config checks itself when it is made, so a wrong setting is refused before anything is loaded
or trained.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

_PACKAGE = Path(__file__).parent
# The wheel carries the data inside the package; in a checkout it stands beside it.
DATA_DIR = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent / "data"

# A number must be greater than 0. These may be 0 as well, which turns off what they are about.
_MAY_BE_ZERO = ("warmup_steps", "kl_coef", "kl_loss_coef", "vf_coef", "missing_eos_penalty")
_MAY_BE_ZERO += ("gamma", "lam", "best_of", "samples", "seed")
# Where a config has both fields, the first must divide the second.
_DIVIDES = (("n_head", "n_embd"), ("minibatch_size", "batch_size"))
_DIVIDES += (("micro_batch_size", "minibatch_size"), ("micro_batch_size", "batch_size"))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


class _Settings:
    """What every config refuses when it is made: numbers and sizes that cannot work."""

    def __post_init__(self):
        kind, values = type(self).__name__, {f.name: getattr(self, f.name) for f in fields(self)}
        for field in fields(self):
            name, value = field.name, values[field.name]
            is_number = field.default is None or type(field.default) in (int, float)
            if not is_number or (value is None and field.default is None):
                continue
            _require(math.isfinite(value), f"{kind}.{name} is {value}; it must be a finite number")
            if name in _MAY_BE_ZERO:
                _require(value >= 0, f"{kind}.{name} is {value}; it must not be negative")
            else:
                _require(value > 0, f"{kind}.{name} is {value}; it must be greater than 0")
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint) if get_origin(hint) is Literal else (values[name],)
            message = f"{kind}.{name} is {values[name]!r}; choose one of {choices}"
            _require(values[name] in choices, message)
        for small, big in _DIVIDES:
            if small in values and big in values:
                message = f"{kind}.{big} ({values[big]}) is not a multiple of "
                message += f"{kind}.{small} ({values[small]}); choose one that divides it"
                _require(values[big] % values[small] == 0, message)


@dataclass(frozen=True)
class PretrainConfig(_Settings):
    """The base model: a tiny GPT-2 and its tokenizer, trained on the text of the data set."""

    steps: int = 16_000  # optimizer steps; 1,000 learn to spell, 16,000 what belongs to what
    batch_size: int = 32  # texts a step; 16 to 512. Tiny models learn most per second from few
    lr: float = 3e-3  # peak learning rate, falling to 0; 1e-3 to 5e-3 for tiny models
    warmup_steps: int = 100  # linear warm-up; 1% to 10% of the steps
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0.5 to 1
    vocab_size: int = 3072  # at most, of the byte-level BPE; TinyHH needs 2,896, GPT-2 has 50,257
    n_layer: int = 2  # transformer blocks; GPT-2 has 12
    n_embd: int = 120  # width; GPT-2 has 768
    n_head: int = 4  # attention heads; must divide n_embd; GPT-2 has 12
    n_positions: int = 256  # longest sequence in tokens; GPT-2 has 1,024
    save_every: int = 500  # steps between checkpoints; 10 to 1,000


@dataclass(frozen=True)
class SFTConfig(_Settings):
    """Supervised fine-tuning: imitate the demonstrations, response tokens only."""

    steps: int = 150  # optimizer steps; 1 to 3 passes over the demonstrations
    batch_size: int = 64  # demonstrations a step; 16 to 512
    micro_batch_size: int = 32  # of them in the model at once; same result, less memory; 1 and up
    lr: float = 2e-4  # peak learning rate, falling to 0; 1e-5 for billions of parameters
    warmup_steps: int = 10  # linear warm-up; 1% to 10% of the steps
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0.5 to 1
    max_prompt_tokens: int = 128  # longer prompts are dropped and counted; 64 to 4,096
    max_response_tokens: int = 48  # longer answers are dropped and counted; 32 to 4,096
    save_every: int = 50  # steps between checkpoints; 10 to 1,000


@dataclass(frozen=True)
class RewardConfig(_Settings):
    """The reward model: all K(K-1)/2 pairs of a prompt in one batch, each answer read once."""

    # candidates: what the SFT model answers, ranked by the annotator; pairs: those of the data set;
    # auto: candidates for TinyHH, which has an annotator, else pairs
    source: Literal["auto", "candidates", "pairs"] = "auto"
    prompts: int = 6000  # prompts that candidates are sampled for; 1,000 to 30,000
    candidates: int = 8  # K, answers a prompt; InstructGPT had 4 to 9
    epochs: int = 2  # passes over the rankings; 1, or 2 while held-out pairs still improve
    batch_size: int = 8  # prompts (K answers each) a step; 4 to 64
    micro_batch_size: int = 8  # prompts in the model at once; same result, less memory; 1 and up
    lr: float = 1e-3  # peak learning rate, falling to 0; 1e-5 for billions of parameters
    warmup_steps: int = 20  # linear warm-up; 1% to 10% of the steps
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0.5 to 1
    margin: bool = False  # subtract the annotator's score gap in the loss (Llama 2); pairs only
    held_out: int = 256  # at most so many prompts measure the agreement; 100 to 1,000
    max_prompt_tokens: int = 128  # longer prompts are dropped and counted; 64 to 4,096
    max_response_tokens: int = 48  # a ranking with a longer answer is dropped; 32 to 4,096
    save_every: int = 100  # steps between checkpoints; 10 to 1,000

    def __post_init__(self):
        message = f"RewardConfig.candidates is {self.candidates}; a ranking needs at least 2"
        _require(self.candidates >= 2, message)
        message = "RewardConfig.margin needs given pairs; add --source pairs"
        _require(not self.margin or self.source != "candidates", message)
        super().__post_init__()


@dataclass(frozen=True)
class ValueConfig(_Settings):
    """Critic warm-up: the mean reward of a prompt's answers, before PPO begins."""

    prompts: int = 1024  # prompts whose answers are scored; 500 to 10,000
    candidates: int = 4  # answers a prompt, averaged to V(x); 1 to 16
    epochs: int = 2  # passes over the prompts; 1 to 4
    batch_size: int = 64  # prompts a step; 16 to 512
    lr: float = 5e-4  # peak learning rate, falling to 0; 1e-5 for billions of parameters
    warmup_steps: int = 5  # linear warm-up; 1% to 10% of the steps
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0.5 to 1
    held_out: int = 128  # prompts kept for the explained variance; 2 and more
    save_every: int = 50  # steps between checkpoints; 10 to 1,000

    def __post_init__(self):
        message = f"ValueConfig.held_out is {self.held_out}; a variance needs at least 2 prompts"
        _require(self.held_out >= 2, message)
        super().__post_init__()


@dataclass(frozen=True)
class PPOConfig(_Settings):
    """PPO. A rollout of `batch_size` answers, then `ppo_epochs` passes in minibatches."""

    steps: int = 80  # rollouts, each followed by its updates; 50 to 10,000
    batch_size: int = 128  # prompts (and answers) a rollout; 64 to 512
    minibatch_size: int = 64  # answers an optimizer step; 1/4 of the rollout to all of it
    micro_batch_size: int = 16  # answers in the models at once; same result, less memory; 1 and up
    ppo_epochs: int = 2  # passes over a rollout; 1 to 4
    lr: float = 3e-4  # of the policy, falling to 0; 1e-6 for billions of parameters
    value_lr: float = 5e-4  # of the critic, falling to 0; 1 to 10 times lr
    warmup_steps: int = 5  # linear warm-up; 1% to 10% of the steps
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, each model's own; 0.5 to 1
    kl_coef: float = 0.03  # beta, the KL penalty in the reward; 0.01 to 0.2
    kl_estimator: Literal["kl", "abs", "mse", "k3", "full"] = "kl"  # see kl.py: kl is the sound one
    kl_loss_coef: float = 0.0  # c2, the KL as a term of the loss; 0 turns it off, else 0.001 to 0.1
    kl_loss_estimator: Literal["full", "mse", "k3"] = "full"  # k3 follows KL(ref, policy)
    target_kl: float | None = None  # KL per sequence an adaptive kl_coef aims at; 3 to 10 nats
    kl_horizon: int = 10_000  # answers over which the adaptive kl_coef reacts; 1,000 to 100,000
    advantage: Literal["gae", "simple"] = "gae"  # per-token GAE, or R(x, y) - V(x) per answer
    gamma: float = 1.0  # discount; 1 for answers, which end
    lam: float = 0.95  # lambda of GAE; 1 is unbiased, smaller is less noisy; 0.9 to 1
    whiten_advantages: bool = True  # mean 0, variance 1 over the rollout
    clip_range: float = 0.2  # epsilon of the policy ratio; 0.1 to 0.3
    value_clip_range: float = 0.2  # epsilon of the value clip; 0.1 to 0.5
    vf_coef: float = 1.0  # c1, weight of the value loss; 0.1 to 1, less where the trunk is shared
    temperature: float = 1.0  # divides the logits in rollout, update and reference; 0.7 to 1
    missing_eos_penalty: float = 1.0  # subtracted from the score of an endless answer; 0 to 2
    standardize_scores: bool = True  # by mean and std of the reward model on reference samples
    stop_kl: float | None = None  # stop when KL per sequence exceeds this; 10 to 50 nats
    stop_patience: int | None = None  # stop after so many steps without a better score; 20 to 100
    max_prompt_tokens: int = 128  # longer prompts are dropped and counted; 64 to 4,096
    max_response_tokens: int = 48  # answers are cut here; 32 to 4,096
    save_every: int = 10  # steps between checkpoints; 1 to 100

    def __post_init__(self):
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"PPOConfig.{name} is {value}; it must lie in [0, 1]")
        reasons = {"kl": "its expected gradient in the loss is zero"}
        reasons["abs"] = "it estimates no divergence"
        name = self.kl_loss_estimator
        message = f"kl_loss_estimator={name!r} is refused: {reasons.get(name)}; use full, mse or k3"
        _require(name not in reasons, message)
        super().__post_init__()


@dataclass(frozen=True)
class EvalConfig(_Settings):
    """Evaluation on prompts nobody trained on."""

    # test: what is reported; validation: what settings are chosen on (TinyHH has both)
    prompts_of: Literal["test", "validation"] = "test"
    prompts: int = 512  # prompts that are answered; 200 to 2,000
    best_of: int = 16  # n of best-of-n by the same reward model; 4 to 64, 0 skips it
    samples: int = 10  # answers shown side by side in the report; 0 to 100
    temperature: float = 1.0  # of the sampling; 1 is the policy itself
    max_prompt_tokens: int = 128  # longer prompts are dropped and counted; 64 to 4,096
    max_response_tokens: int = 48  # answers are cut here; 32 to 4,096


@dataclass(frozen=True)
class RunConfig(_Settings):
    """Where a run reads, writes and computes."""

    name: str = "demo"  # the run's folder is runs/NAME
    out: Path = Path("runs")  # the folder of all runs
    data: str = "tiny_hh"  # tiny_hh, a file, a folder or a hub name
    split: str = ""  # of --data, where it has several, such as train
    limit: int | None = None  # use only this many rows of --data FILE
    base: str = "base"  # where to start: a shipped checkpoint's name, a folder or a hub name
    seed: int = 0  # of everything random; 0 and up
    device: str = "auto"  # auto takes cuda if there, else cpu
    # bf16: matrix products in bfloat16, weights and formulas in float32; auto: bf16 on CUDA
    autocast: Literal["auto", "bf16", "off"] = "auto"
    tf32: bool = False  # products that stay in float32 in TF32 on CUDA: faster, 10 bits of mantissa
    compile: bool = False  # torch.compile on CUDA: faster steps after some minutes of compiling
    gradient_checkpointing: bool = False  # a third more time for a fraction of the activations
    # of the weights of the two frozen models in PPO, reference and reward; bfloat16 halves them
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    fsdp: bool = False  # under torchrun: split models that do not fit one device over all of them
    resume: bool = False  # go on where an interrupted run stopped

    def __post_init__(self):
        _require(bool(self.name), "RunConfig.name is empty; give the run a name")
        message = f"RunConfig.name is {self.name!r}; a name has no '/', --out gives the folder"
        _require(Path(self.name).name == self.name != "..", message)
        super().__post_init__()

    def options(self) -> str:
        """The options that name this run in a command; without them a command means `demo`."""
        out = "" if self.out == type(self).out else f" --out {self.out}"
        data = "" if self.data == type(self).data else f" --data {self.data}"
        return f"--name {self.name}{data}{out}"
