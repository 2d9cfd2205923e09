"""Checks of the exercises: they run your function, and name the mistake if they know it.

    from minippo.checks import check_gae

    gae = check_gae(gae)  # the notebook goes on with what comes back

- Right: one line; your function comes back, and its source goes to `my_minippo.py` in the current
  folder. Later notebooks take it from there: `gae = minippo.checks.mine("gae")`.
- Not written yet (it raises NotImplementedError, or its body is empty): one line; minippo's own
  comes back, so that the notebook runs on. With `fallback=False` this is an error too.
- Wrong: `CheckFailed`, with the smallest input that shows it, what is expected and what came out;
  and where yours does what a well-known misconception does on every input, its name.

`whose()` prints which functions are yours, `scored()` how many exercises of this notebook are
solved. The environment variable MINIPPO_MINE=off neither writes nor reads `my_minippo.py`;
MINIPPO_MINE=PATH puts it elsewhere. `minippo grade NOTEBOOK` runs a notebook and reports on it.
"""

from minippo.checks.checking import CheckFailed
from minippo.checks.own import (
    CHECKS,
    check_adapt_kl_coef,
    check_collect_rollout,
    check_gae,
    check_gather_logprobs,
    check_kl_full,
    check_kl_k1,
    check_kl_k2,
    check_kl_k3,
    check_lm_loss,
    check_masked_mean,
    check_masked_whiten,
    check_parse_pair,
    check_per_token_rewards,
    check_policy_loss,
    check_position_ids,
    check_ppo_loss,
    check_ppo_update,
    check_preference_loss,
    check_prompt_values,
    check_ranking_loss,
    check_response_mask,
    check_response_window,
    check_simple_advantages,
    check_value_loss,
    mine,
    scored,
    whose,
)

__all__ = [
    "CHECKS", "CheckFailed", "check_adapt_kl_coef", "check_collect_rollout", "check_gae",
    "check_gather_logprobs", "check_kl_full", "check_kl_k1", "check_kl_k2", "check_kl_k3",
    "check_lm_loss", "check_masked_mean", "check_masked_whiten", "check_parse_pair",
    "check_per_token_rewards", "check_policy_loss", "check_position_ids", "check_ppo_loss",
    "check_ppo_update", "check_preference_loss", "check_prompt_values", "check_ranking_loss",
    "check_response_mask", "check_response_window", "check_simple_advantages", "check_value_loss",
    "mine", "scored", "whose",
]  # fmt: skip
