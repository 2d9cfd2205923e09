"""The four models: positions, padding, copies, other backbones, and what `transformers` reads back.

Oracles: the unpadded row alone, `transformers`' own classes, and the raw backbone.
"""

import copy
import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from minippo.engine.devices import at_least_float32
from minippo.engine.loading import check_same_vocabulary, resolve_checkpoint
from minippo.engine.passes import response_logits, token_logits
from minippo.masking import position_ids
from minippo.models import (
    Policy,
    RewardModel,
    ValueModel,
    checked_policy,
    frozen_copy,
    load_tokenizer,
    tiny_gpt2,
)
from minippo.pretrain import train_tokenizer

MODELS = [kind.from_pretrained for kind in (Policy, RewardModel, ValueModel)]
LOADERS = [*MODELS, load_tokenizer]
V, PAD, EOS = 40, 0, 1
IDS = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
ROWS = [[5, 6, 7, 8, 9, EOS], [11, 12, EOS], [21, 22, 23, 24, EOS]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def lively(model):
    """Larger weights than a fresh model has, so that context and position matter to the outputs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def gpt2(width=16):
    return lively(tiny_gpt2(V, n_layer=2, n_embd=width, n_head=2, n_positions=32))


def llama():
    return lively(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, **IDS,
            )
        )
    )  # fmt: skip


def neox():
    return lively(
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=32, **IDS,
            )
        )
    )  # fmt: skip


FAMILIES = pytest.mark.parametrize("make", [gpt2, llama, neox])


def padded(side, rows=ROWS, pad=PAD, width=8):
    """Rows as tensors (B, width), padded on one side, or on both: two on the right at most."""
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = {"right": 0, "left": width - len(row), "both": max(0, width - len(row) - 2)}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = True
    return ids, mask


def logits_of(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits


def same_storage(a, b):
    return {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}


# --- positions and padding --------------------------------------------------------------------


def test_position_ids_count_real_tokens_by_hand():
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    for kind in (torch.long, torch.bool, torch.int32):
        assert position_ids(mask.to(kind)).tolist() == expected
        assert position_ids(mask.to(kind)).dtype == torch.long


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padding_changes_no_logit_of_a_row(make, side):
    model = make()
    ids, mask = padded(side)
    logits = logits_of(model, ids, mask)
    for row, got, counts in zip(ROWS, logits, mask, strict=True):
        alone = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(got[counts], alone, **CLOSE)


@torch.no_grad()
def test_without_position_ids_left_padding_would_change_the_logits():
    ids, mask = padded("left")
    plain = gpt2()(input_ids=ids, attention_mask=mask, position_ids=torch.arange(8)[None]).logits
    assert (plain - logits_of(gpt2(), ids, mask))[mask].abs().max() > 1e-2


@torch.no_grad()
def test_what_stands_at_a_padded_position_is_never_read():
    model = gpt2()
    ids, mask = padded("both")
    other = torch.where(mask, ids, 33)
    got, expected = (logits_of(model, x, mask)[mask] for x in (other, ids))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@FAMILIES
@torch.no_grad()
def test_response_logits_are_the_full_logits_shifted_by_one(make):
    model = make()
    ids, mask = padded("left")
    for length in (1, 3, 7):
        got = response_logits(model, ids, mask, length)
        full = logits_of(model, ids, mask)[:, 8 - length - 1 : 8 - 1]
        torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-6)


@FAMILIES
def test_only_the_needed_positions_go_through_the_vocabulary_projection(make):
    model, widths = make(), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    response_logits(model, *padded("left"), 3)
    assert widths == [4]


# --- precision --------------------------------------------------------------------------------


def views(policy, reward, value):
    """What the formulas get to see of three models."""
    ids, mask = padded("left")
    logits = [response_logits(policy, ids, mask, 3), token_logits(policy, ids, mask)]
    return [*logits, reward(ids, mask), value(ids, mask, 3)]


def trio(make):
    policy = make()
    return policy, RewardModel.from_policy(policy), ValueModel.from_policy(policy)


@FAMILIES
@torch.no_grad()
def test_under_autocast_models_compute_in_bfloat16_and_hand_out_float32(make, monkeypatch):
    three, widths = trio(make), []
    single = views(*three)
    monkeypatch.setattr(
        "minippo.engine.passes.autocast", lambda _: torch.autocast("cpu", torch.bfloat16)
    )
    head = three[0].get_output_embeddings()
    head.register_forward_hook(lambda _, __, output: widths.append(output.dtype))
    for got, expected in zip(views(*three), single, strict=True):
        assert got.dtype == torch.float32 and not torch.equal(got, expected)
        # bfloat16 has 8 bits; errors grow with the size of what is summed.
        torch.testing.assert_close(got, expected, rtol=0, atol=0.1 * float(expected.abs().max()))
    assert set(widths) == {torch.bfloat16}


@FAMILIES
@pytest.mark.parametrize("given, handed_out", [("bfloat16", "float32"), ("float64", "float64")])
@torch.no_grad()
def test_models_of_another_precision_hand_out_float32_at_least(make, given, handed_out):
    for got in views(*(model.to(getattr(torch, given)) for model in trio(make))):
        assert got.dtype == getattr(torch, handed_out)


def test_at_least_float32_copies_nothing_that_is_precise_enough():
    for x in (torch.zeros(3), torch.zeros(3, dtype=torch.float64)):
        assert at_least_float32(x) is x


# --- tiny_gpt2 --------------------------------------------------------------------------------


def test_tiny_gpt2_is_what_was_asked_for_and_ready_to_use():
    model = tiny_gpt2(V, n_layer=3, n_embd=24, n_head=4, n_positions=17, eos_id=5, pad_id=6)
    config = model.config
    sizes = (config.vocab_size, config.n_layer, config.n_embd, config.n_head, config.n_positions)
    assert sizes == (V, 3, 24, 4, 17)
    assert (config.eos_token_id, config.pad_token_id) == (5, 6)
    assert not model.training


def test_tiny_gpt2_depends_on_its_seed_alone_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    first = tiny_gpt2(V, 1, 16, 2).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = tiny_gpt2(V, 1, 16, 2), tiny_gpt2(V, 1, 16, 2, seed=1)
    assert all(torch.equal(first[name], p) for name, p in again.state_dict().items())
    assert not torch.equal(first["transformer.wte.weight"], other.transformer.wte.weight)


@pytest.mark.parametrize("kind", ["policy", "reward", "value"])
def test_dropout_is_off(kind):
    base = gpt2()
    base.config.embd_pdrop = base.config.resid_pdrop = base.config.attn_pdrop = 0.5
    from_dropout = type(base)(base.config)  # a model whose dropout would show
    assert from_dropout.training
    reward = RewardModel.from_policy(from_dropout)
    value = ValueModel.from_policy(from_dropout)
    ids, mask = padded("left")
    run = {
        "policy": lambda: response_logits(checked_policy(from_dropout), ids, mask, 3),
        "reward": lambda: reward(ids, mask),
        "value": lambda: value(ids, mask, 3),
    }[kind]
    torch.testing.assert_close(run(), run(), rtol=0, atol=0)
    assert run().requires_grad  # gradients flow in eval mode as well


# --- frozen_copy ------------------------------------------------------------------------------


def test_a_frozen_copy_gets_no_gradients_and_does_not_follow_the_original():
    policy = gpt2()
    ids, mask = padded("left")
    with torch.no_grad():
        before = logits_of(policy, ids, mask)
    copied = frozen_copy(policy.train())
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())
    assert not same_storage(policy, copied)
    logits_of(policy, ids, mask).sum().backward()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    assert all(p.grad is None for p in copied.parameters())
    torch.testing.assert_close(logits_of(copied, ids, mask), before, rtol=0, atol=0)


def test_copying_leaves_the_original_trainable():
    policy = gpt2()
    frozen_copy(policy)
    assert all(p.requires_grad for p in policy.parameters())


def test_the_frozen_copy_of_a_reward_model_keeps_its_statistics():
    reward = RewardModel.from_policy(gpt2())
    reward.mean, reward.std = 0.5, 2.0
    copied = frozen_copy(reward)
    assert (copied.mean, copied.std) == (0.5, 2.0)


# --- loading ----------------------------------------------------------------------------------


@FAMILIES
@torch.no_grad()
def test_any_saved_decoder_loads_as_policy_with_the_same_logits(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    ids, mask = padded("left")
    expected = logits_of(model, ids, mask)
    loaded = Policy.from_pretrained(tmp_path)
    assert not loaded.training and loaded.dtype == torch.float32
    # Equal weights; the last bit of a product may depend on where the weights lie in memory.
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(logits_of(loaded, ids, mask), expected, rtol=1e-6, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(plain, ids, mask), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_policy_saved_in_half_precision_loads_in_float32(tmp_path):
    model = gpt2()
    copy.deepcopy(model).half().save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    for name, p in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], p.half().float(), rtol=0, atol=0)


def test_a_model_without_position_ids_is_refused(tmp_path):
    config = BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2, **IDS)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BloomForCausalLM.*position_ids"):
        Policy.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", LOADERS)
def test_a_missing_absolute_folder_is_refused_by_name(load, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "a/b/nowhere", "runs/nowhere"])
def test_a_missing_folder_is_refused_by_name_without_asking_the_hub(
    load, name, tmp_path, monkeypatch
):
    asked = ask_nobody(monkeypatch)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nowhere.*config.json.*folder, a hub name"):
        load(name)
    assert not asked


def ask_nobody(monkeypatch):
    """Puts something that only notes its argument in the place of `transformers`' loaders."""
    asked = []

    def refuse(name, **options):
        asked.append(name)
        raise OSError("We couldn't connect\nto the hub")

    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    return asked


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_name_of_the_hub_is_asked_for_there_and_an_error_names_what_else_there_is(
    load, name, tmp_path, monkeypatch
):
    for shipped in ("base", "sft"):
        (tmp_path / "checkpoints" / shipped).mkdir(parents=True)
    monkeypatch.setattr("minippo.engine.loading.DATA_DIR", tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = ask_nobody(monkeypatch)
    with pytest.raises(ValueError, match=f"'{name}'.*couldn't connect to the hub.*'base', 'sft'"):
        load(name)
    assert asked == [name]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    RewardModel.from_policy(gpt2()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "reward_stats.json").write_text('{"mean": 5.0, "std": 2.0}')
    assert RewardModel.from_pretrained("~/model").mean == 5.0


DAMAGED = {
    "model.safetensors": MODELS,
    "config.json": LOADERS,
    "tokenizer.json": [load_tokenizer],
    "tokenizer_config.json": [load_tokenizer],
    "reward_stats.json": [RewardModel.from_pretrained],
}


@pytest.mark.parametrize("file, load", [(f, load) for f in DAMAGED for load in DAMAGED[f]])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"[1]"],
                         ids=["cut", "empty", "other"])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_by_its_folder_with_a_remedy(file, load, damage, tmp_path):
    policy, folder = gpt2(), tmp_path / "broken"
    made = {RewardModel.from_pretrained: RewardModel, ValueModel.from_pretrained: ValueModel}.get(
        load
    )
    made.from_policy(policy).save_pretrained(folder) if made else policy.save_pretrained(folder)
    train_tokenizer(["some text"], 260).save_pretrained(folder)
    load(folder)  # before the damage
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(ValueError, match="broken.*save it again"):
        load(folder)


def test_an_empty_folder_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        Policy.from_pretrained(tmp_path / "empty")


def test_a_folder_without_weights_is_refused_by_name(tmp_path):
    gpt2().config.save_pretrained(tmp_path / "hollow")
    with pytest.raises(ValueError, match="hollow"):
        Policy.from_pretrained(tmp_path / "hollow")


def test_a_shipped_name_wins_over_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "base").mkdir(parents=True)
    monkeypatch.setattr("minippo.engine.loading.DATA_DIR", tmp_path)
    assert resolve_checkpoint("base") == str(tmp_path / "checkpoints" / "base")
    assert resolve_checkpoint("sft") == "sft"
    assert resolve_checkpoint(tmp_path / "other") == str(tmp_path / "other")


# --- tokenizers -------------------------------------------------------------------------------


def saved_tokenizer(folder, **tokens):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<e>": 0, "<p>": 1, "a": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    gpt2().config.save_pretrained(folder)
    return load_tokenizer(folder)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="EOS"):
        saved_tokenizer(tmp_path, pad_token="<p>")


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path):
    tokenizer = saved_tokenizer(tmp_path, eos_token="<e>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_a_padding_token_of_its_own_is_kept(tmp_path):
    assert saved_tokenizer(tmp_path, eos_token="<e>", pad_token="<p>").pad_token_id == 1


def test_a_checkpoint_of_another_vocabulary_is_refused_by_name():
    ours, same = (train_tokenizer(["some text, some more"], 262) for _ in range(2))
    check_same_vocabulary(ours, same, "reward model")
    for other in (train_tokenizer(["some text"], 260), train_tokenizer(["other words"], 262)):
        with pytest.raises(ValueError, match="reward model"):
            check_same_vocabulary(ours, other, "reward model")


# --- reward model -----------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_the_reward_is_read_at_the_last_token_that_counts(make, side):
    policy = make()
    reward = RewardModel.from_policy(policy)
    scores = reward(*padded(side))
    weight = reward.classifier.score.weight[0]
    for row, score in zip(ROWS, scores, strict=True):
        hidden = policy.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        torch.testing.assert_close(score, hidden @ weight, **CLOSE)


@torch.no_grad()
def test_the_reward_is_read_at_the_eos_where_pad_is_eos():
    reward = RewardModel.from_policy(gpt2())
    alone = torch.cat([reward(*padded("right", [row], EOS, len(row))) for row in ROWS])
    for side in ("left", "right", "both"):
        torch.testing.assert_close(reward(*padded(side, pad=EOS)), alone, **CLOSE)


@torch.no_grad()
def test_the_reward_does_not_change_with_the_statistics_or_the_query_length():
    reward = RewardModel.from_policy(gpt2())
    before = reward(*padded("left"))
    reward.mean, reward.std = 3.0, 7.0
    torch.testing.assert_close(reward(*padded("left"), 4), before, rtol=0, atol=0)


def test_a_reward_model_starts_from_the_policys_backbone_in_memory_of_its_own():
    policy = gpt2()
    reward = RewardModel.from_policy(policy)
    for name, p in policy.base_model.state_dict().items():
        assert torch.equal(reward.classifier.base_model.state_dict()[name], p)
    assert not same_storage(policy, reward)
    assert all(p.requires_grad for p in reward.parameters())


@torch.no_grad()
def test_the_fresh_reward_head_has_variance_one_over_width_plus_one_and_no_bias():
    policy = tiny_gpt2(V, n_layer=1, n_embd=256, n_head=2, n_positions=4)
    heads = [RewardModel.from_policy(policy, seed=s).classifier.score for s in range(16)]
    assert all(head.bias is None for head in heads)
    weights = torch.cat([head.weight for head in heads])
    # The standard error of a variance from 4096 normal numbers is sqrt(2/4096) = 2.2%.
    assert float(weights.var()) * 257 == pytest.approx(1, abs=5 * math.sqrt(2 / 4096))


def test_the_fresh_reward_head_depends_on_its_seed_alone():
    torch.manual_seed(1)
    heads = [RewardModel.from_policy(gpt2(), seed=s).classifier.score.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@FAMILIES
@torch.no_grad()
def test_a_saved_reward_model_is_a_sequence_classifier_of_transformers(make, tmp_path):
    reward = RewardModel.from_policy(make())
    reward.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    ids, mask = padded("right")
    torch.testing.assert_close(theirs(ids, attention_mask=mask).logits[:, 0], reward(ids, mask))
    ids, mask = padded("left")
    got = theirs(ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, 0]
    torch.testing.assert_close(got, reward(ids, mask))
    assert theirs.score.bias is None


@torch.no_grad()
def test_a_padding_token_given_where_the_policy_has_none_serves_transformers(tmp_path):
    policy = llama()
    policy.config.pad_token_id = None
    assert RewardModel.from_policy(policy).config.pad_token_id is None
    reward = RewardModel.from_policy(policy, pad_id=PAD)
    reward.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    ids, mask = padded("right")
    torch.testing.assert_close(theirs(ids, attention_mask=mask).logits[:, 0], reward(ids, mask))
    assert policy.config.pad_token_id is None  # the policy's own config is not touched


def test_the_policys_own_padding_token_is_kept():
    assert RewardModel.from_policy(gpt2(), pad_id=7).config.pad_token_id == PAD


@torch.no_grad()
def test_statistics_are_kept_beside_the_weights_and_read_back(tmp_path):
    reward = RewardModel.from_policy(gpt2())
    reward.mean, reward.std = -1.25, 0.375
    reward.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "reward_stats.json").read_text(encoding="utf-8"))
    assert stored == {"mean": -1.25, "std": 0.375}
    again = RewardModel.from_pretrained(tmp_path)
    assert (again.mean, again.std) == (-1.25, 0.375)
    # Equal weights; the last bit of a product may depend on where the weights lie in memory.
    torch.testing.assert_close(again(*padded("left")), reward(*padded("left")))


def test_statistics_are_read_by_name_whatever_their_order(tmp_path):
    RewardModel.from_policy(gpt2()).save_pretrained(tmp_path)
    (tmp_path / "reward_stats.json").write_text('{"std": 2.0, "mean": 5.0}', encoding="utf-8")
    again = RewardModel.from_pretrained(tmp_path)
    assert (again.mean, again.std) == (5.0, 2.0)


def test_a_classifier_without_statistics_loads_with_those_that_change_nothing(tmp_path):
    RewardModel.from_policy(gpt2()).classifier.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert (again.mean, again.std) == (0.0, 1.0)


@torch.no_grad()
def test_a_reward_model_saved_in_half_precision_loads_in_float32(tmp_path):
    reward = RewardModel.from_policy(gpt2())
    copy.deepcopy(reward).half().save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    for name, p in reward.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], p.half().float(), rtol=0, atol=0)
    # A weight of float16 is off by 2^-11 at most; the scores are sums of a few dozen of them.
    scores, expected = again(*padded("left")), reward(*padded("left"))
    torch.testing.assert_close(scores, expected, rtol=0, atol=float(expected.abs().max()) * 0.01)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_a_loaded_model_computes_bit_for_bit_what_the_saved_one_did(seed, tmp_path):
    # A resumed run loads what an uninterrupted one has in memory, and must give the same numbers.
    reward = RewardModel.from_policy(gpt2(width=48), seed=seed)
    reward.save_pretrained(tmp_path)
    ids, mask = padded("left")
    again = RewardModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids, mask), reward(ids, mask), rtol=0, atol=0)


# --- value model ------------------------------------------------------------------------------


@FAMILIES
def test_a_value_model_from_a_reward_model_is_zero_everywhere_and_trainable(make):
    reward = frozen_copy(RewardModel.from_policy(make()))
    value = ValueModel.from_reward_model(reward)
    values = value(*padded("left"), 5)
    assert values.shape == (3, 5) and not values.any()
    assert not same_storage(reward, value)
    assert all(p.requires_grad for p in value.parameters())
    assert not any(p.requires_grad for p in reward.parameters())
    assert reward.classifier.score.weight.any()  # the reward model keeps its own head
    theirs, ours = (m.classifier.base_model.state_dict() for m in (reward, value))
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())


@FAMILIES
@torch.no_grad()
def test_each_value_sees_the_query_and_the_response_before_its_token(make):
    value = ValueModel.from_policy(make())
    query, response = [[5, 6], [7, 8, 9, 10]], [[11, 12, 13], [14, 15, EOS]]
    ids, mask = padded("left", [q + r for q, r in zip(query, response, strict=True)], width=7)
    values = value(ids, mask, 3)
    for i, t in [(i, t) for i in range(2) for t in range(3)]:
        prefix = torch.tensor([query[i] + response[i][:t]])
        hidden = value.classifier.base_model(input_ids=prefix).last_hidden_state[0, -1]
        expected = hidden @ value.classifier.score.weight[0]
        torch.testing.assert_close(values[i, t], expected, **CLOSE)


@torch.no_grad()
def test_a_saved_value_model_loads_with_the_same_values(tmp_path):
    value = ValueModel.from_policy(gpt2())
    value.save_pretrained(tmp_path)
    got, expected = (
        ValueModel.from_pretrained(tmp_path)(*padded("left"), 4),
        value(*padded("left"), 4),
    )
    torch.testing.assert_close(got, expected)


def test_reward_model_and_critic_may_have_another_width_than_the_policy():
    reward = RewardModel.from_policy(gpt2(width=24))
    value = ValueModel.from_reward_model(reward)
    assert reward.config.n_embd == value.config.n_embd == 24
    assert reward(*padded("left")).shape == (3,) and value(*padded("left"), 2).shape == (3, 2)


# --- many responses to one query --------------------------------------------------------------


@FAMILIES
def test_candidates_have_the_scores_and_gradients_of_whole_sequences(make):
    """The query is read once and shared; the oracle reads it with every response, in float64."""
    queries, k = [[5, 6, 7], [8]], 3
    responses = [[9, 10], [11], [12, 13, 14], [15, 16], [17, 18, 19, 20], [21]]
    one, other = (RewardModel.from_policy(make().double()) for _ in range(2))
    other.load_state_dict(one.state_dict())
    query, query_mask = padded("left", queries, width=4)
    response, mask = padded("right", responses, width=5)
    scores = one.score_candidates(query, query_mask, response.view(2, k, 5), mask.view(2, k, 5))
    whole, seen = padded("right", [queries[i // k] + r for i, r in enumerate(responses)])
    expected = other(whole, seen).view(2, k)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(2, k, dtype=torch.float64)
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        if b.grad is not None:
            # Llama rotates in float32, whatever the model's dtype.
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
