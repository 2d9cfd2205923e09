"""Pretraining: a byte-level BPE and a tiny GPT-2 on plain text, from which everything starts."""

import torch
from torch import Tensor

from minippo.batching import beginning, chunks, right_pad
from minippo.config import PretrainConfig
from minippo.engine.gradients import accumulate_rows
from minippo.engine.packing import to_device_of
from minippo.engine.passes import token_logits
from minippo.losses import lm_loss
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
    model, sequences: list[list[int]], config: PretrainConfig, *, pad_id: int, seed=0, hooks=None
) -> list[dict[str, float]]:
    """Next-token prediction on whole texts; returns the metrics of each step.

    model: a causal LM, trained in place
    sequences: token ids of one text each, EOS at the end
    Raises ValueError if a text is longer than the model's context.
    """
    lengths = [len(sequence) for sequence in sequences]

    def loss_of(chosen):
        tokens, mask = right_pad([sequences[i] for i in chosen], pad_id)  # (B, T)
        loss = text_loss(model, *to_device_of(model, tokens, mask))
        return loss, {"loss/lm": loss}

    def gradients(indices):
        return accumulate_rows(loss_of, indices, weight=lambda i: lengths[i] - 1)

    models = {"policy": model}
    return training_loop("pretrain", models, lengths, gradients, config, seed=seed, hooks=hooks)


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
    total, count = 0.0, 0
    for chunk in chunks(sequences, batch_size):
        tokens, mask = right_pad(chunk, pad_id)  # (B, T)
        predicted = int(mask[:, 1:].sum())
        total += float(text_loss(model, *to_device_of(model, tokens, mask))) * predicted
        count += predicted
    return float(torch.tensor(total / count).exp())
