"""Models and tokenizers from a shipped name, a folder or the hub: looked at, and then read."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from minippo.config import DATA_DIR
from minippo.engine.checkpoints import (
    check_claims,
    check_folder,
    check_sizes,
    read_settings,
    tensor_shapes,
)

# Whatever is loaded: no code of a checkpoint's own.
SAFE = {"trust_remote_code": False}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "config.json")
SCORE_STATS = "reward_stats.json"


def resolve_checkpoint(path_or_name) -> str:
    """The folder of a shipped checkpoint (base, sft, reward, value, ppo), or what was given."""
    shipped = DATA_DIR / "checkpoints" / str(path_or_name)
    return str(shipped) if shipped.is_dir() else os.path.expanduser(path_or_name)


def check_same_vocabulary(tokenizer, other, name: str) -> None:
    """Raises ValueError if a checkpoint's tokenizer is not the one that is in use."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"{name} has another vocabulary ({len(other)} tokens, not {len(tokenizer)}): "
            "its scores of these tokens would mean nothing; use models trained from one base"
        )


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


def read_tokenizer(path_or_name):
    """The tokenizer that was saved beside a checkpoint; its files are looked at before."""
    from transformers import AutoTokenizer

    with _reading(path_or_name) as path:
        if Path(path).is_dir():
            check_folder(Path(path), TOKENIZER_FILES)
            for file in filter(Path.is_file, (Path(path) / name for name in TOKENIZER_FILES)):
                read_settings(file)
        return AutoTokenizer.from_pretrained(path, **SAFE)


def load_model(kind, path_or_name, **options):
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


def write_score_stats(folder: Path, mean: float, std: float) -> None:
    """Keeps mean and std of a reward model's scores beside its weights."""
    stats = json.dumps({"mean": mean, "std": std})
    (folder / SCORE_STATS).write_text(stats, encoding="utf-8")


def read_score_stats(path_or_name) -> tuple[float, float]:
    """What `write_score_stats` wrote; (0, 1) if there is none, ValueError if it is damaged."""
    with _reading(path_or_name) as path:
        stats = Path(path) / SCORE_STATS
        return _score_stats(stats) if stats.is_file() else (0.0, 1.0)


def _score_stats(path: Path) -> tuple[float, float]:
    saved = read_settings(path)
    for name in ("mean", "std"):
        if type(saved.get(name)) not in (int, float):
            raise ValueError(f"{path.name}: {name} is {saved.get(name)!r}, which is no number")
    if saved["std"] <= 0:
        raise ValueError(f"{path.name}: std is {saved['std']}; it must be greater than 0")
    return float(saved["mean"]), float(saved["std"])
