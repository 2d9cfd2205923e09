"""Checkpoints of strangers: each hostile or damaged folder is refused, in words of its own.

Nothing is trusted to refuse itself: a marker file would show that code had been run, and the time
and the memory of the process that something had been built.
"""

import json
import os
import pickle
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import minippo
from minippo.engine.checkpoints import (
    check_checksums,
    read_json,
    restore_training,
    training_tensors,
    write_checksums,
)
from minippo.models import Policy, RewardModel, ValueModel, load_tokenizer, tiny_gpt2
from minippo.optim import adamw
from minippo.pretrain import train_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LLAMA = transformers.LlamaConfig(
    vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=1, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict:
    """Sound checkpoints: of a policy with its tokenizer, of a reward model, of a Llama."""
    root = tmp_path_factory.mktemp("good")
    tokenizer = train_tokenizer(["Water the plants every morning."], 300)
    policy = tiny_gpt2(300, n_layer=1, n_embd=8, n_head=2, n_positions=16)
    policy.save_pretrained(root / "policy")
    RewardModel.from_policy(policy).save_pretrained(root / "reward")
    transformers.LlamaForCausalLM(LLAMA).save_pretrained(root / "llama")
    for folder in (root / "policy", root / "reward", root / "llama"):
        tokenizer.save_pretrained(folder)
    return {"policy": root / "policy", "reward": root / "reward", "llama": root / "llama"}


# what a stranger may do to a folder


def edit(name: str, **changes):
    """Sets keys of a JSON file."""

    def damage(folder: Path) -> None:
        path = folder / name
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
        path.write_text(json.dumps({**settings, **changes}))

    return damage


def tensors(change):
    """Rewrites the weights."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def put(name: str, data: bytes):
    """Puts a file in the place of another."""
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str):
    """Cuts a file in the middle."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def shards(file: str):
    """Weights in shards, of which the index says where they are."""

    def damage(folder: Path) -> None:
        names = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
        (folder / "weights.bin").write_bytes(bomb(folder))
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return damage


class Bomb:
    """Unpickled, it leaves a marker."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def bomb(folder: Path) -> bytes:
    return pickle.dumps(Bomb(str(folder.parent / "marker")))


def pickles(*names: str):
    """Pickles that execute code, and no other weights."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        for name in names:
            (folder / name).write_bytes(bomb(folder))

    return damage


def own_code(name: str, **classes: str):
    """Classes of the checkpoint's own, whose module leaves a marker when it is imported."""

    def damage(folder: Path) -> None:
        marker = str(folder.parent / "marker")
        (folder / "own.py").write_text(f"import pathlib\npathlib.Path({marker!r}).touch()\n")
        edit(name, auto_map=classes)(folder)

    return damage


def link_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def huge(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 10**12)  # of which no block is on the disk


def widely(folder: Path) -> None:
    tiny_gpt2(300, n_layer=1, n_embd=208, n_head=2, n_positions=16).save_pretrained(folder)
    edit("config.json", n_layer=60)(folder)


def set_nan(weights) -> None:
    weights["transformer.ln_f.weight"][3] = float("nan")


def shorten(weights) -> None:
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"][:4].clone()


def drop(weights) -> None:
    del weights["transformer.h.0.attn.c_attn.weight"]


def add(weights) -> None:
    weights["transformer.h.7.attn.c_attn.weight"] = torch.zeros(2)


LOADERS = {
    "policy": Policy.from_pretrained,
    "llama": Policy.from_pretrained,
    "reward": RewardModel.from_pretrained,
}
LOADERS["tokenizer"] = load_tokenizer
CODE = {"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}
HEADER = (2**62).to_bytes(8, "little")

# what is loaded, what was done to its folder, what is said of it
HOSTILE = {
    "pickled weights only": (
        "policy", pickles("pytorch_model.bin"),
        "there is no model.safetensors; pytorch_model.bin may execute code and is never read",
    ),
    "no weights at all": (
        "policy", lambda folder: (folder / WEIGHTS).unlink(), "there is no model.safetensors;",
    ),
    "own code": ("policy", own_code("config.json", **CODE), "config.json has auto_map: code"),
    "own code for the tokenizer": (
        "tokenizer", own_code("tokenizer_config.json", AutoTokenizer="own.Tokenizer"),
        "tokenizer_config.json has auto_map: code",
    ),
    "a kernel from the hub": (
        "policy", edit("config.json", attn_implementation="someone/kernel"),
        "config.json has attn_implementation: an attention kernel",
    ),
    "a quantizer": (
        "policy", edit("config.json", quantization_config={"quant_method": "own"}),
        "config.json has quantization_config",
    ),
    "weights of another name": (
        "policy", edit("config.json", transformers_weights="own.safetensors"),
        "config.json has transformers_weights",
    ),
    "an adapter of another base": (
        "policy", put("adapter_config.json", b'{"base_model_name_or_path": "someone/else"}'),
        "adapter_config.json names another model",
    ),
    "a billion layers": (
        "policy", edit("config.json", n_layer=10**9),
        r"config.json claims n_layer = 1,000,000,000, but model.safetensors has 16 tensors",
    ),
    "a billion layers of Llama, which lists them": (
        "llama", edit("config.json", num_hidden_layers=10**9),
        r"claims num_hidden_layers = 1,000,000,000, but model.safetensors has 12 tensors",
    ),
    "a billion wide": (
        "policy", edit("config.json", n_embd=10**9),
        r"config.json claims n_embd = 1,000,000,000, but model.safetensors has 3,416 numbers",
    ),
    "sixteen million wide": (
        "policy", edit("config.json", n_embd=2**24, n_layer=64),
        r"c_attn.bias is \(24,\) in model.safetensors, but \(50331648,\) by config.json",
    ),
    "a vocabulary without weights": (
        "llama", edit("config.json", vocab_size=2**23),
        r"is \(300, 8\) in model.safetensors, but \(8388608, 8\) by config.json",
    ),
    "hidden layers without weights": (
        "policy", edit("config.json", n_layer=60), "missing keys: transformer.h.1",
    ),
    "wide layers without weights": (
        "policy", widely, r"config.json describes a model of 31,\d{3},\d{3} numbers, but",
    ),
    "an index that leads out": (
        "policy", shards("../elsewhere.safetensors"),
        r"index.json points outside of the folder: '../elsewhere.safetensors'",
    ),
    "an index of pickles": (
        "policy", shards("weights.bin"), "index.json names weights.bin, which is no safetensors",
    ),
    "an index of a lost shard": (
        "policy", shards("lost.safetensors"), "index.json names lost.safetensors, which is no",
    ),
    "a link that leads out": (
        "policy", link_out, "model.safetensors is a link that leads out of the folder",
    ),
    "a pipe that nobody writes to": (
        "policy", pipe, "model.safetensors is neither a file nor a folder",
    ),
    "deeply nested JSON": (
        "policy", put("config.json", b"[" * 10**5), "config.json is nested too deeply",
    ),
    "rather deeply nested JSON": (
        "tokenizer", put("special_tokens_map.json", b'{"a":' * 40 + b"1" + b"}" * 40),
        "special_tokens_map.json is nested deeper than 32",
    ),
    "a terabyte of JSON": (
        "tokenizer", huge, "tokenizer.json has 1,000,000,000,000 bytes, more than",
    ),
    "settings that are none": ("policy", put("config.json", b"[1]"), "config.json is no JSON obj"),
    "NaN as a setting": (
        "policy", edit("config.json", layer_norm_epsilon=float("nan")),
        "config.json holds NaN or infinity",
    ),
    "a weight that is NaN": (
        "policy", tensors(set_nan), "transformer.ln_f.weight has a weight that is NaN",
    ),
    "a short tensor": (
        "policy", tensors(shorten),
        r"transformer.ln_f.weight is \(4,\) in model.safetensors, but \(8,\) by config.json",
    ),
    "a tensor too few": (
        "policy", tensors(drop), "missing keys: transformer.h.0.attn.c_attn.weight",
    ),
    "a tensor too many": (
        "policy", tensors(add), "unexpected keys: transformer.h.7.attn.c_attn.weight",
    ),
    "weights cut off": ("policy", cut(WEIGHTS), "model.safetensors is damaged"),
    "a header without end": (
        "policy", put(WEIGHTS, HEADER + b"{}"), "model.safetensors is damaged .*[Hh]eader",
    ),
    "a policy as a reward model": (
        "reward", lambda folder: shutil.copy(folder.parent / "policy" / WEIGHTS, folder / WEIGHTS),
        "missing keys: score.weight",
    ),
    "statistics that are NaN": (
        "reward", put("reward_stats.json", b'{"mean": NaN, "std": 1.0}'),
        "reward_stats.json holds NaN or infinity",
    ),
    "a standard deviation of 0": (
        "reward", put("reward_stats.json", b'{"mean": 0.0, "std": 0.0}'),
        "reward_stats.json: std is 0.0; it must be greater than 0",
    ),
    "a mean that is a text": (
        "reward", put("reward_stats.json", b'{"mean": "1", "std": 1.0}'),
        "reward_stats.json: mean is '1', which is no number",
    ),
    "a tokenizer cut off": ("tokenizer", cut("tokenizer.json"), "tokenizer.json is not JSON"),
    "a tokenizer that is none": (
        "tokenizer", put("tokenizer.json", b"{}"), "no checkpoint at .* can be read",
    ),
    "bytes that are no text": (
        "tokenizer", put("tokenizer_config.json", b'{"a": "\xff\xfe"}'),
        "tokenizer_config.json is not JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_with_its_own_message(good, tmp_path, name):
    kind, damage, said = HOSTILE[name]
    source = "policy" if kind == "tokenizer" else kind
    shutil.copytree(good["policy"], tmp_path / "policy")
    shutil.copytree(good[source], tmp_path / source, dirs_exist_ok=True)
    LOADERS[kind](tmp_path / source)  # before the damage
    damage(tmp_path / source)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=said) as refusal:
        LOADERS[kind](tmp_path / source)
    assert str(tmp_path / source) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "marker").exists(), "code of the checkpoint was executed"
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kB


def test_every_hostile_folder_is_refused_in_other_words():
    assert len({said for _, _, said in HOSTILE.values()}) == len(HOSTILE) >= 30


def test_a_bomb_goes_off_where_it_is_unpickled(tmp_path):
    """Else the marker would show nothing."""
    pickle.loads(bomb(tmp_path / "folder"))
    assert (tmp_path / "marker").exists()


def test_no_module_of_the_package_can_unpickle():
    package = Path(minippo.__file__).parent
    files = sorted(package.rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert len(files) > 30
    assert not re.findall(r"torch\.load\(|\b(?:import|from) (?:pickle|dill|joblib)\b", text)


PICKLED = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth")


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_pickles_beside_good_weights_are_never_read(good, tmp_path, kind):
    folder = shutil.copytree(good[kind], tmp_path / kind)
    for name in PICKLED:
        (folder / name).write_bytes(bomb(folder))
    LOADERS[kind](folder), load_tokenizer(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "load", [Policy.from_pretrained, RewardModel.from_pretrained, ValueModel.from_pretrained]
)
def test_of_the_hub_too_only_safetensors_and_no_code_are_asked_for(load, monkeypatch, tmp_path):
    asked = []

    def ask(name, **options):
        asked.append(options)
        raise OSError("no network")

    for kind in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", ask)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no network"):
        load("someone/model")
    assert asked[0]["trust_remote_code"] is False and asked[0]["use_safetensors"] is True


def test_weights_in_shards_load(good, tmp_path):
    policy = Policy.from_pretrained(good["policy"])
    policy.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / INDEX).is_file()
    loaded = Policy.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in policy.state_dict().items())


# checksums


def test_checksums_notice_each_change_of_each_file_by_name(good, tmp_path):
    for name in sorted(path.name for path in good["reward"].iterdir()):
        for kind in ("changed", "lost"):
            folder = shutil.copytree(good["reward"], tmp_path / f"{name}-{kind}")
            write_checksums(folder)
            check_checksums(folder)
            data = bytearray((folder / name).read_bytes())
            data[len(data) // 2] ^= 1
            (folder / name).write_bytes(data) if kind == "changed" else (folder / name).unlink()
            with pytest.raises(ValueError, match=f"{name} was {kind} since the checkpoint was"):
                check_checksums(folder)


def test_a_file_that_was_added_is_noticed_but_not_that_of_a_file_manager(good, tmp_path):
    folder = shutil.copytree(good["policy"], tmp_path / "a")
    write_checksums(folder)
    (folder / ".DS_Store").write_text("")
    Policy.from_pretrained(folder)
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="added_tokens.json was added since"):
        load_tokenizer(folder)


def test_a_tampered_checkpoint_of_a_run_is_not_loaded(good, tmp_path):
    folder = shutil.copytree(good["policy"], tmp_path / "a")
    write_checksums(folder)
    tensors(lambda weights: weights["transformer.ln_f.weight"].add_(1))(folder)
    with pytest.raises(ValueError, match="model.safetensors was changed since"):
        Policy.from_pretrained(folder)
    edit("tokenizer_config.json", eos_token="a")(folder)
    with pytest.raises(ValueError, match="tokenizer_config.json was changed since"):
        load_tokenizer(folder)


# what a training saves of itself


def trained(width: int = 4) -> dict:
    """A model after one step of its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Linear(width, 2)
    optimizer = adamw({"policy": model}, {"policy": 0.1})
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return {"policy": model, "optimizer": optimizer, "progress": {"kl_coef": 0.3}}


def test_a_training_goes_on_from_what_was_saved_of_it():
    before, after = trained(), trained()
    saved = {name: value.clone() for name, value in training_tensors(before).items()}
    with torch.no_grad():
        after["policy"].weight.zero_()
    restore_training(after, saved, {"progress": {"kl_coef": 0.7}})
    again = training_tensors(after)
    assert saved.keys() == again.keys() and len(saved) == 2 + 2 * 3
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert after["progress"] == {"kl_coef": 0.7}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("policy/bias"), "policy/bias is saved or needed, and not both"),
        (lambda t: t.update({"policy/own": t["policy/bias"]}), "policy/own is saved or needed"),
        (lambda t: t.update({"value/own": t["policy/bias"]}), "value/own belongs to no part"),
        (lambda t: t.update({"policy/weight": torch.ones(2, 1)}), r"shape \(2, 1\), not \(2, 4\)"),
        (lambda t: t.update({"optimizer/0/exp_avg": torch.ones(4)}), r"shape \(4,\), not \(2, 4\)"),
        (lambda t: t.pop("optimizer/0/exp_avg"), "optimizer has not the same moments of every"),
        (lambda t: t.update({"optimizer/9/step": torch.ones(())}), "optimizer/9/step belongs to"),
    ],
)
def test_what_does_not_fit_a_training_is_named_and_not_stretched(change, said):
    state = trained()
    saved = training_tensors(state)
    change(saved)
    with pytest.raises(ValueError, match=said):
        restore_training(state, saved, {"progress": {}})


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, True, "\u00e9"], "b": {"c": {}}}
    (tmp_path / "f.json").write_text(json.dumps(value), encoding="utf-8")
    assert read_json(tmp_path / "f.json") == value
