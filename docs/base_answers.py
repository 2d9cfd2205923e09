"""What SFT makes of the base: both answer the validation prompts, the annotator judges.

    python docs/base_answers.py
"""

import tyro

from minippo.batching import encode_prompt
from minippo.evaluation import annotated_summary, judge_all, sample_answers
from minippo.models import Policy, load_tokenizer
from minippo.worlds.tinyhh.rows import prompt_rows


def main(prompts: int = 512, seed: int = 0) -> None:
    """Print gold score and rates of the shipped base and SFT model on validation prompts.

    prompts: how many validation prompts are answered, once each
    seed: of the sampling
    """
    tokenizer, rows = load_tokenizer("base"), prompt_rows("validation", prompts)
    encoded = [encode_prompt(tokenizer, row["instruction"], row["history"]) for row in rows]
    for name in ("base", "sft"):
        answers = sample_answers(Policy.from_pretrained(name), encoded, tokenizer, 48, seed)
        found = annotated_summary(rows, judge_all(rows, answers, tokenizer))
        print(f"{name:5s}", "  ".join(f"{key} {value:.3f}" for key, value in found.items()))


if __name__ == "__main__":
    tyro.cli(main)
