"""`minippo chat`: the SFT and the PPO model answer side by side."""

import random
from pathlib import Path

from minippo.app.run import final_checkpoint
from minippo.batching import check_context, decode_response, encode_prompt
from minippo.config import RunConfig
from minippo.generation import generate_many
from minippo.models import Policy, load_tokenizer
from minippo.worlds.tinyhh.annotator import judge
from minippo.worlds.tinyhh.world import read_request

STAGES = {"SFT": "sft", "PPO": "ppo"}


def talk(
    name: str = RunConfig.name,
    out: Path = RunConfig.out,
    temperature: float = 1.0,
    seed: int = 0,
    max_response_tokens: int = 48,
) -> None:
    """Reads questions until an empty line; prints both answers, and the annotator's opinion.

    Both models are those of the run out/name; without a run of the default name, the shipped ones.
    Each keeps its own conversation, so that the two may be compared over several turns.
    Raises ValueError if the run is not there or not finished, or a setting cannot work.
    """
    if not temperature > 0:
        raise ValueError(f"--temperature is {temperature}; it must be greater than 0")
    paths = _checkpoints(Path(out) / name)
    models = {
        label: (Policy.from_pretrained(path), load_tokenizer(path)) for label, path in paths.items()
    }
    for policy, _ in models.values():
        check_context(policy, 1, max_response_tokens)
    histories: dict[str, list] = {label: [] for label in models}
    print("Ask something; an empty line ends it. For example: How do I grow sweet tomatoes?")
    turn = random.Random(seed).randrange(2**31)
    while question := _ask():
        turn += 1
        for label, (policy, tokenizer) in models.items():
            settings = (turn, temperature, max_response_tokens)
            answer = _answer(policy, tokenizer, question, histories[label], *settings)
            print(f"  {label}: {answer}{_opinion(question, answer, histories[label])}")
            histories[label].append((question, answer))


def _checkpoints(folder: Path) -> dict[str, str]:
    """Where the two models are, which is printed.

    A shipped SFT model stands beside a run's PPO only where that started from it.
    """
    if (folder / "ppo" / "final").is_dir() and not (folder / "sft").is_dir():
        print(f"{folder} has no stage 'sft': this is the shipped one, and PPO of {folder}")
        return {"SFT": "sft", "PPO": str(final_checkpoint(folder, "ppo"))}
    if folder.is_dir():
        paths = {label: str(final_checkpoint(folder, stage)) for label, stage in STAGES.items()}
        print("This is " + " and ".join(f"{label} of {path}" for label, path in paths.items()))
        return paths
    if folder.name != RunConfig.name:
        message = f"there is no run {folder}; give the --name of one"
        raise ValueError(f"{message}, or none at all to talk to the shipped models")
    print(f"There is no run {folder}: this is the SFT and the PPO model that minippo ships")
    return STAGES


def _ask() -> str:
    try:
        return input("You: ").strip()
    except EOFError:
        return ""


def _answer(
    policy, tokenizer, question: str, history, seed: int, temperature: float, limit: int
) -> str:
    """The longest history that fits into the context goes along."""
    room = policy.config.max_position_embeddings - limit
    history = list(history)
    prompt = encode_prompt(tokenizer, question, history)
    while len(prompt) > room and history:
        history.pop(0)
        prompt = encode_prompt(tokenizer, question, history)
    if len(prompt) > room:
        return f"(that question has {len(prompt)} tokens, this model reads at most {room})"
    answers = generate_many(policy, [prompt], tokenizer, limit, seed, temperature=temperature)
    return decode_response(tokenizer, answers[0])


def _opinion(question: str, answer: str, history) -> str:
    if read_request(question, history) is None:
        return ""  # the annotator knows this world only
    judgement = judge(question, answer, history)
    return f"   [annotator {judgement.score:+.2f}]"
