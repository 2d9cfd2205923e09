"""A process that measures its memory: `python -m tests.bounds.probe load`, jobs as lines of JSON.

Each job is done in a fork, so that it starts from the same memory: that of a fresh process which
has imported what it needs. Linux only: the figures are those of /proc.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

STATUS = Path("/proc/self/status")


def memory(name: str) -> int:
    """kB of this process: VmHWM (peak), RssAnon (its own, not mapped from a file) ..."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def hold(megabytes: int) -> dict:
    """Nothing but so much memory: shows that the figures are right."""
    held = b"x" * (megabytes * 2**20)
    return {"peak": memory("VmHWM"), "held": len(held)}


def load(path: str, on_error: str = "skip") -> dict:
    """Loads a file, then reads every text of it back."""
    import pyarrow

    from minippo.hh import BadPair, load_preferences

    try:
        data, report = load_preferences(path, on_error=on_error)
    except BadPair as fault:
        return {"peak": memory("VmHWM"), "error": fault.reason}
    except ValueError as error:
        return {"peak": memory("VmHWM"), "error": str(error)}
    peak, own = memory("VmHWM"), memory("RssAnon")
    characters = sum(len(row["chosen"]) + len(row["rejected"]) for row in data)
    read_back = max(memory("RssAnon") - own, pyarrow.total_allocated_bytes() // 1024)
    left = [str(file) for file in Path(tempfile.gettempdir()).rglob("*") if file.is_file()]
    counts = {"accepted": report.accepted, "refused": report.refused, "characters": characters}
    return {"peak": peak, "read_back": read_back, "left": left, **counts}


def train(steps: int, out: str = "", leak: int = 0) -> dict:
    """RssAnon after each step of `train_ppo`, in kB; with a folder a `Run` writes into it.

    leak: kB that each step keeps, to show that it is noticed
    """
    import torch

    from minippo.app.run import Run
    from minippo.config import PPOConfig, RunConfig
    from minippo.models import ValueModel, frozen_copy, tiny_gpt2
    from minippo.optim import Hooks
    from minippo.ppo import train_ppo

    torch.manual_seed(0)
    config = PPOConfig(
        steps=steps, batch_size=32, minibatch_size=32, micro_batch_size=32, ppo_epochs=1,
        max_prompt_tokens=8, max_response_tokens=6, warmup_steps=0, save_every=100,
    )  # fmt: skip
    policy = tiny_gpt2(40, n_layer=1, n_embd=16, n_head=2, n_positions=32)
    models = policy, frozen_copy(policy), ValueModel.from_policy(policy)
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0, save_pretrained=lambda folder: None)
    hooks = Run(RunConfig(name="r", out=Path(out)), {"ppo": config}) if out else Hooks()
    hooks.tokenizer, after, leaked, usual = tokenizer, [], [], hooks.step

    def step(*arguments):
        usual(*arguments)
        leaked.append(b"x" * 1024 * leak)
        after.append(memory("RssAnon"))

    hooks.step = step
    prompts = [[number, number + 1, 9] for number in range(5, 38)]
    history = train_ppo(*models, even_tokens, prompts, tokenizer, config, hooks=hooks)
    return {"after": after, "history": sum(map(size_of, history)) / 1024}


def even_tokens(tokens, attention_mask, query_length):
    """A reward by a rule: how many tokens of the answer are even."""
    response, real = tokens[:, query_length:], attention_mask[:, query_length:]
    return ((response % 2 == 0) & real).sum(1).float()


def size_of(metrics: dict) -> int:
    """Bytes of one entry of the history that `train_ppo` returns, its keys and floats included."""
    return sys.getsizeof(metrics) + sum(sys.getsizeof(part) for p in metrics.items() for part in p)


def serve(kind: str) -> None:
    """Answers jobs, [name of a function here, its arguments ...], until there are no more."""
    import datasets  # noqa: F401
    import pyarrow  # noqa: F401

    import minippo.hh  # noqa: F401

    if kind == "train":
        import minippo.app.run  # noqa: F401
        from minippo.models import tiny_gpt2
        from minippo.optim import adamw

        # The first model and the first optimizer import more; no backward, it forbids a fork.
        adamw({"policy": tiny_gpt2(8, n_layer=1, n_embd=4, n_head=1)}, {"policy": 0.0})
    for line in sys.stdin:
        name, temporary, *arguments = json.loads(line)
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        tempfile.tempdir = temporary
        job = {"hold": hold, "load": load, "train": train}[name]
        print(json.dumps(job(*arguments)), flush=True)
        os._exit(0)
    os._exit(0)  # at once: nothing is left to be tidied up


if __name__ == "__main__":
    serve(sys.argv[1])
