"""Judges finished demo runs on 512 other test prompts, which no setting was chosen by.

    python docs/fresh_prompts.py runs/seed-0 runs/seed-1 runs/seed-2 runs/seed-3
"""

from pathlib import Path

import tyro

from minippo.batching import encode_prompt
from minippo.evaluation import annotated_summary, best_of_n, judge_all, sample_answers, win_rate
from minippo.hh import format_prompt
from minippo.models import RewardModel, load_policy, load_tokenizer
from minippo.reward_model import score_all
from minippo.tinyhh.rows import prompt_rows


def fresh_rows(count: int = 512) -> list[dict]:
    """Test prompts of another seed of the world, without those of the demo."""
    seen = {format_prompt(r["instruction"], r["history"]) for r in prompt_rows("test", count)}
    rows = prompt_rows("test", 1400, seed=1)
    return [r for r in rows if format_prompt(r["instruction"], r["history"]) not in seen][:count]


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Print win rate, on topic and gold scores of finished demo RUNS on fresh prompts."""
    rows = fresh_rows()
    for n, run in enumerate(runs):
        sft, ppo = (load_policy(str(run / stage / "final")) for stage in ("sft", "ppo"))
        tokenizer = load_tokenizer(str(run / "sft" / "final"))
        reward_model = RewardModel.load(str(run / "reward" / "final"))
        prompts = [encode_prompt(tokenizer, r["instruction"], r["history"]) for r in rows]
        many = sample_answers(sft, prompts, tokenizer, 48, 700 + n, 16)
        answers = {"SFT": sample_answers(sft, prompts, tokenizer, 48, 500 + n)}
        answers["PPO"] = sample_answers(ppo, prompts, tokenizer, 48, 600 + n)
        answers["best"] = best_of_n(many, score_all(reward_model, many, tokenizer.pad_token_id))
        judged = {name: judge_all(rows, a, tokenizer) for name, a in answers.items()}
        gold = {name: [j.score for j in js] for name, js in judged.items()}
        means = {name: f"{sum(g) / len(g):.2f}" for name, g in gold.items()}
        topic = annotated_summary(rows, judged["PPO"])["on_topic"]
        print(f"{run.name}: win {win_rate(gold['PPO'], gold['SFT'])[0]:.1%}, on topic {topic:.1%}, "
              f"gold {means}")  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
