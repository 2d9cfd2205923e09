"""`minippo chat`: the SFT and the PPO model answer side by side."""

import random

from minippo.batching import decode_response, encode_prompt
from minippo.config import RunConfig
from minippo.generation import generate_many
from minippo.models import load_policy, load_tokenizer
from minippo.run import Run
from minippo.tinyhh.annotator import judge
from minippo.tinyhh.world import read_request


def talk(config: RunConfig, temperature: float = 1.0) -> None:
    """Reads questions until an empty line; prints both answers, and the annotator's opinion.

    Each model keeps its own conversation, so that the two may be compared over several turns.
    """
    if not temperature > 0:
        raise ValueError(f"--temperature is {temperature}; it must be greater than 0")
    paths = {name: Run.find(config, stage) for name, stage in (("SFT", "sft"), ("PPO", "ppo"))}
    models = {name: (load_policy(path), load_tokenizer(path)) for name, path in paths.items()}
    histories: dict[str, list] = {name: [] for name in models}
    print("Ask something; an empty line ends it. For example: How do I grow sweet tomatoes?")
    turn = random.Random(config.seed).randrange(2**31)
    while question := _ask():
        turn += 1
        for name, (policy, tokenizer) in models.items():
            answer = _answer(policy, tokenizer, question, histories[name], turn, temperature)
            print(f"  {name}: {answer}{_opinion(question, answer, histories[name])}")
            histories[name].append((question, answer))


def _ask() -> str:
    try:
        return input("You: ").strip()
    except EOFError:
        return ""


def _answer(policy, tokenizer, question: str, history, seed: int, temperature: float) -> str:
    """The longest history that fits into the context goes along."""
    limit, room = 48, policy.config.max_position_embeddings - 48
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
