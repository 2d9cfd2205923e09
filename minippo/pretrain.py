"""Pretraining: a byte-level BPE and a tiny GPT-2 on plain text, from which everything starts."""

import torch
from torch import Tensor

from minippo.batching import beginning, pieces, right_pad
from minippo.config import PretrainConfig
from minippo.devices import to_device
from minippo.distributed import own_rows
from minippo.losses import lm_loss
from minippo.models import token_logits
from minippo.optim import training_loop

PAD, EOS = "<|pad|>", "<|endoftext|>"


def train_tokenizer(texts, vocab_size: int):
    """A byte-level BPE trained on `texts`; it encodes any text. PAD is id 0, EOS id 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS)


def train_lm(
    model, sequences: list[list[int]], config: PretrainConfig, pad_id: int, seed=0, hooks=None
) -> dict[str, float]:
    """Next-token prediction on whole texts; returns the metrics of the last step.

    model: a causal LM, trained in place
    sequences: token ids of one text each, EOS at the end
    Raises ValueError if a text is longer than the model's context.
    """
    device, lengths = next(model.parameters()).device, [len(s) for s in sequences]

    def gradients(indices):
        own = indices[own_rows(len(indices))]
        tokens, mask = right_pad([sequences[i] for i in own], pad_id)
        share = sum(lengths[i] - 1 for i in own) / sum(lengths[i] - 1 for i in indices)
        loss = text_loss(model, *to_device((tokens, mask), device)) * share
        loss.backward()
        return {"loss/lm": loss}

    history = training_loop("pretrain", {"policy": model}, lengths, gradients, config, seed, hooks)
    return history[-1] if history else {}


def text_loss(model, tokens: Tensor, mask: Tensor) -> Tensor:
    """lm_loss over every real token of (B, T) right-padded texts. Returns ()."""
    return lm_loss(token_logits(model, tokens, None), tokens, mask)  # causal: padding comes last


def encode_texts(tokenizer, texts, context: int) -> tuple[list[list[int]], int]:
    """Token ids of each text with EOS, and how many texts were dropped as longer than the context.

    A special token that a text spells is text there, as in batching.py.
    Raises ValueError if none is left.
    """
    plain, first = {"add_special_tokens": False, "split_special_tokens": True}, beginning(tokenizer)
    encoded = tokenizer(list(texts), **plain)["input_ids"]
    sequences = [[*first, *ids, tokenizer.eos_token_id] for ids in encoded]
    kept = [sequence for sequence in sequences if len(sequence) <= context]
    if not kept:
        raise ValueError(f"no text fits into the context of {context} tokens; raise n_positions")
    return kept, len(sequences) - len(kept)


@torch.no_grad()
def perplexity(model, sequences: list[list[int]], pad_id: int, batch_size: int = 64) -> float:
    """exp of the mean loss per token on held-out texts."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    for piece in pieces(sequences, batch_size):
        tokens, mask = right_pad(piece, pad_id)
        predicted = int(mask[:, 1:].sum())
        total += float(text_loss(model, *to_device((tokens, mask), device))) * predicted
        count += predicted
    return float(torch.tensor(total / count).exp())
