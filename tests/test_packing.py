"""Packed passes say what the padded ones say: logits, values, scores and gradients of every token.

The padded passes, `response_logits` and `ValueModel.forward`, are the oracle: they read every row
with its mask and position ids, and share no index with the packed ones.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from minippo.engine.packing import pack, packed_logits, packed_values
from minippo.engine.passes import response_logits
from minippo.models import Policy, RewardModel, ValueModel, tiny_gpt2

V, Q, R = 30, 5, 4
# Row by row: tokens of the query and of the response; the rest is padding, left and right.
LENGTHS = [(5, 4), (1, 1), (3, 4), (2, 2), (4, 1)]


def llama():
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def gpt2():
    return tiny_gpt2(V, n_layer=2, n_embd=16, n_head=2, n_positions=32)


BACKBONES = pytest.mark.parametrize("make", [gpt2, llama])


def batch(hole=False):
    """tokens, attention_mask (B, T) and mask (B, R); a hole is a token read but not counted."""
    tokens = torch.randint(2, V, (len(LENGTHS), Q + R), generator=torch.Generator().manual_seed(0))
    places = torch.arange(Q + R)
    starts = torch.tensor([Q - q for q, _ in LENGTHS])[:, None]
    ends = torch.tensor([Q + r for _, r in LENGTHS])[:, None]
    attention_mask = (places >= starts) & (places < ends)
    mask = attention_mask[:, Q:].clone()
    if hole:
        mask[0, 1] = False
    return tokens.masked_fill(~attention_mask, 0), attention_mask, mask


@pytest.mark.parametrize("hole", [False, True])
def test_a_packed_row_by_hand(hole):
    tokens, attention_mask, mask = batch(hole)
    packed = pack(tokens, attention_mask, mask)
    width = packed.tokens.shape[1]
    assert width == 8 == max(q + r for q, r in LENGTHS) - 1  # a last token predicts nothing
    for b, (q, r) in enumerate(LENGTHS):
        real = min(q + r, width)
        assert packed.tokens[b, :real].tolist() == tokens[b, Q - q : Q - q + real].tolist()
    counted = [(b, t) for b, (_, r) in enumerate(LENGTHS) for t in range(r) if mask[b, t]]
    assert packed.targets.tolist() == [int(tokens[b, Q + t]) for b, t in counted]
    # The token before response token t stands at place q + t - 1 of its row.
    assert packed.positions.tolist() == [b * width + LENGTHS[b][0] + t - 1 for b, t in counted]
    assert packed.slots.tolist() == [b * R + t for b, t in counted]


def test_no_column_is_left_that_is_padding_in_every_row():
    tokens, attention_mask, mask = batch()
    short = [1, 3, 4]
    packed = pack(tokens[short], attention_mask[short], mask[short])
    assert packed.tokens.shape == (3, 4)  # of 9: the longest of them has 4 + 1 tokens


def test_unpack_puts_numbers_where_their_tokens_stand():
    tokens, attention_mask, mask = batch(hole=True)
    packed = pack(tokens, attention_mask, mask)
    numbers = torch.arange(1.0, int(mask.sum()) + 1, requires_grad=True)
    there = packed.unpack(numbers)
    assert torch.equal(there != 0, mask) and torch.equal(there[mask], numbers)
    there.cumsum(1).sum().backward()
    assert numbers.grad.tolist() == [R - int(slot) % R for slot in packed.slots]


@BACKBONES
@pytest.mark.parametrize("hole", [False, True])
def test_logits_and_their_gradients_are_those_of_the_padded_pass(make, hole):
    model, (tokens, attention_mask, mask) = make(), batch(hole)
    weights = torch.randn(int(mask.sum()), V, generator=torch.Generator().manual_seed(1))
    found = []
    for logits in (
        packed_logits(model, pack(tokens, attention_mask, mask)),
        response_logits(model, tokens, attention_mask, R)[mask],
    ):
        model.zero_grad()
        (logits * weights).sum().backward()
        found.append((logits, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@BACKBONES
def test_values_are_those_of_the_padded_pass(make):
    model, (tokens, attention_mask, mask) = ValueModel.from_policy(make()), batch(hole=True)
    got = packed_values(model, pack(tokens, attention_mask, mask))
    torch.testing.assert_close(got, model(tokens, attention_mask, R)[mask], rtol=1e-5, atol=1e-5)


@BACKBONES
def test_a_score_is_that_of_the_row_alone_and_unpadded(make):
    model, (tokens, attention_mask, _) = RewardModel.from_policy(make()), batch()
    for row, (got, real) in enumerate(zip(model(tokens, attention_mask), attention_mask)):
        ids = tokens[row][real][None]
        last = model.classifier.base_model(input_ids=ids).last_hidden_state[0, -1]
        expected = model.classifier.score(last).squeeze(-1)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_vocabulary_projection_sees_only_what_counts():
    model, seen = gpt2(), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    tokens, attention_mask, mask = batch(hole=True)
    packed_logits(model, pack(tokens, attention_mask, mask))
    assert seen == [(int(mask.sum()), 16)]
    model(input_ids=tokens)
    assert seen[1:] == [(len(LENGTHS), Q + R, 16)]  # the choice is gone after the pass


def test_the_choice_is_gone_after_a_pass_that_failed():
    model = gpt2()
    tokens, attention_mask, mask = batch()
    packed = pack(tokens + V, attention_mask, mask)  # no such tokens
    with pytest.raises(IndexError):
        packed_logits(model, packed)
    assert model(input_ids=tokens).logits.shape == (len(LENGTHS), Q + R, V)


def test_the_gelu_of_a_loaded_gpt2_is_one_kernel_and_the_same_function(tmp_path):
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=V)
    assert config.activation_function == "gelu_new"  # transformers' default for GPT-2
    torch.manual_seed(0)
    written = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in written.parameters():
            p.mul_(5)  # so that its arguments reach both tails
    written.save_pretrained(tmp_path / "gpt2")
    loaded, tokens = Policy.from_pretrained(tmp_path / "gpt2"), batch()[0]
    fused = type(ACT2FN["gelu_pytorch_tanh"])
    assert {type(block.mlp.act) for block in loaded.transformer.h} == {fused}
    torch.testing.assert_close(loaded(tokens).logits, written(tokens).logits, rtol=1e-5, atol=1e-4)
    reward_model = RewardModel.from_policy(loaded)  # made from the config
    kinds = {type(m) for m in reward_model.modules()}
    assert fused in kinds and type(ACT2FN["gelu_new"]) not in kinds
