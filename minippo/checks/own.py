"""All checks, and whose function is used where: the student's or minippo's own."""

from collections.abc import Callable

from minippo.checks import saving
from minippo.checks.advantages import check_gae, check_simple_advantages
from minippo.checks.checking import RESULTS, Check, Exercise
from minippo.checks.kl import (
    check_adapt_kl_coef,
    check_kl_full,
    check_kl_k1,
    check_kl_k2,
    check_kl_k3,
)
from minippo.checks.logprobs import (
    check_gather_logprobs,
    check_position_ids,
    check_response_window,
)
from minippo.checks.loop import check_collect_rollout, check_ppo_loss, check_ppo_update
from minippo.checks.losses import (
    check_lm_loss,
    check_policy_loss,
    check_preference_loss,
    check_ranking_loss,
    check_value_loss,
)
from minippo.checks.masking import check_masked_mean, check_masked_whiten, check_response_mask
from minippo.checks.pairs import check_parse_pair
from minippo.checks.rewards import check_per_token_rewards, check_prompt_values

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        *(check_masked_mean, check_masked_whiten, check_response_mask),
        *(check_response_window, check_gather_logprobs, check_position_ids),
        *(check_kl_k1, check_kl_k2, check_kl_k3, check_kl_full, check_adapt_kl_coef),
        *(check_per_token_rewards, check_prompt_values, check_simple_advantages, check_gae),
        *(check_lm_loss, check_preference_loss, check_ranking_loss),
        *(check_policy_loss, check_value_loss, check_parse_pair),
    )
}

LOOP_CHECKS = {c.name: c for c in (check_collect_rollout, check_ppo_loss, check_ppo_update)}
EXERCISES: dict[str, Exercise] = CHECKS | LOOP_CHECKS


def mine(name: str) -> Callable:
    """Your function of that name from my_minippo.py if it is right, else minippo's own.

    It is checked again before it is handed out; if it is not right any more, a line says why.
    Raises ValueError for a name that has no check.
    """
    if name not in EXERCISES:
        raise ValueError(f"there is no check of {name!r}; there is one of {', '.join(EXERCISES)}")
    fn, doubt = verified(name, saving.sections())
    if doubt:
        print(f"{name}: minippo's own is used. {doubt}")
    return fn or EXERCISES[name].reference


def whose() -> None:
    """Prints for every function with a check whether yours is used or minippo's own."""
    saved = saving.sections()
    width = max(map(len, EXERCISES))
    for name in EXERCISES:
        fn, doubt = verified(name, saved)
        print(f"{name:<{width}}  {'yours' if fn else 'minippo'}  {doubt}".rstrip())


def scored() -> None:
    """Prints how many of the checks that were called in this notebook are solved."""
    solved = [name for name, status in RESULTS.items() if status == "solved"]
    print(f"solved {len(solved)} of {len(RESULTS)}")
    for name, status in RESULTS.items():
        if status != "solved":
            print(f"  {name}: {'not written yet' if status == 'unwritten' else 'not right yet'}")


def verified(name: str, saved: dict[str, str]) -> tuple[Callable | None, str]:
    """The student's function if it is there and right, and what is to be said if it is not."""
    if name not in saved:
        return None, ""
    try:
        fn = saving.load(name, saved[name])
    except Exception as error:  # whatever the student's file raises
        return None, f"The one in {saving.mine_path()} raises {type(error).__name__}: {error}."
    verdict = EXERCISES[name].judge(fn)
    if verdict.status == "solved":
        return fn, ""
    return None, f"The one in {saving.mine_path()} is not right: {verdict.sentence}"
