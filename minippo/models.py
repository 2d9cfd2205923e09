"""The four models: policy, reference, reward model and value model.

Each is over any decoder-only Hugging Face backbone. Dropout is off in all of them: they stay in
eval mode, through which gradients flow just as well.
"""

import copy
import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from minippo.engine.loading import (
    load_model,
    read_score_stats,
    read_tokenizer,
    write_score_stats,
)
from minippo.engine.passes import hidden_states, last_hidden, last_hidden_of_candidates
from minippo.logprobs import response_window


class Policy:
    """Reads a causal language model, and is none: what it gives is that of `transformers` itself.

    So a policy is written with its own `save_pretrained`.
    """

    @staticmethod
    def from_pretrained(path_or_name):
        """A causal language model, dropout off, from a shipped name, a folder or the hub.

        Its weights take torch's default dtype: float32, in the lessons float64.
        Raises ValueError if there is none, if its weights are not what its config says, or if it
        takes no position ids: left padding would shift its answers.
        """
        from transformers import AutoModelForCausalLM

        return checked_policy(load_model(AutoModelForCausalLM, path_or_name))


def checked_policy(model):
    """The model, if its forward takes position ids; ValueError otherwise."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        message = f"{type(model).__name__} takes no position_ids, which left-padded prompts need"
        raise ValueError(f"{message}; use e.g. a GPT-2 or a Llama")
    return model.eval()


def load_tokenizer(path_or_name):
    """The tokenizer saved beside a checkpoint. Without a padding token EOS pads.

    Raises ValueError if there is none, if it is damaged, or if it has no EOS.
    """
    tokenizer = read_tokenizer(path_or_name)
    if tokenizer.eos_token_id is None:
        message = f"the tokenizer of {path_or_name} has no EOS token"
        raise ValueError(f"{message}; answers could never end: set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so this is safe
    return tokenizer


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


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that gets no gradients: the reference model."""
    return copy.deepcopy(model).eval().requires_grad_(False)


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
    def from_policy(cls, policy, seed: int = 0, pad_id: int | None = None):
        """The policy's backbone and a fresh head, N(0, 1/(H+1)) (Stiennon et al. 2020).

        pad_id: the padding token to write down where the policy's config has none. transformers
            finds the last token by it, so there it takes one that is not EOS to get our outputs.
        """
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
        if classifier.config.pad_token_id is None:
            classifier.config.pad_token_id = pad_id
        return cls(classifier)

    def hidden(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, H), the backbone's last hidden states.

        attention_mask: (B, T); None if every row begins with its real tokens
        """
        return hidden_states(self.classifier.base_model, tokens, attention_mask)

    def read(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (...), what the head makes of hidden states, not in half precision."""
        head = self.classifier.score
        values = head(hidden.to(head.weight.dtype)).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def save_pretrained(self, folder, state_dict=None) -> None:
        """Writes what `AutoModelForSequenceClassification.from_pretrained` reads.

        state_dict: this model's weights, if they are not in it
        """
        if state_dict is not None:
            state_dict = {k.removeprefix("classifier."): v for k, v in state_dict.items()}
        self.classifier.save_pretrained(folder, state_dict=state_dict)

    @classmethod
    def from_pretrained(cls, path_or_name):
        """Reads what `save_pretrained` wrote; ValueError if there is none."""
        from transformers import AutoModelForSequenceClassification as Classifier

        return cls(load_model(Classifier, path_or_name, num_labels=1))


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
        return self.read(last_hidden(self.classifier.base_model, tokens, attention_mask))

    def score_candidates(self, query, query_mask, response, mask) -> Tensor:
        """What forward returns of every response to every query, each query and response read once.

        query, query_mask: (B, Q)   left-padded
        response, mask: (B, K, R)   right-padded
        returns: (B, K)
        """
        padded = (query, query_mask, response, mask)
        hidden = last_hidden_of_candidates(self.classifier.base_model, *padded)  # (B * K, H)
        return self.read(hidden).view(response.shape[:2])

    def save_pretrained(self, folder, state_dict=None) -> None:
        """Weights for `transformers`, and the standardisation beside them."""
        super().save_pretrained(folder, state_dict)
        write_score_stats(Path(folder), self.mean, self.std)

    @classmethod
    def from_pretrained(cls, path_or_name):
        """Reads what `save_pretrained` wrote; ValueError if there is none."""
        model = super().from_pretrained(path_or_name)
        model.mean, model.std = read_score_stats(path_or_name)
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
        return self.read(response_window(self.hidden(tokens, attention_mask), response_length))
