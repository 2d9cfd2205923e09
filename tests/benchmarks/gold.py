"""The judgement of a trained policy: the same sampler, prompts and annotator for every side."""

from statistics import fmean

from minippo.app.sources import PPO_PROMPTS
from minippo.batching import encode_rows
from minippo.config import PPOConfig
from minippo.evaluation import judge_all, kl_per_sequence, sample_answers
from minippo.models import Policy
from minippo.worlds.tinyhh.rows import prompt_rows

PROMPTS = PPO_PROMPTS  # that both sides train on


def judged(policy, tokenizer, held_out: int, seed: int) -> dict[str, float]:
    """Mean gold score and KL from the SFT policy on prompts that no training has seen."""
    rows, config = prompt_rows("validation", held_out), PPOConfig()
    kept, _ = encode_rows(rows, tokenizer, config.max_prompt_tokens, 1)
    rows, prompts = [rows[e.row] for e in kept], [e.prompt for e in kept]
    policy.eval()
    answers = sample_answers(policy, prompts, tokenizer, config.max_response_tokens, seed)
    gold = fmean(judgement.score for judgement in judge_all(rows, answers, tokenizer))
    kl = kl_per_sequence(policy, Policy.from_pretrained("sft"), answers, tokenizer.pad_token_id)
    return {"gold": gold, "kl_per_sequence": kl}
