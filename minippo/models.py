"""The four models: policy, reference, reward model and value model.

Each is over any decoder-only Hugging Face backbone. Dropout is off in all of them: they stay in
eval mode, through which gradients flow just as well.
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


def forward_pass(model, tokens: Tensor, attention_mask: Tensor, **options):
    """One pass over whole padded sequences, (B, T) each, with the positions of the contract."""
    places = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    return model(input_ids=tokens, use_cache=False, **places, **options)


def tiny_gpt2(
    vocab_size, n_layer=2, n_embd=128, n_head=4, n_positions=256, eos_id=1, pad_id=0, seed=0
):
    """A freshly initialised `transformers` GPT-2 without dropout; returns a GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=n_positions)
    config = GPT2Config(
        vocab_size=vocab_size, **sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # the function of GPT-2's gelu_new, in one kernel
        bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=pad_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def resolve_checkpoint(path_or_name) -> str:
    """The folder of a shipped checkpoint (base, sft, reward, value, ppo), or what was given."""
    shipped = DATA_DIR / "checkpoints" / str(path_or_name)
    return str(shipped) if shipped.is_dir() else str(path_or_name)


def load_tokenizer(path_or_name):
    """The tokenizer saved beside a checkpoint. Without a padding token EOS pads.

    Raises ValueError if there is none, or if it has no EOS.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_existing(path_or_name))
    except OSError as error:
        raise ValueError(f"no tokenizer at {path_or_name!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        message = f"the tokenizer of {path_or_name} has no EOS token"
        raise ValueError(f"{message}; answers could never end: set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so this is safe
    return tokenizer


def load_policy(path_or_name):
    """A causal language model in float32, dropout off, from a shipped name, a folder or the hub.

    Raises ValueError if there is none, or if it takes no position ids: left padding would shift
    its answers.
    """
    from transformers import AutoModelForCausalLM

    return checked_policy(_loaded(AutoModelForCausalLM, path_or_name))


def checked_policy(model):
    """The model, if its forward takes position ids; ValueError otherwise."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        message = f"{type(model).__name__} takes no position_ids, which left-padded prompts need"
        raise ValueError(f"{message}; use e.g. a GPT-2 or a Llama")
    return model.eval()


def _existing(path_or_name) -> str:
    path = resolve_checkpoint(path_or_name)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not (Path(path) / "config.json").is_file() and looks_local:
        shipped = sorted(p.name for p in (DATA_DIR / "checkpoints").glob("*") if p.is_dir())
        message = f"no checkpoint at {path_or_name!r}; shipped ones are {shipped}"
        raise ValueError(f"{message}, else give a folder or hub name")
    return path


def _loaded(kind, path_or_name, **options):
    try:
        model = kind.from_pretrained(_existing(path_or_name), dtype=torch.float32, **options)
    except OSError as error:
        raise ValueError(f"no checkpoint at {path_or_name!r}: {error}") from error
    for parameter in model.parameters():  # out of the file's memory map, into aligned memory
        parameter.data = parameter.data.clone()
    return model


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
    """Logits that predict the response tokens, the only ones that are computed.

    tokens, attention_mask: (B, T)  query and response
    returns: (B, R, V)              logits[:, t] predicts response[:, t]
    """
    kept = response_length + 1  # from the token before the response on; the last predicts nothing
    return forward_pass(model, tokens, attention_mask, logits_to_keep=kept).logits[:, -kept:-1]


class _ScalarHead(nn.Module):
    """A backbone with a head of width 1, readable at any position.

    It is an `AutoModelForSequenceClassification(num_labels=1)`, so that it loads in transformers.
    """

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
        classifier = AutoModelForSequenceClassification.from_config(config)
        classifier = classifier.to(policy.device, policy.dtype)
        classifier.base_model.load_state_dict(policy.base_model.state_dict())
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(classifier.score.weight.shape, generator=generator)
        with torch.no_grad():
            classifier.score.weight.copy_(weight / (weight.shape[1] + 1) ** 0.5)
        return cls(classifier)

    def hidden(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) -> (B, T, H), the backbone's last hidden states."""
        return forward_pass(self.classifier.base_model, tokens, attention_mask).last_hidden_state

    def save(self, folder) -> None:
        """Writes what `AutoModelForSequenceClassification.from_pretrained` reads."""
        self.classifier.save_pretrained(folder)

    @classmethod
    def load(cls, path_or_name):
        """Reads what `save` wrote; ValueError if there is none."""
        from transformers import AutoModelForSequenceClassification as Classifier

        return cls(_loaded(Classifier, path_or_name, num_labels=1))


class RewardModel(_ScalarHead):
    """One score per sequence, read at its last token that counts.

    `mean` and `std` are those of its scores on reference samples; they standardise scores (see
    rewards.py), are kept beside the weights in reward_stats.json, and never change what this model
    returns.
    """

    mean: float = 0.0
    std: float = 1.0

    def forward(self, tokens: Tensor, attention_mask: Tensor, query_length: int = 0) -> Tensor:
        """tokens, attention_mask: (B, T), padded on either side -> scores (B,).

        Fits PPO's `score_fn`, which is why it takes a query_length.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        last = (attention_mask.long() * (positions + 1)).argmax(-1)  # also with left padding
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
        model = super().load(path_or_name)
        stats = Path(resolve_checkpoint(path_or_name)) / "reward_stats.json"
        if stats.is_file():
            saved = json.loads(stats.read_text(encoding="utf-8"))
            model.mean, model.std = saved["mean"], saved["std"]
        return model


class ValueModel(_ScalarHead):
    """The critic: a value before each response token. A model of its own, with a zero head."""

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel):
        """The reward model's backbone, copied, under a head of zeros."""
        model = cls(copy.deepcopy(reward_model.classifier).requires_grad_(True))
        nn.init.zeros_(model.classifier.score.weight)
        return model

    def forward(self, tokens: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
        """tokens, attention_mask: (B, T) -> values (B, R); [:, t] is V(query, response[:t])."""
        hidden = response_window(self.hidden(tokens, attention_mask), response_length)
        return self.classifier.score(hidden).squeeze(-1)


def autocast(device: torch.device):
    """bfloat16 autocast on CUDA, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
