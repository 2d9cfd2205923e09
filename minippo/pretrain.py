"""Pretraining: a byte-level BPE and a tiny GPT-2 on plain text. The base from which everything starts."""

import torch
from torch import Tensor

from minippo.batching import batch_plan, right_pad
from minippo.config import PretrainConfig
from minippo.losses import lm_loss
from minippo.models import position_ids
from minippo.optim import Hooks, adamw, finite_metrics, optimizer_step, set_learning_rate

PAD, EOS = "<|pad|>", "<|endoftext|>"


def train_tokenizer(texts, vocab_size: int):
    """A byte-level BPE trained on `texts`; any text can be encoded. `<|pad|>` is id 0, `<|endoftext|>` id 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS)


def train_lm(model, sequences: list[list[int]], config: PretrainConfig, pad_id: int, seed=0, hooks=None):
    """Next-token prediction on whole texts; returns the metrics of the last step.

    model: a causal LM, trained in place
    sequences: token ids of one text each, EOS at the end; longer than the model's context is refused
    """
    hooks = hooks or Hooks()
    longest, context = max(map(len, sequences)), model.config.max_position_embeddings
    if longest > context:
        raise ValueError(f"a text of {longest} tokens does not fit the context of {context}; cut or drop it first")
    optimizer = adamw({"policy": model}, {"policy": config.lr})
    plan = batch_plan([len(s) for s in sequences], config.batch_size, config.steps, seed)
    device, metrics = next(model.parameters()).device, {}
    first = hooks.start("pretrain", config.steps, {"policy": model, "optimizer": optimizer})
    for step in range(first, config.steps):
        set_learning_rate(optimizer, step, config.steps, config.warmup_steps)
        tokens, mask = right_pad([sequences[i] for i in plan[step]], pad_id)
        loss = text_loss(model, tokens.to(device), mask.to(device))
        loss.backward()
        norms = optimizer_step(optimizer, config.max_grad_norm)
        metrics = finite_metrics("pretrain", step, {"loss/lm": loss, **norms})
        hooks.step("pretrain", step, metrics)
    return metrics


def text_loss(model, tokens: Tensor, mask: Tensor) -> Tensor:
    """lm_loss over every real token of (B, T) right-padded texts."""
    output = model(input_ids=tokens, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
    return lm_loss(output.logits, tokens, mask)


def encode_texts(tokenizer, texts, context: int) -> tuple[list[list[int]], int]:
    """Token ids of each text with EOS, and how many texts were dropped because they exceed the context."""
    sequences = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    kept = [sequence for sequence in sequences if len(sequence) <= context]
    if not kept:
        raise ValueError(f"no text fits into the context of {context} tokens; raise n_positions")
    return kept, len(sequences) - len(kept)


def perplexity(model, sequences: list[list[int]], pad_id: int, batch_size: int = 64) -> float:
    """exp of the mean loss per token on held-out texts."""
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(sequences), batch_size):
            tokens, mask = right_pad(sequences[i : i + batch_size], pad_id)
            predicted = int(mask[:, 1:].sum())
            total += float(text_loss(model, tokens, mask)) * predicted
            count += predicted
    return float(torch.tensor(total / count).exp())
