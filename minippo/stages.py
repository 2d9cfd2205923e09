"""The stages of a run, in the order of the notes: pretrain, SFT, reward, value, PPO, evaluation.

Each loads what it needs, refuses what cannot work before anything is trained, trains with the
library's functions, and leaves its results in the run's folder.
"""

import copy
import json
import random
import time
import zlib
from dataclasses import replace

import torch
from tqdm import tqdm

from minippo.batching import Encoded, check_context, decode_response, encode_prompt, encode_rows
from minippo.config import (
    EvalConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    ValueConfig,
)
from minippo.evaluation import (
    annotated_summary,
    answer_statistics,
    best_of_n,
    best_of_n_kl,
    judge_all,
    kl_per_sequence,
    reward_agreement,
    sample_answers,
    standardised,
    win_rate,
)
from minippo.generation import generate_many
from minippo.logprobs import gather_logprobs
from minippo.models import (
    RewardModel,
    ValueModel,
    check_same_vocabulary,
    frozen_copy,
    load_policy,
    load_tokenizer,
    response_logits,
    tiny_gpt2,
)
from minippo.optim import adamw
from minippo.ppo import ppo_update, train_ppo
from minippo.pretrain import encode_texts, perplexity, train_lm, train_tokenizer
from minippo.report import write_report
from minippo.reward_model import score_all, standardise_on, train_reward_model
from minippo.rewards import prompt_values
from minippo.rollout import collect_rollout
from minippo.run import Run
from minippo.sft import train_sft
from minippo.sources import PPO_PROMPTS, Source
from minippo.tinyhh.annotator import judge, rank
from minippo.value_model import prompt_explained_variance, train_value_model
from minippo.xray import xray


def pick_device(name: str) -> torch.device:
    """The device of a run: "auto" is cuda if there, else cpu."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(auto if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is none torch knows; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    return device


def stream(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that no two stages draw the same numbers."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


def start_of(run: Run, stage: str) -> str:
    """The checkpoint of an earlier stage: this run's, else for TinyHH the shipped one."""
    if run.finished(stage):
        return str(run.latest(stage))
    if run.config.data != "tiny_hh":
        raise ValueError(
            f"{run.folder} has no finished stage {stage!r}; "
            f"run `minippo {stage} --name {run.config.name} --data {run.config.data}` first"
        )
    tqdm.write(f"{run.folder} has no stage {stage!r}: taking the shipped checkpoint")
    return stage


def load_start(run: Run, stage: str, load=load_policy):
    """A model of an earlier stage on the run's device; the run gets its tokenizer."""
    path = run.checkpoint("pretrain", run.config.base) if stage == "base" else start_of(run, stage)
    tokenizer = load_tokenizer(path)
    if run.tokenizer is not None:
        check_same_vocabulary(run.tokenizer, tokenizer, path)
    run.tokenizer = tokenizer
    return load(path).to(pick_device(run.config.device))


def pretrain_stage(run: Run, source: Source, config: PretrainConfig) -> None:
    """Tokenizer and base model from the text of the data set."""
    texts = source.texts()
    held_out = max(1, min(1000, len(texts) // 20))
    run.tokenizer = train_tokenizer(texts[held_out:], config.vocab_size)
    sequences, dropped = encode_texts(run.tokenizer, texts, config.n_positions)
    tqdm.write(f"pretrain: {len(sequences)} texts, {dropped} too long for {config.n_positions}")
    sizes = (config.n_layer, config.n_embd, config.n_head, config.n_positions)
    pad_id, seed = run.tokenizer.pad_token_id, run.config.seed
    model = tiny_gpt2(len(run.tokenizer), *sizes, run.tokenizer.eos_token_id, pad_id, seed)
    model = model.to(pick_device(run.config.device))
    train_lm(model, sequences[held_out:], config, pad_id, seed, run)
    quality = {"held_out_perplexity": perplexity(model, sequences[:held_out], pad_id)}
    run.write_json("pretrain.json", quality)
    run.finish("pretrain")


def sft_stage(run: Run, source: Source, config: SFTConfig) -> None:
    """The base model imitates the demonstrations."""
    policy = load_start(run, "base")
    limits = (config.max_prompt_tokens, config.max_response_tokens)
    check_context(policy, *limits)
    rows, dropped = encode_rows(source.demonstrations(), run.tokenizer, *limits, ("answer",))
    tqdm.write(f"sft: {len(rows)} demonstrations, {dropped} dropped as too long")
    train_sft(policy, rows, config, run.tokenizer.pad_token_id, run.config.seed, run)
    run.finish("sft")


def sample_candidates(run: Run, policy, prompts, count: int, limit: int, purpose: str):
    """`count` sampled answers to each tokenised prompt, with a bar; a list of Encoded."""
    repeated = [prompt for prompt in prompts for _ in range(count)]
    with tqdm(total=len(repeated), desc=f"{purpose:10s}", unit="answer") as bar:
        seed = stream(run.config.seed, purpose)
        answers = generate_many(
            policy, repeated, run.tokenizer, limit, seed, on_batch=bar.update
        )
    starts = range(0, len(repeated), count)
    return [Encoded(i, prompts[i], answers[s : s + count]) for i, s in enumerate(starts)]


def rank_candidates(rows, answers: list[Encoded], tokenizer, seed: int):
    """The annotator's rankings: Encoded with responses best first, and the same in words."""
    rng = random.Random(seed)
    ranked, written = [], []
    for row, encoded in zip(rows, answers, strict=True):
        texts = [decode_response(tokenizer, r) for r in encoded.responses]
        gold = [judge(row["instruction"], text, row["history"]).score for text in texts]
        order = rank(gold, rng)
        responses = [encoded.responses[i] for i in order]
        ranked.append(Encoded(encoded.row, encoded.prompt, responses))
        best_first = {"candidates": [texts[i] for i in order], "scores": [gold[i] for i in order]}
        written.append({**row, **best_first})
    return ranked, written


def reward_rows(run: Run, source: Source, policy, config: RewardConfig):
    """Training rows, held-out rows (responses best first) and margins, by the configured source."""
    limits = (config.max_prompt_tokens, config.max_response_tokens)
    wanted = {"auto": "candidates" if source.is_tiny else "pairs"}.get(config.source, config.source)
    if wanted == "pairs":
        train, held_out = source.pairs()
        columns = ("chosen", "rejected")
        encoded, dropped = encode_rows(train, run.tokenizer, *limits, columns)
        others, _ = encode_rows(held_out, run.tokenizer, *limits, columns)
        tqdm.write(f"reward: {len(encoded)} pairs, {dropped} dropped as too long")
        margins = [train[e.row].get("margin") for e in encoded] if config.margin else None
        if margins and None in margins:
            raise ValueError("reward.margin needs pairs with a margin; this data set has none")
        return encoded, others, margins
    if not source.is_tiny:
        raise ValueError("ranking candidates needs the TinyHH annotator; use --source pairs")
    rows = source.prompts("preference", config.prompts + config.held_out)
    prompts = [encode_prompt(run.tokenizer, r["instruction"], r["history"]) for r in rows]
    answers = sample_candidates(
        run, policy, prompts, config.candidates, config.max_response_tokens, "candidates"
    )
    seed = stream(run.config.seed, "annotator")
    ranked, written = rank_candidates(rows, answers, run.tokenizer, seed)
    run.write_rows("candidates.jsonl", written)
    return ranked[: config.prompts], ranked[config.prompts :], None


def reward_stage(run: Run, source: Source, config: RewardConfig) -> None:
    """The reward model, from rankings of the SFT model's own candidates or from given pairs."""
    policy = load_start(run, "sft")
    check_context(policy, config.max_prompt_tokens, config.max_response_tokens)
    pad_id, seed = run.tokenizer.pad_token_id, run.config.seed
    rows, held_out, margins = reward_rows(run, source, policy, config)
    reward_model = RewardModel.from_policy(policy, seed)
    train_reward_model(reward_model, rows, config, pad_id, margins, seed, run)
    scores = score_all(reward_model, held_out, pad_id)
    pairs = [(a, b) for s in scores for i, a in enumerate(s) for b in s[i + 1 :]]
    share, low, high = win_rate([a for a, _ in pairs], [b for _, b in pairs])
    reference = held_out
    if margins is not None or len(held_out[0].responses) == 2:  # pairs are nobody's samples
        prompts = [row.prompt for row in held_out]
        limit = config.max_response_tokens
        reference = sample_candidates(run, policy, prompts, 2, limit, "reference")
    standardise_on(reward_model, score_all(reward_model, reference, pad_id))
    quality = {"held_out_pairs": len(pairs), "accuracy": share, "low": low, "high": high}
    run.write_json("reward.json", quality)
    tqdm.write(f"reward: {share:.1%} of {len(pairs)} held-out pairs [{low:.1%}, {high:.1%}]")
    run.finish("reward")


def value_stage(run: Run, source: Source, config: ValueConfig, limits: PPOConfig) -> None:
    """The critic learns the mean reward of each prompt's answers before PPO begins."""
    policy = load_start(run, "sft")
    reward_model = load_start(run, "reward", RewardModel.load)
    value_model = ValueModel.from_reward_model(reward_model)
    pad_id, seed = run.tokenizer.pad_token_id, run.config.seed
    rows = source.prompts("ppo", config.prompts + config.held_out)
    kept, _ = encode_rows(rows, run.tokenizer, limits.max_prompt_tokens, 1)
    if len(kept) <= config.held_out:
        raise ValueError(f"only {len(kept)} prompts; lower --held-out ({config.held_out})")
    prompts, longest = [e.prompt for e in kept], limits.max_response_tokens
    answers = sample_candidates(run, policy, prompts, config.candidates, longest, "value")
    scores = torch.tensor(score_all(reward_model, answers, pad_id))
    targets = prompt_values((scores - reward_model.mean) / reward_model.std).tolist()
    first = [Encoded(e.row, e.prompt, e.responses[:1]) for e in answers]
    count = len(kept) - config.held_out
    train_value_model(value_model, first[:count], targets[:count], config, pad_id, seed, run)
    explained = prompt_explained_variance(value_model, first[count:], targets[count:], pad_id)
    run.write_json("value.json", {"prompts": count, "explained_variance": explained})
    tqdm.write(f"value: explained variance of V(x) on {config.held_out} prompts {explained:.2f}")
    run.finish("value")


def ppo_stage(run: Run, source: Source, config: PPOConfig) -> None:
    """PPO from the SFT policy, against the frozen reward model."""
    policy = load_start(run, "sft")
    check_context(policy, config.max_prompt_tokens, config.max_response_tokens)
    ref_policy = frozen_copy(policy)
    reward_model = frozen_copy(load_start(run, "reward", RewardModel.load))
    value_model = load_start(run, "value", ValueModel.load)
    prompts = source.prompts("ppo", PPO_PROMPTS)
    rows, dropped = encode_rows(prompts, run.tokenizer, config.max_prompt_tokens, 1)
    tqdm.write(f"ppo: {len(rows)} prompts, {dropped} dropped as too long")
    stats = (reward_model.mean, reward_model.std) if config.standardize_scores else (0.0, 1.0)
    prompts, seed = [row.prompt for row in rows], run.config.seed
    models = (policy, ref_policy, value_model, reward_model)
    train_ppo(*models, prompts, run.tokenizer, config, stats, seed, run)
    run.finish("ppo")


def evaluate_stage(run: Run, source: Source, config: EvalConfig) -> dict:
    """SFT, PPO and best-of-n on test prompts; writes evaluation.json, samples.jsonl, xray.json."""
    sft, ppo = load_start(run, "sft"), load_start(run, "ppo")
    check_context(sft, config.max_prompt_tokens, config.max_response_tokens)
    reward_model = frozen_copy(load_start(run, "reward", RewardModel.load))
    rows = source.prompts("test", config.prompts)
    kept, dropped = encode_rows(rows, run.tokenizer, config.max_prompt_tokens, 1)
    rows, prompts = [rows[e.row] for e in kept], [e.prompt for e in kept]
    tqdm.write(f"evaluate: {len(rows)} test prompts, {dropped} dropped as too long")
    copies = {"SFT": (sft, 1), "PPO": (ppo, 1)}
    if config.best_of:
        copies[f"best-of-{config.best_of}"] = (sft, config.best_of)
    total = len(rows) * sum(n for _, n in copies.values())
    answers = {}
    with tqdm(total=total, desc=f"{'evaluate':10s}", unit="answer") as bar:
        for name, (policy, n) in copies.items():
            seed = stream(run.config.seed, f"test/{name}")
            options = (run.tokenizer, config, seed, n, bar.update)
            answers[name] = sample_answers(policy, prompts, *options)
    many = answers[name] if config.best_of else None
    if many is not None:
        scores = score_all(reward_model, many, run.tokenizer.pad_token_id)
        answers[name] = best_of_n(many, scores)
    table, judged = summarise(run, rows, answers, sft, ppo, reward_model, config)
    result = {"table": table, **_stage_results(run)}
    if source.is_tiny and many is not None:
        result["reward_model"] |= _agreement(rows, many, scores, run.tokenizer)
    run.write_json("evaluation.json", result)
    run.write_rows("samples.jsonl", sample_rows(run, rows, answers, judged, reward_model))
    run.write_json("xray.json", _xrays(run, prompts[:2], sft, ppo, reward_model, config))
    return result


def summarise(run: Run, rows, answers: dict, sft, ppo, reward_model, config: EvalConfig):
    """The rows of the final table, and the annotator's judgements where there is an annotator."""
    pad_id, table, judged = run.tokenizer.pad_token_id, [], {}
    tiny = run.config.data == "tiny_hh"
    for name, encoded in answers.items():
        row = {"model": name}
        if tiny:
            judged[name] = judge_all(rows, encoded, run.tokenizer)
            gold = [j.score for j in judged[name]]
            baseline = [j.score for j in judged["SFT"]]
            row["win_rate"] = None if name == "SFT" else list(win_rate(gold, baseline))
            row |= annotated_summary(rows, judged[name])
        scores = standardised(reward_model, encoded, pad_id)
        row["reward"] = sum(scores) / len(scores)
        row["kl_per_sequence"] = 0.0
        if name == "PPO":
            row["kl_per_sequence"] = kl_per_sequence(ppo, sft, encoded, pad_id, config.temperature)
        elif name != "SFT":
            row["kl_per_sequence"] = best_of_n_kl(config.best_of)
        table.append({**row, **answer_statistics(encoded, run.tokenizer.eos_token_id)})
    return table, judged


def _stage_results(run: Run) -> dict:
    """What the reward and value stages of this run measured."""
    results = {}
    for name, file in (("reward_model", "reward.json"), ("critic", "value.json")):
        path = run.folder / file
        results[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return results


def _agreement(rows, many: list[Encoded], scores, tokenizer) -> dict:
    """The reward model against the noiseless annotator, on four SFT answers a prompt."""
    judged = []
    for row, encoded in zip(rows, many, strict=True):
        texts = [decode_response(tokenizer, r) for r in encoded.responses[:4]]
        judged.append([judge(row["instruction"], text, row["history"]) for text in texts])
    return reward_agreement(rows, [s[:4] for s in scores], judged)


def sample_rows(run: Run, rows, answers: dict, judged: dict, reward_model) -> list[dict]:
    """One row per test prompt: the answers, their scores, the annotator's sentences."""
    pad_id = run.tokenizer.pad_token_id
    rewards = {name: standardised(reward_model, e, pad_id) for name, e in answers.items()}
    written = []
    for i, row in enumerate(rows):
        texts = {n: decode_response(run.tokenizer, e[i].responses[0]) for n, e in answers.items()}
        entry = {"instruction": row["instruction"], "history": row["history"], "answers": texts}
        entry["reward"] = {name: round(values[i], 4) for name, values in rewards.items()}
        if judged:
            entry["gold"] = {name: js[i].score for name, js in judged.items()}
            entry["remarks"] = {name: js[i].sentence for name, js in judged.items()}
        written.append(entry)
    return written


def _xrays(run: Run, prompts, sft, ppo, reward_model, limits: EvalConfig) -> list[dict]:
    """The per-token view of PPO's answers, before and after one more real update on them."""
    config = run.stages.get("ppo", PPOConfig())
    config = replace(config, max_response_tokens=limits.max_response_tokens, steps=1)
    config = replace(config, batch_size=1, minibatch_size=1, micro_batch_size=1)
    policy, value_model = copy.deepcopy(ppo), load_start(run, "value", ValueModel.load)
    stats = (reward_model.mean, reward_model.std) if config.standardize_scores else (0.0, 1.0)
    models = (policy, sft, value_model)
    rollout = collect_rollout(
        *models, reward_model, prompts, run.tokenizer, config, score_stats=stats
    )
    optimizer = adamw(
        {"policy": policy, "value": value_model}, {"policy": config.lr, "value": config.value_lr}
    )
    ppo_update(policy, sft, value_model, optimizer, rollout, config, torch.Generator())
    with torch.no_grad():
        places = (rollout.tokens, rollout.attention_mask, rollout.response.shape[1])
        logits = response_logits(policy, *places)
    now = gather_logprobs(logits, rollout.response, config.temperature)
    options = {"clip_range": config.clip_range, "gamma": config.gamma, "lam": config.lam}
    return [
        xray(rollout, i, run.tokenizer, logprobs=now, **options).to_dict()
        for i in range(len(prompts))
    ]


def demo_stages(run: Run, source: Source) -> dict:
    """SFT, candidates and rankings, reward model, critic warm-up, PPO, evaluation, report."""
    stages = run.stages
    if not run.finished("sft"):
        sft_stage(run, source, stages["sft"])
    if not run.finished("reward"):
        reward_stage(run, source, stages["reward"])
    if not run.finished("value"):
        value_stage(run, source, stages["value"], stages["ppo"])
    if not run.finished("ppo"):
        ppo_stage(run, source, stages["ppo"])
    result = evaluate_stage(run, source, stages["eval"])
    write_report(run.folder)
    return result


def matmul_gflops(size: int = 1024, repeats: int = 10) -> float:
    """What this machine does in a float32 matrix product, in GFLOP/s: printed beside every time."""
    a = torch.randn(size, size)
    a @ a
    began = time.perf_counter()
    for _ in range(repeats):
        a @ a
    return 2 * size**3 * repeats / (time.perf_counter() - began) / 1e9


def table_text(table: list[dict]) -> str:
    """The final table for a terminal: a column per model."""
    keys = [key for key in table[0] if key != "model"]
    lines = [f"{'':18s}" + "".join(f"{row['model']:>22s}" for row in table)]
    for key in keys:
        cells = "".join(f"{_cell(key, row.get(key)):>22s}" for row in table)
        lines.append(f"{key.replace('_', ' '):18s}{cells}")
    return "\n".join(lines)


def _cell(key: str, value) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{value[0]:.1%} [{value[1]:.1%}, {value[2]:.1%}]"
    shares = ("on_topic", "complying", "rude", "over_refusing", "unreadable", "rambling")
    if key in (*shares, "ended", "distinct"):
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
