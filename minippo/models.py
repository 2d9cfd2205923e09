"""The four models: policy, reference, reward model and value model, over any decoder-only Hugging Face backbone.

Dropout is off in all of them: they stay in eval mode, through which gradients flow just as well.
"""

import copy
import inspect
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from minippo.config import DATA_DIR
from minippo.logprobs import response_window

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # library calls are silent


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding changes nothing.

    attention_mask: (B, T)  True (1) where a token is real
    returns: (B, T)         cumsum(attention_mask) - 1, clamped at 0
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def tiny_gpt2(vocab_size, n_layer=2, n_embd=128, n_head=4, n_positions=256, eos_id=1, pad_id=0, seed=0):
    """A freshly initialised `transformers` GPT-2 without dropout; returns a GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_positions=n_positions,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's gelu_new, in one kernel
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def resolve_checkpoint(path_or_name) -> str:
    """The folder of a shipped checkpoint ("base", "sft", "reward", "value", "ppo"), or what was given."""
    shipped = DATA_DIR / "checkpoints" / str(path_or_name)
    return str(shipped) if shipped.is_dir() else str(path_or_name)


def load_tokenizer(path_or_name):
    """The tokenizer saved beside a checkpoint; it must have an EOS. Without a padding token EOS pads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_existing(path_or_name))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path_or_name} has no EOS token; answers could never end: set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so this is safe
    return tokenizer


def load_policy(path_or_name):
    """A causal language model in float32, dropout off, from a shipped name, a folder or the hub.

    Raises ValueError if there is none, or if it takes no position ids (left padding would shift its answers).
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_existing(path_or_name), dtype=torch.float32)
    return checked_policy(model)


def checked_policy(model):
    """The model, if its forward takes position ids; ValueError otherwise."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        kind = type(model).__name__
        raise ValueError(f"{kind} takes no position_ids, which left-padded prompts need; use e.g. a GPT-2 or a Llama")
    return model.eval()


def _existing(path_or_name) -> str:
    path = resolve_checkpoint(path_or_name)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not (Path(path) / "config.json").is_file() and looks_local:
        shipped = sorted(p.name for p in (DATA_DIR / "checkpoints").glob("*") if p.is_dir())
        raise ValueError(f"no checkpoint at {path_or_name!r}; shipped ones are {shipped}, else give a folder or hub name")
    return path


def check_same_vocabulary(tokenizer, other, name: str) -> None:
    """Raises ValueError if a checkpoint's tokenizer is not the one that is in use."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"{name} has another vocabulary ({len(other)} tokens, not {len(tokenizer)}): "
            "its scores of these tokens would mean nothing; use models trained from one base"
        )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that gets no gradients: the reference model."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def response_logits(model, tokens: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
    """Logits that predict the response tokens; only these positions go through the vocabulary projection.

    tokens, attention_mask: (B, T)  query and response
    returns: (B, R, V)              logits[:, t] predicts response[:, t]
    """
    kept = response_length + 1  # the position before the response, and the response; the last one predicts nothing
    output = model(
        input_ids=tokens,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=kept,
    )
    return output.logits[:, -kept:-1]


class _ScalarHead(nn.Module):
    """A backbone with a head of width 1: `AutoModelForSequenceClassification(num_labels=1)` read at any position."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier.eval()

    @property
    def config(self):
        return self.classifier.config

    @classmethod
    def from_policy(cls, policy, seed: int = 0):
        """The policy's backbone and a fresh head, N(0, 1/(H+1)) (Stiennon et al. 2020)."""
        from transformers import AutoModelForSequenceClassification

        config = copy.deepcopy(policy.config)
        config.num_labels = 1
        classifier = AutoModelForSequenceClassification.from_config(config).to(policy.device, policy.dtype)
        classifier.base_model.load_state_dict(policy.base_model.state_dict())
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(classifier.score.weight.shape, generator=generator)
        with torch.no_grad():
            classifier.score.weight.copy_(weight / (weight.shape[1] + 1) ** 0.5)
        return cls(classifier)

    def hidden(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) -> (B, T, H), the backbone's last hidden states."""
        output = self.classifier.base_model(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        )
        return output.last_hidden_state

    def save(self, folder) -> None:
        """Writes what `AutoModelForSequenceClassification.from_pretrained` reads."""
        self.classifier.save_pretrained(folder)


class RewardModel(_ScalarHead):
    """One score per sequence, read at its last token that counts.

    `mean` and `std` are those of its scores on reference samples; they standardise scores (see rewards.py), are kept
    beside the weights in reward_stats.json, and never change what this model returns.
    """

    mean: float = 0.0
    std: float = 1.0

    def forward(self, tokens: Tensor, attention_mask: Tensor, query_length: int = 0) -> Tensor:
        """tokens, attention_mask: (B, T), padded on either side -> scores (B,). Fits PPO's `score_fn`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        last = (attention_mask.long() * (positions + 1)).argmax(-1)  # the last True, also with left padding
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        hidden = self.hidden(tokens, attention_mask)[rows, last]
        return self.classifier.score(hidden).squeeze(-1)

    def save(self, folder) -> None:
        """Weights for `transformers`, and the standardisation beside them."""
        super().save(folder)
        stats = json.dumps({"mean": self.mean, "std": self.std})
        (Path(folder) / "reward_stats.json").write_text(stats, encoding="utf-8")

    @classmethod
    def load(cls, path_or_name):
        """Reads what `save` wrote; ValueError if there is none."""
        model = cls(_load_classifier(path_or_name))
        stats = Path(resolve_checkpoint(path_or_name)) / "reward_stats.json"
        if stats.is_file():
            model.mean, model.std = json.loads(stats.read_text(encoding="utf-8")).values()
        return model


class ValueModel(_ScalarHead):
    """The critic: a value before each response token. A model of its own, with a fresh zero head."""

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel):
        """The reward model's backbone, copied, under a head of zeros."""
        model = cls(copy.deepcopy(reward_model.classifier).requires_grad_(True))
        nn.init.zeros_(model.classifier.score.weight)
        return model

    def forward(self, tokens: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
        """tokens, attention_mask: (B, T) -> values (B, R); values[:, t] is V(query, response[:t])."""
        hidden = response_window(self.hidden(tokens, attention_mask), response_length)
        return self.classifier.score(hidden).squeeze(-1)

    @classmethod
    def load(cls, path_or_name):
        """Reads what `save` wrote; ValueError if there is none."""
        return cls(_load_classifier(path_or_name))


def _load_classifier(path_or_name):
    from transformers import AutoModelForSequenceClassification

    path = _existing(path_or_name)
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)


def autocast(device: torch.device):
    """bfloat16 autocast on CUDA, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
