"""The four models: policy, reference, reward model and value model.

Each is over any decoder-only Hugging Face backbone. Dropout is off in all of them: they stay in
eval mode, through which gradients flow just as well.
"""

import copy
import inspect
import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minippo.checkpoints import (
    check_claims,
    check_folder,
    check_sizes,
    read_settings,
    tensor_shapes,
)
from minippo.config import DATA_DIR
from minippo.devices import (
    at_least_float32,
    autocast,
    cache_argument,
    cache_of,
    reads_whole,
    to_device,
    unasked_mask,
    uncompiled,
)
from minippo.distributed import is_sharded
from minippo.logprobs import response_window

# Whatever is loaded: no code of a checkpoint's own.
SAFE = {"trust_remote_code": False}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "config.json")


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding changes nothing.

    attention_mask: (B, T)  True (1) where a token is real
    returns: (B, T)         cumsum(attention_mask) - 1, clamped at 0
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def forward_pass(
    model, tokens: Tensor, attention_mask=None, use_cache=False, cache=None, **options
):
    """One pass over padded sequences with the positions of the contract; on CUDA in bfloat16.

    tokens: (B, T), or with a KV cache only the last of them
    attention_mask: (B, T); None if every row begins with its real tokens: what stands behind them
        changes nothing, since attention is causal, and without a mask it is fastest
    cache: what `cache_of` took from an earlier pass; None begins anew
    """
    if attention_mask is not None:
        options["position_ids"] = position_ids(attention_mask)[:, -tokens.shape[1] :]
    seen = unasked_mask(model, attention_mask, tokens)
    if seen is None:  # GPT-2 would warn of padding; there is none that a real token could see
        getattr(model, "base_model", model).warn_if_padding_and_no_attention_mask = _say_nothing
    else:
        options["attention_mask"] = seen
    if cache is not None:
        options[cache_argument(type(model))] = cache
    is_compiled = use_cache and reads_whole(model)
    with autocast(tokens.device), uncompiled() if is_compiled else nullcontext():
        return model(input_ids=tokens, use_cache=use_cache, **options)


def _say_nothing(*arguments) -> None:
    return None


def token_logits(model, tokens: Tensor, attention_mask: Tensor | None, kept: int = 0) -> Tensor:
    """Logits (B, T, V), or (B, kept, V) of the last positions: no others are computed."""
    output = forward_pass(model, tokens, attention_mask, logits_to_keep=kept)
    return at_least_float32(output.logits)


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
    return str(shipped) if shipped.is_dir() else os.path.expanduser(path_or_name)


def load_tokenizer(path_or_name):
    """The tokenizer saved beside a checkpoint. Without a padding token EOS pads.

    Raises ValueError if there is none, if it is damaged, or if it has no EOS.
    """
    from transformers import AutoTokenizer

    with _reading(path_or_name) as path:
        if Path(path).is_dir():
            _check_tokenizer_files(Path(path))
        tokenizer = AutoTokenizer.from_pretrained(path, **SAFE)
    if tokenizer.eos_token_id is None:
        message = f"the tokenizer of {path_or_name} has no EOS token"
        raise ValueError(f"{message}; answers could never end: set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so this is safe
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    check_folder(folder, TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            read_settings(folder / name)


def load_policy(path_or_name):
    """A causal language model, dropout off, from a shipped name, a folder or the hub.

    Its weights take torch's default dtype: float32, in the lessons float64.

    Raises ValueError if there is none, if its weights are not what its config says, or if it takes
    no position ids: left padding would shift its answers.
    """
    from transformers import AutoModelForCausalLM

    return checked_policy(_loaded(AutoModelForCausalLM, path_or_name))


def checked_policy(model):
    """The model, if its forward takes position ids; ValueError otherwise."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        message = f"{type(model).__name__} takes no position_ids, which left-padded prompts need"
        raise ValueError(f"{message}; use e.g. a GPT-2 or a Llama")
    return model.eval()


@contextmanager
def _reading(path_or_name):
    """Gives the path to read; what reading it raises becomes a ValueError that says what to do."""
    path = resolve_checkpoint(path_or_name)
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    is_local |= "/" in path and Path(path).parent.is_dir()  # a hub name's owner is no folder here
    try:
        if is_local and not (Path(path) / "config.json").is_file():
            raise FileNotFoundError("there is no config.json")
        yield path
    except Exception as error:  # a damaged file gives anything from KeyError to SafetensorError
        shipped = sorted(p.name for p in (DATA_DIR / "checkpoints").glob("*") if p.is_dir())
        message = f"no checkpoint at {path_or_name!r} can be read: {' '.join(str(error).split())}"
        remedy = f"save it again, or give a folder, a hub name or a shipped one of {shipped}"
        raise ValueError(f"{message}; {remedy}") from error


def _loaded(kind, path_or_name, **options):
    """A model with exactly the weights that were saved, all finite, in torch's default dtype."""
    options |= SAFE
    with _reading(path_or_name) as path:
        if Path(path).is_dir():
            _check_weights(kind, Path(path), options)
        options |= {"dtype": torch.get_default_dtype(), "use_safetensors": True}
        options["output_loading_info"] = True
        model, found = kind.from_pretrained(path, **options)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[problem]:
                names = sorted(map(str, found[problem]))
                raise ValueError(f"{problem.replace('_', ' ')}: {', '.join(names[:3])}")
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.clone()  # out of the file's memory map, aligned
            if not parameter.isfinite().all():
                raise ValueError(f"{name} has a weight that is NaN or infinite")
    _fuse_gelu(model)
    return model


def _check_weights(kind, folder: Path, options: dict) -> None:
    """Compares config and weight files before a tensor is allocated; ValueError if they differ."""
    from transformers import AutoConfig

    check_folder(folder)
    shapes = tensor_shapes(folder)
    check_claims(folder, shapes)
    config = AutoConfig.from_pretrained(folder, **options)
    with torch.device("meta"):
        check_sizes(kind.from_config(config, **SAFE), shapes)


def _fuse_gelu(model) -> None:
    """Puts GPT-2's GELU in one kernel: transformers writes the same function as eight operations.

    In the config as well, so that copies of the model and what is saved of it have it too.
    """
    from transformers.activations import ACT2FN, NewGELUActivation

    for module in model.modules():
        for name, part in module.named_children():
            if isinstance(part, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    if getattr(model.config, "activation_function", None) == "gelu_new":
        model.config.activation_function = "gelu_pytorch_tanh"


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
    return token_logits(model, tokens, attention_mask, kept)[:, -kept:-1]


@dataclass(frozen=True)
class Packed:
    """Rows without the padding between, before and behind their tokens, as training reads them.

    Padding costs as much arithmetic as text does, and the vocabulary projection of a token that
    does not count is for nothing. So each row begins with its first real token, and the heads see
    the N = mask.sum() positions that predict a token that counts, one after the other.
    """

    tokens: Tensor  # (B, W) real tokens, then whatever; W is the longest row less its last token
    places: Tensor  # (N,) which of the B * W positions predicts each token that counts
    targets: Tensor  # (N,) the tokens that count, row by row
    slots: Tensor  # (N,) where each of them stands in the B * R of a flat response
    shape: tuple[int, int]  # (B, R)

    def to(self, device) -> "Packed":
        """The same on a device."""
        tensors = (self.tokens, self.places, self.targets, self.slots)
        return Packed(*to_device(tensors, device), self.shape)

    def spread(self, x: Tensor) -> Tensor:
        """(N,) -> (B, R), 0 where masked."""
        flat = x.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy(0, self.slots, x).view(self.shape)


def pack(tokens: Tensor, attention_mask: Tensor, mask: Tensor, lengths=None) -> Packed:
    """Takes the padding out of [query | response] rows.

    tokens, attention_mask: (B, T)
    mask: (B, R)    the response tokens that count
    lengths: (B, 2) what `row_lengths` returns; without it the CPU has to wait for the device
    """
    lengths = row_lengths(attention_mask, mask) if lengths is None else lengths
    width = int(lengths[:, 0].max()) - 1  # the last token of a row predicts nothing
    count = int(lengths[:, 1].sum())
    response_length = mask.shape[1]
    order = real_first(attention_mask)[:, :width]
    slots = real_first(mask.flatten())[:count]
    before = position_ids(attention_mask)[:, -response_length:].flatten()[slots] - 1
    places = slots // response_length * width + before
    targets = tokens[:, -response_length:].flatten()[slots]
    return Packed(tokens.gather(1, order), places, targets, slots, tuple(mask.shape))


def row_lengths(attention_mask: Tensor, mask: Tensor) -> Tensor:
    """(B, 2) on the CPU: the real tokens of each row, and its response tokens that count."""
    return torch.stack([attention_mask.sum(1), mask.sum(1)], 1).cpu()


def real_first(mask: Tensor) -> Tensor:
    """The places along the last axis in order, but those where mask is True first."""
    return (~mask.bool()).byte().argsort(dim=-1, stable=True)


def counted_logits(model, packed: Packed) -> Tensor:
    """Logits (N, V) that predict the tokens that count; no others are computed.

    The hidden states are chosen in front of the model's own vocabulary projection, so that what a
    model does to its logits afterwards (Gemma bounds them, Cohere scales them) is done here too.
    """

    def choose(head, inputs):
        return (inputs[0].flatten(0, 1).index_select(0, packed.places),)

    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        return at_least_float32(forward_pass(model, packed.tokens).logits)
    finally:
        hook.remove()


def counted_values(value_model, packed: Packed) -> Tensor:
    """Values (N,) before each token that counts."""
    hidden = value_model.hidden(packed.tokens)
    return value_model.read(hidden.flatten(0, 1).index_select(0, packed.places))


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
        """(B, T) -> (B, T, H), the backbone's last hidden states; no mask: as in forward_pass."""
        return forward_pass(self.classifier.base_model, tokens, attention_mask).last_hidden_state

    def read(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (...), what the head makes of hidden states, not in half precision."""
        head = self.classifier.score
        return at_least_float32(head(hidden.to(head.weight.dtype)).squeeze(-1))

    def save(self, folder, state_dict=None) -> None:
        """Writes what `AutoModelForSequenceClassification.from_pretrained` reads.

        state_dict: this model's weights, if they are not in it
        """
        if state_dict is not None:
            state_dict = {k.removeprefix("classifier."): v for k, v in state_dict.items()}
        self.classifier.save_pretrained(folder, state_dict=state_dict)

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
        lengths = attention_mask.long().sum(1)
        order = real_first(attention_mask)[:, : int(lengths.max())]
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.read(self.hidden(tokens.gather(1, order))[rows, lengths - 1])

    def score_candidates(self, query, query_mask, response, mask) -> Tensor:
        """What forward returns of every response to every query, each query and response read once.

        query, query_mask: (B, Q)     left-padded
        response, mask: (B * K, R)    right-padded, the K of a query together
        returns: (B, K)
        """
        backbone, k = self.classifier.base_model, len(response) // len(query)
        seen = torch.cat([query_mask.repeat_interleave(k, 0), mask], 1)
        # FSDP puts layers together for gradients of outputs, not of caches; nor are passes over a
        # cache compiled or recomputed.
        if is_sharded(self.classifier.score.weight) or reads_whole(backbone):
            tokens = torch.cat([query.repeat_interleave(k, 0), response], 1)
            return self(tokens, seen).view(-1, k)
        cache = cache_of(forward_pass(backbone, query, query_mask, use_cache=True))
        cache.batch_repeat_interleave(k)  # keys and values of the query; gradients flow into them
        output = forward_pass(backbone, response, seen, use_cache=True, cache=cache)
        hidden = output.last_hidden_state
        rows = torch.arange(len(response), device=response.device)
        return self.read(hidden[rows, mask.sum(1) - 1]).view(-1, k)

    def save(self, folder, state_dict=None) -> None:
        """Weights for `transformers`, and the standardisation beside them."""
        super().save(folder, state_dict)
        stats = json.dumps({"mean": self.mean, "std": self.std})
        (Path(folder) / "reward_stats.json").write_text(stats, encoding="utf-8")

    @classmethod
    def load(cls, path_or_name):
        """Reads what `save` wrote; ValueError if there is none."""
        model = super().load(path_or_name)
        with _reading(path_or_name) as path:
            stats = Path(path) / "reward_stats.json"
            if stats.is_file():
                model.mean, model.std = _score_stats(stats)
        return model


def _score_stats(path: Path) -> tuple[float, float]:
    saved = read_settings(path)
    for name in ("mean", "std"):
        if type(saved.get(name)) not in (int, float):
            raise ValueError(f"{path.name}: {name} is {saved.get(name)!r}, which is no number")
    if saved["std"] <= 0:
        raise ValueError(f"{path.name}: std is {saved['std']}; it must be greater than 0")
    return float(saved["mean"]), float(saved["std"])


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
