"""What is run: three workloads, and the models, prompts and settings of each."""

import json
from dataclasses import dataclass
from itertools import combinations

from minippo.config import DATA_DIR, PPOConfig

# Small, so that the answers stay as long as the first policy's; the cost of a step is the same.
LR = 1e-6


@dataclass(frozen=True)
class Workload:
    """One PPO step: rollout, scores, and 4 epochs of 2 minibatches."""

    about: str  # what a reader of the table needs to know
    prompts: int
    response_tokens: int  # at most; exactly, where there is no EOS
    shape: tuple[int, int, int, int] | None = None  # n_layer, n_embd, n_head, vocabulary; random
    query_tokens: int | None = None  # of each random prompt
    micro_batch_size: int = 16  # of minippo; a whole minibatch where all answers are as long

    def config(self, steps: int, ours: bool = False) -> PPOConfig:
        """The settings of both sides; minippo reads a minibatch in micro-batches."""
        half = self.prompts // 2
        return PPOConfig(
            steps=steps, batch_size=self.prompts, minibatch_size=half,
            micro_batch_size=self.micro_batch_size if ours else half,
            ppo_epochs=4, lr=LR, value_lr=LR, max_response_tokens=self.response_tokens,
            missing_eos_penalty=1.0 if self.shape is None else 0.0,
        )  # fmt: skip


WORKLOADS = {
    "tiny": Workload(
        "a random GPT-2 of 2 layers, 128 wide, vocabulary 512; "
        "64 prompts of 16 tokens, answers of exactly 32",
        64, 32, (2, 128, 4, 512), 16, 32,
    ),
    "natural": Workload(
        "the shipped SFT policy, reward and value model; "
        "64 TinyHH prompts, answers up to EOS, at most 48 tokens",
        64, 48,
    ),
    "gpt2": Workload(
        "random weights in the shape of GPT-2 small, 12 layers, 768 wide, vocabulary 50,257; "
        "8 prompts of 32 tokens, answers of exactly 32",
        8, 32, (12, 768, 12, 50_257), 32, 4,
    ),
}  # fmt: skip


@dataclass
class World:
    """What both sides start from, built from the same seeds in each process."""

    policy: object
    reward_model: object
    value_model: object
    tokenizer: object
    prompts: list[list[int]]
    stats: tuple[float, float]  # mean and std that scores are standardised with


def build(workload: Workload) -> World:
    """Models, tokenizer and prompts of a workload."""
    return shipped_world(workload.prompts) if workload.shape is None else _random_world(workload)


def shipped_world(prompts: int) -> World:
    """The shipped checkpoints and the first PPO prompts of TinyHH."""
    from minippo.batching import encode_rows
    from minippo.models import Policy, RewardModel, ValueModel, load_tokenizer
    from minippo.worlds.tinyhh.rows import prompt_rows

    tokenizer, reward_model = load_tokenizer("sft"), RewardModel.from_pretrained("reward")
    kept, _ = encode_rows(prompt_rows("ppo", prompts), tokenizer, PPOConfig().max_prompt_tokens, 1)
    stats = (reward_model.mean, reward_model.std)
    models = (Policy.from_pretrained("sft"), reward_model, ValueModel.from_pretrained("value"))
    return World(*models, tokenizer, [row.prompt for row in kept], stats)


def _random_world(workload: Workload) -> World:
    import torch

    from minippo.models import RewardModel, ValueModel, tiny_gpt2

    n_layer, n_embd, n_head, vocab_size = workload.shape
    tokenizer = bare_tokenizer(vocab_size)
    context = workload.query_tokens + workload.response_tokens
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    policy = tiny_gpt2(vocab_size, n_layer, n_embd, n_head, context, *ends)
    reward_model = RewardModel.from_policy(policy)
    size, generator = (workload.prompts, workload.query_tokens), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocab_size, size, generator=generator).tolist()
    value_model = ValueModel.from_reward_model(reward_model)
    return World(policy, reward_model, value_model, tokenizer, prompts, (0.0, 1.0))


def plain_gelu(world: World) -> None:
    """Gives a world's models the GELU that transformers' GPT-2 has, of eight operations."""
    from transformers.activations import ACT2FN

    for model in (world.policy, world.reward_model, world.value_model):
        for module in model.modules():
            for name, part in module.named_children():
                if name == "act" and type(part).__name__ == "GELUTanh":
                    setattr(module, name, ACT2FN["gelu_new"])


def bare_tokenizer(vocab_size: int):
    """A tokenizer whose padding and EOS come after the vocabulary: no model can sample them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0")
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), padding_side="left", **names)


def ranked_answers(count: int) -> list:
    """The first shipped rankings of four answers, best first, tokenised as `Encoded` rows."""
    from minippo.app.sources import Source
    from minippo.batching import encode_rows
    from minippo.models import load_tokenizer

    limits = (PPOConfig().max_prompt_tokens, PPOConfig().max_response_tokens)
    rankings, _ = Source("tiny_hh").rankings()
    return encode_rows(rankings, load_tokenizer("sft"), *limits, ("candidates",))[0][:count]


def pairs_of(rankings: list) -> list:
    """All pairs of each ranking, as rows of two responses, the better one first."""
    from minippo.batching import Encoded

    both = [(row, pair) for row in rankings for pair in combinations(row.responses, 2)]
    return [Encoded(row.row, row.prompt, list(pair)) for row, pair in both]


def lr_factor(left: float, step: int, warmup_steps: int) -> float:
    """The learning rate by the share of the time that is left: a warm-up, then down to 0."""
    return max(0.0, min(left, (step + 1) / (warmup_steps + 1)))


def shape_of(workload: Workload) -> tuple[int, int, int]:
    """n_layer, n_embd and vocabulary of a workload's models, read from where they are defined."""
    if workload.shape:
        n_layer, n_embd, _, vocab_size = workload.shape
        return n_layer, n_embd, vocab_size
    file = DATA_DIR / "checkpoints" / "sft" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    return config["n_layer"], config["n_embd"], config["vocab_size"]
