"""The stages of a run, in the order of the notes: pretrain, SFT, reward, value, PPO, evaluation.

Each loads what it needs, refuses what cannot work before anything is trained, trains with the
library's functions, and leaves its results in the run's folder.
"""

import copy
import functools
import json
import random
import time
import zlib
from dataclasses import replace

import torch
from tqdm import tqdm

from minippo.app.launch import device_of, keep_freed_memory, prepared
from minippo.app.report import write_report, written
from minippo.app.run import Run
from minippo.app.sources import PPO_PROMPTS, Source
from minippo.batching import Encoded, check_context, decode_response, encode_rows
from minippo.config import (
    EvalConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    ValueConfig,
)
from minippo.engine.devices import precision, stored_as
from minippo.engine.loading import check_same_vocabulary
from minippo.engine.look import response_logprobs
from minippo.engine.ranks import alone
from minippo.evaluation import (
    annotated_summary,
    answer_statistics,
    best_of_n,
    best_of_n_kl,
    judge_all,
    kl_per_sequence,
    ranking_accuracy,
    reward_agreement,
    sample_answers,
    standardised,
    win_rate,
)
from minippo.models import Policy, RewardModel, ValueModel, frozen_copy, load_tokenizer, tiny_gpt2
from minippo.optim import adamw
from minippo.ppo import ppo_update, train_ppo
from minippo.pretrain import encode_texts, perplexity, train_lm, train_tokenizer
from minippo.reward_training import score_all, standardise_on, train_reward_model
from minippo.rewards import prompt_values, standardize_scores
from minippo.rollout import collect_rollout
from minippo.sft import train_sft
from minippo.token_table import xray
from minippo.value_training import prompt_explained_variance, train_value_model
from minippo.worlds.tinyhh.annotator import judge, rank


def _closing(stage):
    """The stage in the run's precision, giving the terminal and Ctrl-C back however it ends."""

    @functools.wraps(stage)
    def closing(run, *arguments):
        keep_freed_memory()
        try:
            with precision(run.config.autocast, run.config.tf32):
                return stage(run, *arguments)
        finally:
            run.close()

    return closing


def stream(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that no two stages draw the same numbers."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


def start_of(run: Run, stage: str) -> str:
    """The checkpoint of an earlier stage: this run's, else for TinyHH the shipped one."""
    if run.finished(stage):
        return str(run.latest(stage))
    command = f"minippo {stage} {run.config.options()}"
    if run.begun_before(stage):
        message = f"stage {stage!r} of {run.folder} was begun and is not finished"
        raise ValueError(f"{message}; go on with `{command} --resume`")
    if run.config.data != "tiny_hh":
        message = f"{run.folder} has no finished stage {stage!r}"
        raise ValueError(f"{message}; run `{command}` first")
    tqdm.write(f"{run.folder} has no stage {stage!r}: taking the shipped checkpoint")
    return stage


def start_of_sft(run: Run) -> str:
    """Where SFT starts: this run's own pretrained base, else --base."""
    if not run.begun_before("pretrain"):
        return run.config.base
    if run.config.base != RunConfig().base:
        message = f"{run.folder} has a pretrained base of its own; leave out --base"
        raise ValueError(f"{message}, or choose another --name")
    return start_of(run, "pretrain")


def load_start(run: Run, stage: str, load=Policy.from_pretrained):
    """A model of an earlier stage; the run gets its tokenizer."""
    path = start_of_sft(run) if stage == "base" else start_of(run, stage)
    tokenizer = load_tokenizer(path)
    if run.tokenizer is not None:
        check_same_vocabulary(run.tokenizer, tokenizer, path)
    run.tokenizer = tokenizer
    return load(path)


def frozen(run: Run, model):
    """A frozen copy of a model, stored as the run wants it."""
    model = stored_as(frozen_copy(model), run.config.frozen_dtype)
    return prepared(model, run.config)


def passing_bar(items, name: str, unit: str, **options):
    """A bar for what may take seconds; it shows after one, and leaves no line."""
    return tqdm(items, desc=f"{name:10s}", unit=unit, leave=False, delay=1, **options)


def encode(run: Run, stage: str, rows, limits: tuple[int, int], answers=()) -> list[Encoded]:
    """`encode_rows` with a bar, and a line on what was dropped as too long."""
    with passing_bar(rows, "encode", "row") as bar:
        kept, dropped = encode_rows(bar, run.tokenizer, *limits, answers)
    tqdm.write(f"{stage}: {len(kept)} rows, {dropped} dropped as too long")
    return kept


def score(reward_model, rows: list[Encoded], pad_id: int) -> list[list[float]]:
    """`score_all` with a bar."""
    with passing_bar(None, "score", "row", total=len(rows)) as bar:
        return score_all(reward_model, rows, pad_id, on_batch=bar.update)


def score_stats(reward_model, config: PPOConfig) -> tuple[float, float]:
    """Mean and std that scores are standardised with; (0, 1) leaves them alone."""
    return (reward_model.mean, reward_model.std) if config.standardize_scores else (0.0, 1.0)


@_closing
def pretrain_stage(run: Run, source: Source, config: PretrainConfig) -> None:
    """Tokenizer and base model from the text of the data set."""
    texts = source.texts()
    run.tokenizer = train_tokenizer(texts, config.vocab_size)
    with passing_bar(texts, "encode", "text") as bar:
        sequences, dropped = encode_texts(run.tokenizer, bar, config.n_positions)
    tqdm.write(f"pretrain: {len(sequences)} texts, {dropped} too long for {config.n_positions}")
    held_out = min(500, len(sequences) // 20)
    if held_out < 1:
        message = f"only {len(sequences)} texts fit into {config.n_positions} tokens"
        raise ValueError(f"{message}; at least 20 are needed: more rows, or raise n_positions")
    sizes = (config.n_layer, config.n_embd, config.n_head, config.n_positions)
    pad_id, seed = run.tokenizer.pad_token_id, run.config.seed
    model = tiny_gpt2(len(run.tokenizer), *sizes, run.tokenizer.eos_token_id, pad_id, seed)
    model = prepared(model, run.config)
    train_lm(model, sequences[held_out:], config, pad_id=pad_id, seed=seed, hooks=run)
    quality = {"held_out_perplexity": perplexity(model, sequences[:held_out], pad_id)}
    run.write_json("pretrain.json", quality)
    run.finish("pretrain")


@_closing
def sft_stage(run: Run, source: Source, config: SFTConfig) -> None:
    """The base model imitates the demonstrations."""
    policy = prepared(load_start(run, "base"), run.config)
    limits = (config.max_prompt_tokens, config.max_response_tokens)
    check_context(policy, *limits)
    rows = encode(run, "sft", source.demonstrations(), limits, ("answer",))
    train_sft(
        policy, rows, config, pad_id=run.tokenizer.pad_token_id, seed=run.config.seed, hooks=run
    )
    run.finish("sft")


def sample_candidates(
    run: Run, policy, prompts, count: int, limit: int, purpose: str, temperature: float = 1.0
) -> list[Encoded]:
    """`count` sampled answers to each tokenised prompt, with a bar."""
    seed = stream(run.config.seed, purpose)
    with tqdm(total=count * len(prompts), desc=f"{purpose:10s}", unit="answer") as bar:
        options = {"temperature": temperature, "on_batch": bar.update}
        return sample_answers(policy, prompts, run.tokenizer, limit, seed, count, **options)


def rank_candidates(rows, answers: list[Encoded], tokenizer, seed: int):
    """The annotator's rankings: Encoded with responses best first, and the same in words."""
    rng = random.Random(seed)
    ranked, written = [], []
    progress = passing_bar(rows, "rank", "prompt")
    for row, encoded in zip(progress, answers, strict=True):
        texts = [decode_response(tokenizer, r) for r in encoded.responses]
        gold = [judge(row["instruction"], text, row["history"]).score for text in texts]
        order = rank(gold, rng)
        responses = [encoded.responses[i] for i in order]
        ranked.append(Encoded(encoded.row, encoded.prompt, responses))
        best_first = {"candidates": [texts[i] for i in order], "scores": [gold[i] for i in order]}
        written.append({**row, **best_first})
    return ranked, written


def candidate_rows(run: Run, source: Source, policy, config: RewardConfig):
    """Training rows and held-out rows: the SFT model's answers, ranked by the annotator."""
    if not source.is_tiny:
        raise ValueError("ranking candidates needs the TinyHH annotator; use --source pairs")
    rows = source.prompts("preference", config.prompts + config.held_out)
    kept = encode(run, "reward", rows, (config.max_prompt_tokens, config.max_response_tokens))
    if len(kept) <= config.held_out:
        message = f"only {len(kept)} prompts are left, {config.held_out} of them to be held out"
        raise ValueError(f"{message}; lower --held-out (of a demo --reward.held-out)")
    prompts, rows = [e.prompt for e in kept], [rows[e.row] for e in kept]
    wanted = (config.candidates, config.max_response_tokens)
    answers = sample_candidates(run, policy, prompts, *wanted, "candidates")
    seed = stream(run.config.seed, "annotator")
    ranked, written = rank_candidates(rows, answers, run.tokenizer, seed)
    run.write_rows("candidates.jsonl", written)
    return ranked[: -config.held_out], ranked[-config.held_out :]


def given_rows(run: Run, source: Source, config: RewardConfig):
    """Training rows, held-out rows and margins of the data set's own pairs."""
    limits = (config.max_prompt_tokens, config.max_response_tokens)
    # The pairs of one ranking stay together, each answer read once; with margins pairs stay pairs.
    train, held_out = source.rankings()
    others = encode(run, "held out", held_out[: config.held_out], limits, ("candidates",))
    if not config.margin:
        return encode(run, "reward", train, limits, ("candidates",)), others, None
    train = source.pairs()[0]
    if any(row.get("margin") is None for row in train):
        raise ValueError("--margin needs pairs that all have a margin; not all of this data set do")
    encoded = encode(run, "reward", train, limits, ("chosen", "rejected"))
    return encoded, others, [train[e.row]["margin"] for e in encoded]


@_closing
def reward_stage(run: Run, source: Source, config: RewardConfig) -> None:
    """The reward model, from rankings of the SFT model's own candidates or from given pairs."""
    ranks_candidates = config.source == "candidates" or config.source == "auto" and source.is_tiny
    if config.margin and ranks_candidates:
        raise ValueError("--margin needs given pairs; add --source pairs")
    policy = load_start(run, "sft")
    check_context(policy, config.max_prompt_tokens, config.max_response_tokens)
    pad_id, seed, margins = run.tokenizer.pad_token_id, run.config.seed, None
    reward_model = prepared(RewardModel.from_policy(policy, seed, pad_id), run.config)
    policy = prepared(policy, run.config)
    if ranks_candidates:
        rows, held_out = candidate_rows(run, source, policy, config)
    else:
        rows, held_out, margins = given_rows(run, source, config)
    train_reward_model(
        reward_model, rows, config, pad_id=pad_id, margins=margins, seed=seed, hooks=run
    )
    scores = reference = score(reward_model, held_out, pad_id)
    if not ranks_candidates:  # given answers are nobody's samples, so the reference answers itself
        prompts, limit = [row.prompt for row in held_out], config.max_response_tokens
        samples = sample_candidates(run, policy, prompts, 2, limit, "reference")
        reference = score(reward_model, samples, pad_id)
    standardise_on(reward_model, reference)
    quality = ranking_accuracy(scores)
    run.write_json("reward.json", quality)
    share, low, high = (f"{quality[key]:.1%}" for key in ("accuracy", "low", "high"))
    tqdm.write(f"reward: {share} of {quality['held_out_pairs']} held-out pairs [{low}, {high}]")
    run.finish("reward")


@_closing
def value_stage(run: Run, source: Source, config: ValueConfig, ppo: PPOConfig) -> None:
    """The critic learns the mean reward of each prompt's answers before PPO begins.

    It is the reward PPO will give: same limits, temperature, scale and missing-EOS penalty.
    """
    policy = load_start(run, "sft")
    check_context(policy, ppo.max_prompt_tokens, ppo.max_response_tokens)
    reward_model = load_start(run, "reward", RewardModel.from_pretrained)
    value_model = prepared(ValueModel.from_reward_model(reward_model), run.config)
    policy, reward_model = prepared(policy, run.config), prepared(reward_model, run.config)
    pad_id, seed = run.tokenizer.pad_token_id, run.config.seed
    rows = source.prompts("ppo", config.prompts + config.held_out)
    prompts = [e.prompt for e in encode(run, "value", rows, (ppo.max_prompt_tokens, 1))]
    if len(prompts) <= config.held_out:
        message = f"only {len(prompts)} prompts, {config.held_out} of them to be held out"
        raise ValueError(f"{message}; lower --value.held-out (of `minippo value` --held-out)")
    wanted = (config.candidates, ppo.max_response_tokens)
    answers = sample_candidates(run, policy, prompts, *wanted, "value", ppo.temperature)
    scores = torch.tensor(score(reward_model, answers, pad_id))
    scores = standardize_scores(scores, *score_stats(reward_model, ppo))
    eos_id = run.tokenizer.eos_token_id
    endless = torch.tensor([[r[-1] != eos_id for r in e.responses] for e in answers])
    targets = prompt_values(scores - ppo.missing_eos_penalty * endless).tolist()
    first = [Encoded(e.row, e.prompt, e.responses[:1]) for e in answers]
    count = len(first) - config.held_out
    train_value_model(
        value_model, first[:count], targets[:count], config, pad_id=pad_id, seed=seed, hooks=run
    )
    explained = prompt_explained_variance(value_model, first[count:], targets[count:], pad_id)
    run.write_json("value.json", {"prompts": count, "explained_variance": explained})
    tqdm.write(f"value: explained variance of V(x) on {config.held_out} prompts {explained:.2f}")
    run.finish("value")


@_closing
def ppo_stage(run: Run, source: Source, config: PPOConfig) -> None:
    """PPO from the SFT policy, against the frozen reward model."""
    policy = load_start(run, "sft")
    check_context(policy, config.max_prompt_tokens, config.max_response_tokens)
    ref_policy = frozen(run, policy)
    reward_model = frozen(run, load_start(run, "reward", RewardModel.from_pretrained))
    value_model = prepared(load_start(run, "value", ValueModel.from_pretrained), run.config)
    policy = prepared(policy, run.config)
    rows = source.prompts("ppo", PPO_PROMPTS)
    prompts = [e.prompt for e in encode(run, "ppo", rows, (config.max_prompt_tokens, 1))]
    models = (policy, ref_policy, value_model, reward_model)
    stats = score_stats(reward_model, config)
    train_ppo(
        *models, prompts, run.tokenizer, config, score_stats=stats, seed=run.config.seed, hooks=run
    )
    run.finish("ppo")


@_closing
def evaluate_stage(run: Run, source: Source, config: EvalConfig) -> dict:
    """SFT, PPO, best-of-n on held-out prompts; writes evaluation.json, samples.jsonl, xray.json."""
    if run.finished("sft") and not run.finished("ppo"):
        message = f"{run.folder} has an SFT model and no finished PPO: the shipped one is not its"
        raise ValueError(f"{message}; run `minippo ppo {run.config.options()}` first")
    device = device_of(run.config)  # here models stay whole, also with --fsdp
    sft, ppo = load_start(run, "sft").to(device), load_start(run, "ppo").to(device)
    check_context(sft, config.max_prompt_tokens, config.max_response_tokens)
    reward_model = frozen_copy(load_start(run, "reward", RewardModel.from_pretrained)).to(device)
    rows = source.prompts(config.prompts_of, config.prompts)
    kept = encode(run, "evaluate", rows, (config.max_prompt_tokens, 1))
    rows, prompts = [rows[e.row] for e in kept], [e.prompt for e in kept]
    copies = {"SFT": (sft, 1), "PPO": (ppo, 1)}
    if config.best_of:
        copies[f"best-of-{config.best_of}"] = (sft, config.best_of)
    answers, agreement = sample_all(run, prompts, copies, config), {}
    notes = [f"{len(rows)} {config.prompts_of} prompts, temperature {config.temperature}"]
    if config.best_of:
        name, many = list(answers.items())[-1]
        scores = score(reward_model, many, run.tokenizer.pad_token_id)
        answers[name] = best_of_n(many, scores)
        notes.append(f"KL of {name} is its upper bound log n - (n - 1)/n")
        agreement = _agreement(rows, many, scores, run.tokenizer) if source.is_tiny else {}
    table, judged, rewards = summarise(run, rows, answers, sft, ppo, reward_model, config)
    result = {"table": table, "notes": notes, **_stage_results(run)}
    result["reward_model"] |= agreement
    run.write_json("evaluation.json", result)
    run.write_rows("samples.jsonl", sample_rows(run, rows, answers, judged, rewards))
    run.write_json("xray.json", _xrays(run, prompts[:2], sft, ppo, reward_model, config))
    return result


def sample_all(run: Run, prompts, copies: dict, config: EvalConfig) -> dict[str, list[Encoded]]:
    """The answers of several (policy, answers a prompt), under their names."""
    limit, temperature = config.max_response_tokens, config.temperature
    return {
        name: sample_candidates(run, policy, prompts, n, limit, f"test/{name}", temperature)
        for name, (policy, n) in copies.items()
    }


def summarise(run: Run, rows, answers: dict, sft, ppo, reward_model, config: EvalConfig):
    """The rows of the final table; per model the judgements, if anybody can judge, and rewards."""
    pad_id, table, judged, rewards = run.tokenizer.pad_token_id, [], {}, {}
    tiny = run.config.data == "tiny_hh"
    for name, encoded in passing_bar(answers.items(), "judge", "model", total=len(answers)):
        row = {"model": name}
        if tiny:
            judged[name] = judge_all(rows, encoded, run.tokenizer)
            gold = [j.score for j in judged[name]]
            baseline = [j.score for j in judged["SFT"]]
            row["win_rate"] = None if name == "SFT" else list(win_rate(gold, baseline))
            row |= annotated_summary(rows, judged[name])
        rewards[name] = standardised(reward_model, encoded, pad_id)
        row["reward"] = sum(rewards[name]) / len(rewards[name])
        row["kl_per_sequence"] = 0.0
        if name == "PPO":
            row["kl_per_sequence"] = kl_per_sequence(ppo, sft, encoded, pad_id, config.temperature)
        elif name != "SFT":
            row["kl_per_sequence"] = best_of_n_kl(config.best_of)
        table.append({**row, **answer_statistics(encoded, run.tokenizer.eos_token_id)})
    return table, judged, rewards


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


def sample_rows(run: Run, rows, answers: dict, judged: dict, rewards: dict) -> list[dict]:
    """One row per prompt: the answers, their scores, the annotator's sentences."""
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


@alone()  # two prompts are too few to share
def _xrays(run: Run, prompts, sft, ppo, reward_model, limits: EvalConfig) -> list[dict]:
    """The per-token view of PPO's answers, before and after one more real update on them."""
    config = replace(run.settings("ppo", PPOConfig), max_response_tokens=limits.max_response_tokens)
    config = replace(config, steps=1, batch_size=1, minibatch_size=1, micro_batch_size=1)
    policy, seed = copy.deepcopy(ppo), run.config.seed
    trained = run.latest("ppo") / "value" if run.finished("ppo") else None  # PPO trained it on
    value_model = load_start(run, "value", lambda path: ValueModel.from_pretrained(trained or path))
    value_model = value_model.to(ppo.device)
    stats, models = score_stats(reward_model, config), (policy, sft, value_model)
    rollout = collect_rollout(
        *models, reward_model, prompts, run.tokenizer, config, score_stats=stats, seed=seed
    )
    rates = {"policy": config.lr, "value": config.value_lr}
    optimizer = adamw({"policy": policy, "value": value_model}, rates)
    ppo_update(policy, sft, value_model, optimizer, rollout, config, torch.Generator())
    with torch.no_grad():
        now = response_logprobs(policy, rollout, config.temperature)
    options = {"clip_range": config.clip_range, "gamma": config.gamma, "lam": config.lam}
    return [
        xray(rollout, i, run.tokenizer, logprobs=now, **options).to_dict()
        for i in range(len(prompts))
    ]


def check_limits(run: Run) -> None:
    """Refuses limits of any stage that the model cannot hold, before the first one is trained."""
    model = load_start(run, "sft" if run.finished("sft") else "base")
    for config in run.stages.values():
        if hasattr(config, "max_prompt_tokens"):
            check_context(model, config.max_prompt_tokens, config.max_response_tokens)


def demo_stages(run: Run, source: Source) -> dict:
    """SFT, candidates and rankings, reward model, critic warm-up, PPO, evaluation, report."""
    stages = run.stages
    check_limits(run)
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
        cells = "".join(f"{written(key, row.get(key)):>22s}" for row in table)
        lines.append(f"{key.replace('_', ' '):18s}{cells}")
    return "\n".join(lines)
