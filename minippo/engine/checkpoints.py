"""Checkpoint folders: what is read of a stranger's, and what a training saves of itself.

Only safetensors and JSON are read, and no file before it was looked at. So a checkpoint from a
stranger can neither execute code nor lead out of its folder, nor make us allocate more than its own
weights take. docs/checkpoints.md has the layout and the list of what is refused.
"""

import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minippo.engine.ranks import split_like

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # library calls are silent
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # also about every retry without a network
if "huggingface_hub" in sys.modules and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # it has read the environment already
    if "transformers" in sys.modules:  # which asks huggingface_hub, but only once
        sys.modules["transformers"].utils.logging.disable_progress_bar()

CHECKSUMS, WEIGHTS = "checksums.json", "model.safetensors"
MAX_JSON_BYTES, MAX_JSON_DEPTH = 100_000_000, 32  # the largest tokenizers have about 35 MB
MANY_WEIGHTS, MANY_LAYERS = 2**24, 64  # a setting up to these costs little, whatever it means
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Keys that make `transformers` run code or read weights from somewhere else.
REFUSED_KEYS = {
    "auto_map": "code that the checkpoint brings along",
    "quantization_config": "a quantizer's code; save it without quantization",
    "attn_implementation": "an attention kernel, which may be code from the hub",
    "_attn_implementation": "an attention kernel, which may be code from the hub",
    "experts_implementation": "a kernel, which may be code from the hub",
    "transformers_weights": "weights of another name",
}


# what anybody's folder must be


def check_folder(folder: Path, names=None) -> None:
    """Raises ValueError unless all is a plain file or folder in it, with the checksums it had.

    names: of the files to be read, where that is not all of them; the sums of others are not taken
    """
    home = folder.resolve()
    for path in folder.iterdir():
        target = path.resolve()
        if not target.is_relative_to(home):
            raise ValueError(f"{path.name} is a link that leads out of the folder")
        if not target.is_file() and not target.is_dir():
            raise ValueError(f"{path.name} is neither a file nor a folder")
    if (folder / "adapter_config.json").is_file():
        raise ValueError("adapter_config.json names another model as its base; merge the adapter")
    if (folder / CHECKSUMS).is_file():
        check_checksums(folder, names)


def read_json(path: Path):
    """The value of a JSON file; ValueError if it is too large, too deep, or holds NaN."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, more than {MAX_JSON_BYTES:,}")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    for depth, level in enumerate(_levels(value)):
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"{path.name} is nested deeper than {MAX_JSON_DEPTH}")
        if not all(math.isfinite(item) for _, item in level if isinstance(item, float)):
            raise ValueError(f"{path.name} holds NaN or infinity")
    return value


def read_settings(path: Path) -> dict:
    """A JSON file that must hold an object without any of the REFUSED_KEYS, at any depth."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} is no JSON object")
    for key, value in (pair for level in _levels(settings) for pair in level):
        if key in REFUSED_KEYS and value is not None:
            raise ValueError(f"{path.name} has {key}: {REFUSED_KEYS[key]}")
    return settings


def _levels(value):
    """The (key, value) pairs of a JSON value, depth by depth; the key of a list is its items'."""
    level = [("", value)]
    while level:
        yield level
        level = [pair for key, item in level for pair in _inside(key, item)]


def _inside(key: str, item) -> list[tuple]:
    """The (key, value) pairs one level further down; none in what is neither dict nor list."""
    if isinstance(item, dict):
        return list(item.items())
    return [(key, part) for part in item] if isinstance(item, list) else []


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. ValueError if there are none, or some lie elsewhere."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        reason = f"; {pickles[0]} may execute code and is never read" if pickles else ""
        raise ValueError(f"there is no {WEIGHTS}{reason}")
    weight_map = read_settings(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names:
        raise ValueError(f"{index.name} has no weight_map")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index.name} points outside of the folder: {name!r}")
        if not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ValueError(f"{index.name} names {name}, which is no safetensors file here")
    return [folder / name for name in sorted(set(names))]


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every saved weight; only the headers of the files are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} is damaged ({error})") from error
    return shapes


def check_claims(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if config.json claims more layers or a larger size than there are weights.

    It runs before `transformers` sees the file, which builds lists as long as it is told to.
    """
    total = sum(map(math.prod, shapes.values()))
    settings = read_settings(folder / "config.json")
    for key, value in (pair for level in _levels(settings) for pair in level):
        if type(value) is not int:
            continue
        message = f"config.json claims {key} = {value:,}, but {WEIGHTS} has"
        if "layer" in key and value > max(len(shapes), MANY_LAYERS):
            raise ValueError(f"{message} {len(shapes):,} tensors")
        if value > max(total, MANY_WEIGHTS):
            raise ValueError(f"{message} {total:,} numbers")


def check_sizes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if a model, which may be on the meta device, is not what was saved.

    Tensors are compared that have the same name, with the backbone's prefix or without; names that
    are missing or not known are for the loader to find, which knows how they are converted.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    expected = {key.removeprefix(prefix): tuple(v.shape) for key, v in model.state_dict().items()}
    for name, shape in shapes.items():
        wanted = expected.get(name.removeprefix(prefix), shape)
        if shape != wanted:
            raise ValueError(f"{name} is {shape} in {WEIGHTS}, but {wanted} by config.json")
    total = sum(map(math.prod, shapes.values()))
    claimed = sum(x.numel() for x in [*model.parameters(), *model.buffers()])
    if claimed > 2 * total + MANY_WEIGHTS:
        message = f"config.json describes a model of {claimed:,} numbers"
        raise ValueError(f"{message}, but {WEIGHTS} has {total:,}")


# checksums


def write_checksums(folder: Path) -> None:
    """A file with the BLAKE2 of every file, in a folder and in each below it."""
    for inner in filter(Path.is_dir, folder.iterdir()):
        write_checksums(inner)
    sums = {name: _blake2(folder / name) for name in _summed(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def check_checksums(folder: Path, names=None, below: bool = False) -> None:
    """Raises ValueError if a file of the folder was changed, lost or added since it was saved.

    names: of the files whose content is compared, all of them if None
    below: compare those of the folders in it as well
    """
    sums, files = read_settings(folder / CHECKSUMS), _summed(folder)
    for name in sorted({*files, *sums}):
        if name not in files:
            raise ValueError(f"{name} was lost since the checkpoint was saved")
        if name not in sums:
            raise ValueError(f"{name} was added since the checkpoint was saved")
        if (names is None or name in names) and sums[name] != _blake2(folder / name):
            raise ValueError(f"{name} was changed since the checkpoint was saved")
    for inner in filter(Path.is_dir, folder.iterdir() if below else ()):
        check_checksums(inner, names, below)


def _summed(folder: Path) -> list[str]:
    """The files whose sums a folder keeps: its own, and the sums of each folder in it."""
    paths = [p / CHECKSUMS if p.is_dir() else p for p in folder.iterdir() if p.name[0] != "."]
    names = (p.relative_to(folder).as_posix() for p in paths if p.is_file())
    return sorted(name for name in names if name != CHECKSUMS)  # hidden ones are nobody's to read


def _blake2(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# what a training saves of itself


def training_tensors(state: dict) -> dict[str, Tensor]:
    """Every parameter and every optimizer moment of a training under a flat name."""
    named = {name: _tensors_of(part) for name, part in state.items()}
    flat = {f"{name}/{key}": x for name, own in named.items() for key, x in own.items()}
    return {key: value.contiguous() for key, value in flat.items()}


def _tensors_of(part) -> dict[str, Tensor]:
    """A model's parameters or an optimizer's moments; nothing of anything else."""
    if isinstance(part, nn.Module):
        return {key: value.detach() for key, value in part.named_parameters()}
    if isinstance(part, torch.optim.Optimizer):
        states = part.state_dict()["state"].items()
        return {f"{index}/{key}": x for index, moments in states for key, x in moments.items()}
    return {}


def restore_training(state: dict, tensors: dict[str, Tensor], marks: dict) -> None:
    """Puts back what `training_tensors` gave, and the plain numbers of `marks`.

    Raises ValueError if a name is missing or left over, or if a shape is another one.
    """
    left = dict(tensors)
    for name, part in state.items():
        own = {key: left.pop(key) for key in list(left) if key.startswith(f"{name}/")}
        own = {key.removeprefix(f"{name}/"): value for key, value in own.items()}
        if isinstance(part, nn.Module):
            _restore_model(part, own, name)
        elif isinstance(part, torch.optim.Optimizer):
            _restore_optimizer(part, own, name)
        else:
            part.update(marks[name])
    if left:
        raise ValueError(f"{min(left)} belongs to no part of this training")


def _restore_model(model: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.keys():
        key = min(parameters.keys() ^ tensors.keys())
        raise ValueError(f"{name}/{key} is saved or needed, and not both")
    for key, parameter in parameters.items():
        _check_shape(f"{name}/{key}", tensors[key], parameter)
        parameter.data.copy_(split_like(tensors[key], parameter))


def _restore_optimizer(optimizer, tensors: dict[str, Tensor], name: str) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = {**optimizer.state_dict(), "state": {}}
    for key, value in tensors.items():
        index, _, moment = key.partition("/")
        if not index.isdigit() or int(index) >= len(parameters):
            raise ValueError(f"{name}/{key} belongs to no parameter")
        if value.dim():  # the count of steps has none
            _check_shape(f"{name}/{key}", value, parameters[int(index)])
            value = split_like(value, parameters[int(index)])
        saved["state"].setdefault(int(index), {})[moment] = value
    if len({frozenset(moments) for moments in saved["state"].values()}) > 1:
        raise ValueError(f"{name} has not the same moments of every parameter")
    optimizer.load_state_dict(saved)


def _check_shape(name: str, saved: Tensor, wanted: Tensor) -> None:
    if saved.shape != wanted.shape:
        raise ValueError(f"{name} has the shape {tuple(saved.shape)}, not {tuple(wanted.shape)}")
