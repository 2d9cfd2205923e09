"""minippo: RLHF with PPO, every part written out in plain torch, small enough to read.

Every public name is here: `minippo.gae`, `minippo.train_ppo`, `minippo.PPOConfig` ... It is looked
up when it is first asked for, so that importing minippo costs nothing. `minippo.checks` marks the
exercises.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "config": "PretrainConfig SFTConfig RewardConfig ValueConfig PPOConfig EvalConfig RunConfig",
    "masking": "masked_mean masked_var masked_whiten response_mask position_ids",
    "logprobs": "response_window gather_logprobs entropy_from_logits",
    "kl": "kl_k1 kl_abs kl_k2 kl_k3 kl_full KL_ESTIMATORS adapt_kl_coef",
    "rewards": "per_token_rewards penalize_missing_eos standardize_scores prompt_values",
    "advantages": "simple_advantages gae",
    "losses": "lm_loss preference_loss ranking_loss policy_loss value_loss ppo_objective",
    "hh": "load_preferences parse_pair parse_dialogue format_prompt format_dialogue BadPair",
    "preferences": "ranking_to_pairs ratings_to_pairs group_by_prompt",
    "batching": "encode_prompt encode_response decode_response encode_rows Encoded "
    "left_pad right_pad join_query_response answered Samples chunks batch_plan",
    "models": "Policy RewardModel ValueModel load_tokenizer frozen_copy tiny_gpt2",
    "engine.look": "response_logprobs response_logprobs_and_entropy response_logprobs_and_kl "
    "response_values",
    "engine.passes": "token_logits response_logits",
    "engine.gradients": "accumulate optimizer_step",
    "generation": "generate generate_many",
    "rollout": "collect_rollout Rollout rollout_metrics",
    "optim": "adamw set_learning_rate Hooks NonFiniteError",
    "pretrain": "train_tokenizer train_lm encode_texts perplexity",
    "sft": "train_sft sft_loss",
    "reward_training": "train_reward_model score_responses score_all standardise_on",
    "value_training": "train_value_model prompt_explained_variance",
    "ppo": "train_ppo ppo_loss ppo_update",
    "evaluation": "win_rate wilson best_of_n best_of_n_kl kl_per_sequence sample_answers",
    "token_table": "xray",
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = [*_MODULE_OF, "checks"]


def __getattr__(name: str):
    if name == "checks":
        return import_module(f"{__name__}.checks")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"import_module"})
