"""The checks of the exercises: what is right passes, what is wrong is rejected and named."""

import dataclasses
import inspect
import itertools
import math
import re
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from mutants import table
from mutants.patching import find_function, wrong_version
from torch.nn import functional

from minippo import checks, hh, kl
from minippo.checks import CHECKS, CheckFailed
from minippo.checks.checking import RESULTS, Check

NAMES = """masked_mean masked_whiten response_mask response_window gather_logprobs
position_ids kl_k1 kl_k2 kl_k3 kl_full adapt_kl_coef per_token_rewards prompt_values
simple_advantages gae lm_loss
preference_loss ranking_loss policy_loss value_loss parse_pair""".split()
MISTAKES = [(name, n) for name, check in CHECKS.items() for n in range(len(check.mistakes))]
TENSOR_CHECKS = [name for name in NAMES if name not in ("parse_pair", "adapt_kl_coef")]


@pytest.fixture(autouse=True, scope="module", params=[torch.float32, torch.float64], ids=str)
def default_dtype(request):
    """Commands compute in float32, lessons in float64: a check says the same in both."""
    for check in CHECKS.values():
        check.__dict__.pop("trials", None)  # they are made in this one
    torch.set_default_dtype(request.param)
    yield
    assert torch.get_default_dtype() == request.param  # no check has left its own behind
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def no_file(monkeypatch):
    """Nothing is saved, and no result of another test is left."""
    monkeypatch.setenv("MINIPPO_MINE", "off")
    RESULTS.clear()


def written_as(check: Check, body):
    """A function with the signature that is asked for, and another body."""

    def student(*arguments, **named):
        return body(*arguments, **named)

    student.__signature__ = inspect.signature(check.reference)
    return student


def message(name: str, fn) -> str:
    """What a check says of a wrong function."""
    with pytest.raises(CheckFailed) as failed:
        CHECKS[name](fn)
    return str(failed.value)


def on_result(change):
    """A change of the first output of a function."""

    def changed(result):
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)

    return changed


# --- what is right ----------------------------------------------------------------------------


def test_there_is_a_check_for_each_function_of_the_course():
    assert list(CHECKS) == NAMES
    assert all(getattr(checks, f"check_{name}") is CHECKS[name] for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_passes_and_a_passing_function_comes_back(name, capsys):
    fn = written_as(CHECKS[name], CHECKS[name].reference)
    assert CHECKS[name](fn) is fn
    assert capsys.readouterr().out == f"{name} is right.\n"


def gae_as_a_double_sum(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages = torch.zeros_like(values)
    for row, keep in enumerate(mask):
        places = keep.nonzero().flatten().tolist()
        ahead = [*(values[row, t] for t in places[1:]), 0.0]
        pairs = list(zip(places, ahead, strict=True))
        deltas = [rewards[row, t] + gamma * v - values[row, t] for t, v in pairs]
        for n, t in enumerate(places):
            weights = [(gamma * lam) ** k for k in range(len(deltas) - n)]
            advantages[row, t] = sum(w * d for w, d in zip(weights, deltas[n:], strict=True))
    return advantages, advantages + values.masked_fill(~mask, 0)


def lm_loss_by_ignored_labels(logits, tokens, loss_mask):
    labels = tokens.masked_fill(~loss_mask, -100)[:, 1:]
    logits = logits[:, :-1].masked_fill(~loss_mask[:, 1:, None], 0)
    return functional.cross_entropy(logits.transpose(1, 2), labels)


def ranking_loss_by_loops(scores):
    pairs = list(itertools.combinations(range(scores.shape[1]), 2))
    losses = [functional.softplus(row[j] - row[i]) for row in scores for i, j in pairs]
    return torch.stack(losses).mean()


def preference_loss_by_cross_entropy(chosen_scores, rejected_scores, margin=None):
    logits = chosen_scores - rejected_scores - (0 if margin is None else margin)
    return functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def policy_loss_over_picked_tokens(logprobs, old_logprobs, advantages, mask, clip_range):
    new, old, good = logprobs[mask], old_logprobs[mask], advantages[mask]
    ratio = torch.exp(new - old)
    pushed = torch.where(good > 0, ratio.clamp(max=1 + clip_range), ratio.clamp(1 - clip_range))
    with torch.no_grad():
        approx_kl = (torch.expm1(new - old) - (new - old)).mean()
        clip_frac = (pushed * good < ratio * good).to(ratio.dtype).mean()
        stats = {"approx_kl": approx_kl, "clip_frac": clip_frac, "ratio": ratio.mean()}
    return -(pushed * good).mean(), stats


def response_mask_by_loops(response, eos_id):
    rows = [row.tolist() for row in response]
    ends = [row.index(eos_id) if eos_id in row else len(row) for row in rows]
    return torch.tensor([[t <= end for t in range(len(rows[0]))] for end in ends])


def kl_full_by_a_floor(logprobs_all, ref_logprobs_all):
    floor = torch.finfo(logprobs_all.dtype).min
    return (logprobs_all.exp() * (logprobs_all.clamp(min=floor) - ref_logprobs_all)).sum(-1)


OTHER_WAYS = {
    "gae": gae_as_a_double_sum,
    "lm_loss": lm_loss_by_ignored_labels,
    "ranking_loss": ranking_loss_by_loops,
    "preference_loss": preference_loss_by_cross_entropy,
    "policy_loss": policy_loss_over_picked_tokens,
    "response_mask": response_mask_by_loops,
    "kl_full": kl_full_by_a_floor,
}


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_a_function_that_does_it_in_another_way_passes(name):
    verdict = CHECKS[name].judge(OTHER_WAYS[name])
    assert verdict.status == "solved", verdict.text


# --- known mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), MISTAKES)
def test_each_known_mistake_is_rejected_and_named(name, number):
    check = CHECKS[name]
    mistake = check.mistakes[number]
    text = message(name, written_as(check, mistake.wrong))
    assert f"It looks like {mistake.sentence}." in text
    first = next(iter(check.cases[0].arguments))
    assert f"  with      {first} = " in text and "  expected  " in text and "  got       " in text
    assert not [line for line in solution(check) if line in text]


def solution(check: Check) -> list[str]:
    """The lines of minippo's own function that would give something away."""
    body = inspect.getsource(check.reference).partition('"""')[2].partition('"""')[2]
    lines = [line.strip().removeprefix("return ") for line in body.splitlines()]
    return [line for line in lines if len(line) > 12]


def test_every_solution_has_lines_that_a_message_could_give_away():
    assert all(solution(check) for check in CHECKS.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_two_known_mistakes_look_the_same(name):
    check = CHECKS[name]
    for mistake in check.mistakes:
        others = tuple(m for m in check.mistakes if m is not mistake)
        rest = dataclasses.replace(check, mistakes=others)
        rest.__dict__["trials"] = check.trials  # so that they are not made anew
        seen = [rest._observe(mistake.wrong, trial) for trial in rest.trials]
        assert rest.recognise(seen) is None, mistake.sentence


def test_sentences_are_plain_and_enough_of_them():
    many = "gae lm_loss preference_loss ranking_loss policy_loss value_loss per_token_rewards"
    for name, check in CHECKS.items():
        sentences = [mistake.sentence for mistake in check.mistakes]
        assert len(set(sentences)) == len(sentences) >= (5 if name in many.split() else 2)
        assert not [s for s in sentences if "!" in s or s.endswith(".") or s[0].isupper()]


VARIANTS = {
    variant.id: variant
    for group in vars(table).values()
    if isinstance(group, tuple)
    for variant in group
    if isinstance(variant, table.Variant)
    and variant.function in CHECKS
    and CHECKS[variant.function].module == variant.module
}


def test_the_variants_reach_most_checks():
    assert len(VARIANTS) >= 60 and len({v.function for v in VARIANTS.values()}) >= 18


@pytest.mark.parametrize("slug", VARIANTS)
def test_every_wrong_variant_from_history_is_rejected_and_named(slug):
    """The variants are changes of our own code, written down before the checks were."""
    variant = VARIANTS[slug]
    module = sys.modules[f"minippo.{variant.module}"]
    right = find_function(module, variant.function)
    code, defaults, _ = wrong_version(
        right,
        inspect.getsource(module),
        module.__file__,
        variant.function,
        variant.old,
        variant.new,
    )
    wrong = types.FunctionType(code, right.__globals__, right.__name__, defaults)
    verdict = CHECKS[variant.function].judge(wrong)
    assert verdict.status == "wrong" and verdict.sentence.startswith("It looks like "), verdict


# --- wrong in ways that no check knows --------------------------------------------------------


@pytest.mark.parametrize("name", TENSOR_CHECKS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.unsqueeze(0), "shape"),
        (lambda x: x.to(torch.float16), "dtype float16"),
        (lambda x: x.tolist(), "has to be a Tensor"),
        (lambda x: None, "a return may be missing"),
        (lambda x: x.detach().numpy(), "has to be a Tensor, yours is a "),
    ],
    ids=["shape", "dtype", "list", "none", "numpy"],
)
def test_what_has_the_wrong_form_is_told_so(name, change, said):
    check, changed = CHECKS[name], on_result(change)
    text = message(name, written_as(check, lambda *given: changed(check.reference(*given))))
    assert said in text


@pytest.mark.parametrize("name", TENSOR_CHECKS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.full_like(x, 7),
        lambda x: x * math.nan if x.is_floating_point() else ~x if x.dtype == torch.bool else x - 9,
        lambda x: x * 3 if x.is_floating_point() else torch.zeros_like(x),
    ],
    ids=["constant", "nan", "three-times"],
)
def test_numbers_that_are_no_answer_are_rejected(name, change):
    check, changed = CHECKS[name], on_result(change)
    assert "expected" in message(
        name, written_as(check, lambda *given: changed(check.reference(*given)))
    )


@pytest.mark.parametrize("name", [n for n in TENSOR_CHECKS if n != "position_ids"])
def test_an_argument_that_is_changed_in_place_is_named(name):
    check = CHECKS[name]
    first = next(iter(inspect.signature(check.reference).parameters))

    def student(*given):
        result = check.reference(*given)
        if not given[0].requires_grad:
            given[0].add_(1)
        return result

    text = message(name, written_as(check, student))
    assert f"changes its argument `{first}` in place" in text


def test_a_constant_its_input_and_a_factor_are_told_in_words():
    def judged(body):
        return CHECKS["kl_k1"].judge(written_as(CHECKS["kl_k1"], body)).sentence

    assert judged(lambda a, b: torch.ones_like(a)) == "`result` is 1.0 whatever the input is."
    assert judged(lambda a, b: a) == "It hands back its argument `logprobs` as it is."
    assert judged(lambda a, b: 3 * (a - b)) == (
        "`result` is 3.0 times what it has to be, everywhere."
    )


def test_a_result_in_float32_for_input_in_float64_is_rejected():
    check = CHECKS["kl_k1"]
    text = message("kl_k1", written_as(check, lambda a, b: (a - b).float()))
    assert "dtype float32, it has to be float64" in text


def test_nan_at_a_masked_position_that_reaches_only_the_gradient_is_rejected():
    def value_loss(values, old_values, returns, mask, clip_range):
        loss, stats = CHECKS["value_loss"].reference(values, old_values, returns, mask, clip_range)
        return loss + torch.where(mask, 0 * values.square(), 0).sum(), stats

    text = message("value_loss", written_as(CHECKS["value_loss"], value_loss))
    assert "are filled at the end only" in text
    assert "got       gradient with respect to values = [[" in text and "nan" in text


def test_a_missing_output_is_told_by_name():
    check = CHECKS["policy_loss"]
    text = message("policy_loss", written_as(check, lambda *given: check.reference(*given)[0]))
    assert "yours returns loss" in text and "stats['clip_frac']" in text


def test_an_error_is_told_with_the_students_line():
    def kl_k1(logprobs, ref_logprobs):
        ratio = logprobs - ref_logprobs
        return ratio.no_such_thing

    text = message("kl_k1", kl_k1)
    assert "AttributeError in its line 3, `return ratio.no_such_thing`" in text
    assert "logprobs = [[" in text and "Traceback" not in text and "observing" not in text


def test_wrong_parameters_are_told_with_the_right_ones():
    assert "parameters have to be (logprobs, ref_logprobs), yours are (ref, logprobs)" in message(
        "kl_k1", lambda ref, logprobs: ref
    )
    text = message("gae", lambda rewards, values, mask, gamma, lam: None)
    assert "gamma=1.0, lam=0.95)" in text
    assert "Pass the function itself" in message("kl_k1", 3)


def test_a_further_parameter_with_a_default_is_allowed():
    def kl_k1(logprobs, ref_logprobs, verbose=False):
        return logprobs - ref_logprobs

    assert CHECKS["kl_k1"].judge(kl_k1).status == "solved"


def test_a_package_that_is_wrong_itself_is_not_blamed_on_the_student(monkeypatch):
    right = kl.kl_k3
    monkeypatch.setattr(kl, "kl_k3", lambda a, b: right(b, a))
    with pytest.raises(RuntimeError, match="minippo's own kl_k3 is wrong on a worked case"):
        dataclasses.replace(CHECKS["kl_k3"])(right)


def test_work_handed_to_minippo_is_no_solution():
    def parse_pair(row):
        return hh.parse_pair(row)

    def kl_k1(logprobs, ref_logprobs):
        from minippo.kl import kl_k1

        return kl_k1(logprobs, ref_logprobs)

    assert "It calls minippo's own parse_pair" in message("parse_pair", parse_pair)
    assert "It calls minippo's own kl_k1" in message("kl_k1", kl_k1)


def test_a_row_that_has_to_be_refused_is_told_with_the_kind():
    def parse_pair(row):
        sides = [hh.parse_dialogue(row[side]) for side in ("chosen", "rejected")]
        texts = [text for _, text in sides[0]]
        history = [list(turn) for turn in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
        pair = dict(instruction=texts[-2], chosen=texts[-1], rejected=sides[1][-1][1])
        more = {} if row.get("margin") is None else {"margin": float(row["margin"])}
        return pair | dict(history=history) | more

    text = message("parse_pair", parse_pair)
    assert "BadPair with reason 'diverging_history'; yours accepts it" in text


def changed_field(name, field, change):
    """The message on a function that is right but for one of its stats."""

    def student(*given):
        loss, stats = CHECKS[name].reference(*given)
        return loss, stats | {field: change(stats[field])}

    return message(name, written_as(CHECKS[name], student))


@pytest.mark.parametrize(
    ("name", "field"), [("policy_loss", "approx_kl"), ("value_loss", "clip_frac")]
)
def test_a_wrong_stat_is_named_and_the_right_loss_is_not(name, field):
    text = changed_field(name, field, lambda x: x + 0.25)
    assert f"`stats['{field}']` is not what it has to be" in text and "`loss`" not in text


def test_wrong_returns_are_named_and_right_advantages_are_not():
    def student(*given):
        advantages, returns = CHECKS["gae"].reference(*given)
        return advantages, returns + 0.25 * given[2]

    text = message("gae", written_as(CHECKS["gae"], student))
    assert "`returns` is not what it has to be" in text and "`advantages`" not in text


def test_a_wrong_gradient_of_right_values_is_named_as_a_gradient():
    def student(logprobs_all, ref_logprobs_all):
        right = CHECKS["kl_full"].reference(logprobs_all, ref_logprobs_all)
        return right.detach() + 2 * (right - right.detach())

    text = message("kl_full", written_as(CHECKS["kl_full"], student))
    assert "The values are right, the gradient is not. The gradient with respect to" in text


def test_no_factor_is_said_of_a_rare_input_or_of_next_to_1():
    right = CHECKS["preference_loss"].reference

    def student(chosen_scores, rejected_scores, margin=None):
        return right(chosen_scores, rejected_scores, margin).clamp(max=50)

    text = message("preference_loss", student)
    assert "this rare input is not. `loss` is not what it has to be." in text
    nearly = written_as(CHECKS["kl_k1"], lambda a, b: (a - b) * 1.0003)
    assert "`result` is not what it has to be." in message("kl_k1", nearly)


def test_several_changed_arguments_are_told_in_the_plural_and_a_dict_is_no_tensor():
    check = CHECKS["kl_k2"]

    def changes_both(logprobs, ref_logprobs):
        result = check.reference(logprobs, ref_logprobs)
        for x in (logprobs, ref_logprobs):
            if not x.requires_grad:
                x.add_(1)
        return result

    text = message("kl_k2", written_as(check, changes_both))
    assert "its arguments `logprobs`, `ref_logprobs` in place; make a new tensor instead" in text

    def takes_out(row):
        pair = CHECKS["parse_pair"].reference(row)
        row.pop("chosen")
        return pair

    text = message("parse_pair", written_as(CHECKS["parse_pair"], takes_out))
    assert "its argument `row` in place; make a new dict instead" in text


def test_inputs_that_differ_are_shown_with_the_digits_in_which_they_do():
    cancels = next(m for m in CHECKS["kl_k3"].mistakes if "the digits cancel" in m.sentence)
    text = message("kl_k3", written_as(CHECKS["kl_k3"], cancels.wrong))
    given = re.findall(r"logprobs = \[\[(.*?)\]\]", text)
    assert len(given) == 2 and given[0] != given[1]


# Mistakes as a student writes them: the check has its own version of each, made otherwise.


def row_without_an_end(response, eos_id):
    end = (response == eos_id).int().argmax(dim=1)
    return torch.arange(response.shape[1])[None] <= end[:, None]


def unsqueezed_lm_loss(logits, tokens, loss_mask):
    mask = loss_mask[:, 1:]
    logprobs = torch.where(mask[..., None], logits[:, :-1], 0.0).log_softmax(dim=-1)
    picked = torch.gather(logprobs, 2, tokens[:, 1:, None]).masked_fill(~mask, 0)
    return -picked.sum() / mask.sum()


def zero_filled_lm_loss(logits, tokens, loss_mask):
    filled = logits[:, :-1] * 1.0
    filled[~loss_mask[:, 1:]] = 0.0
    return functional.cross_entropy(filled.flatten(0, 1), tokens[:, 1:].flatten())


def pairs_across_prompts(scores):
    gaps = [a - b for a, b in itertools.combinations(scores.flatten(), 2)]
    return functional.softplus(-torch.stack(gaps)).mean()


def all_differences(scores):
    return -functional.logsigmoid(scores[:, :, None] - scores[:, None, :]).mean()


def excluded_by_where(logprobs_all, ref_logprobs_all):
    p = logprobs_all.exp()
    terms = p * (logprobs_all - ref_logprobs_all)
    return torch.where(p > 0, terms, torch.zeros_like(p)).sum(-1)


def detached_weights(logprobs_all, ref_logprobs_all):
    p = logprobs_all.detach().exp()
    gone = p == 0
    return (p * (logprobs_all.masked_fill(gone, 0) - ref_logprobs_all.masked_fill(gone, 0))).sum(-1)


def score_in_a_hole(scores, kl, mask, kl_coef):
    counted = torch.flip(torch.cumsum(torch.flip(mask.int(), [1]), 1), [1])
    rewards = -kl_coef * torch.where(mask, kl, 0.0)
    return rewards + (counted == 1) * scores[:, None]


def swapped_clip(kl_coef, kl_per_sequence, target_kl, horizon, batch_size):
    error = max(min(kl_per_sequence / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * batch_size / horizon)


def clipped_late(kl_coef, kl_per_sequence, target_kl, horizon, batch_size):
    step = (kl_per_sequence / target_kl - 1) * batch_size / horizon
    return kl_coef * (1 + max(-0.2, min(0.2, step)))


def loop_of_gae(times, put):
    """GAE with the loop of a student: `times` its columns, `put` how they are put together."""

    def gae(rewards, values, mask, gamma=1.0, lam=0.95):
        r, v = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
        after = advantage = torch.zeros(len(mask), dtype=v.dtype)
        columns = []
        for t in times(v.shape[1]):
            new = r[:, t] + gamma * after - v[:, t] + gamma * lam * advantage
            advantage = torch.where(mask[:, t], new, advantage)
            after = torch.where(mask[:, t], v[:, t], after)
            columns.append(advantage)
        advantages = torch.where(mask, torch.stack(put(columns), 1), 0.0)
        return advantages, advantages + v

    return gae


def backwards(count):
    return range(count - 1, -1, -1)


def unmasked_whitening(x, mask, unbiased=True):
    return (x - x.mean()) / torch.sqrt(x.var(correction=int(unbiased)) + 1e-8)


def whitening_without_a_second_fill(x, mask, unbiased=True):
    n = mask.sum()
    x = torch.where(mask, x, 0.0)
    centred = x - x.sum() / n
    var = (centred**2).sum() / (n - int(unbiased))
    return torch.where(mask, centred / torch.sqrt(var + 1e-8), 0.0)


def whitening_with_epsilon_outside(x, mask, unbiased=True):
    kept = x[mask]
    white = (x - kept.mean()) / (kept.std(correction=int(unbiased)) + 1e-8)
    return torch.where(mask, white, 0.0)


def ratio_of_answers(logprobs, old_logprobs, advantages, mask, clip_range):
    gap = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio, good = gap.sum(1, keepdim=True).exp(), torch.where(mask, advantages, 0.0)
    terms = torch.minimum(ratio * good, ratio.clip(1 - clip_range, 1 + clip_range) * good)
    return -terms.sum() / mask.sum(), dict(approx_kl=gap.mean(), clip_frac=gap.mean(), ratio=ratio)


def maximum_without_minus(logprobs, old_logprobs, advantages, mask, clip_range):
    ratio, good = torch.exp(logprobs - old_logprobs)[mask], advantages[mask]
    terms = torch.maximum(ratio * good, ratio.clip(1 - clip_range, 1 + clip_range) * good)
    return terms.mean(), dict(approx_kl=ratio.mean(), clip_frac=ratio.mean(), ratio=ratio.mean())


def clipped_around_the_return(values, old_values, returns, mask, clip_range):
    v, target = values[mask], returns[mask]
    clipped = torch.clamp(v, target - clip_range, target + clip_range)
    errors, held = (v - target) ** 2, (clipped - target) ** 2
    stats = dict(clip_frac=(held > errors).float().mean(), error=errors.mean().detach())
    return 0.5 * torch.maximum(errors, held).mean(), stats


def tags_with_a_space(row):
    sides = []
    for text in (row["chosen"], row["rejected"]):
        turns = re.split(r"\n\n(Human|Assistant): ", text)[1:]
        if "Assistant" not in turns[::2]:
            raise hh.BadPair("no_assistant_turn", text)
        sides.append([turn.strip() for turn in turns[1::2]])
    earlier, last = sides[0][:-2], sides[0][-2:]
    history = [[a, b] for a, b in zip(earlier[::2], earlier[1::2], strict=True)]
    return dict(instruction=last[0], chosen=last[1], rejected=sides[1][-1], history=history)


STUDENTS = [
    ("masked_mean", lambda x, mask, dim=None: (
        torch.nansum(x * mask, dim) / mask.sum(dim)), "it has to be seen"),
    ("response_mask", lambda response, eos_id: (
        torch.cumsum(response == eos_id, 1) < 2), "stays at 1 after the first"),
    ("response_mask", row_without_an_end, "argmax gives 0"),
    ("lm_loss", zero_filled_lm_loss, "each adds log V"),
    ("lm_loss", unsqueezed_lm_loss, "left over from gather"),
    ("gather_logprobs", lambda logits, tokens, temperature=1.0: torch.gather(
        torch.log_softmax(logits[:, :-1] / temperature, -1), 2, tokens[:, 1:, None]
    )[..., 0], "the shift was made in here"),
    ("ranking_loss", pairs_across_prompts, "answers to different prompts"),
    ("ranking_loss", all_differences, "all K x K differences"),
    ("kl_full", excluded_by_where, "its gradient NaN all"),
    ("kl_full", detached_weights, "the weights are detached"),
    ("kl_full", lambda logprobs_all, ref_logprobs_all: (
        logprobs_all * (logprobs_all - ref_logprobs_all)).sum(2), "exp makes probabilities"),
    ("per_token_rewards", score_in_a_hole, "also in a hole"),
    ("adapt_kl_coef", swapped_clip, "comes out as 20%"),
    ("adapt_kl_coef", clipped_late, "the clip comes too late"),
    ("gae", loop_of_gae(backwards, list), "in which the loop made them"),
    ("gae", loop_of_gae(range, list), "from the first column to the last: each"),
    ("gae", loop_of_gae(range, lambda c: c[::-1]), "its columns are turned round"),
    ("masked_whiten", unmasked_whitening, "the mask is not used at all"),
    ("masked_whiten", whitening_without_a_second_fill, "too late for the variance"),
    ("masked_whiten", whitening_with_epsilon_outside, "added to the root"),
    ("policy_loss", ratio_of_answers, "the ratio is that of whole answers"),
    ("policy_loss", maximum_without_minus, "the maximum stayed"),
    ("value_loss", clipped_around_the_return, "clipped around the return"),
    ("parse_pair", tags_with_a_space, "a tag without a space"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fn", "said"), STUDENTS)
def test_a_mistake_is_named_however_it_is_written(name, fn, said):
    sentence = CHECKS[name].judge(fn).sentence
    assert sentence.startswith("It looks like ") and said in sentence


# --- not written yet --------------------------------------------------------------------------


def raising_stub(logprobs, ref_logprobs):
    """k1."""
    raise NotImplementedError("write this, then run the next cell")


def dotted_stub(logprobs, ref_logprobs):
    """k1."""
    ...


def passing_stub(logprobs, ref_logprobs):
    pass


def marked_stub(logprobs, ref_logprobs):
    ratio = None  # write this, then run the next cell
    return ratio


@pytest.mark.parametrize("stub", [raising_stub, dotted_stub, passing_stub, marked_stub])
def test_an_unwritten_function_is_replaced_by_minippos(stub, capsys):
    check = CHECKS["kl_k1"]
    assert check(stub) is check.reference
    assert capsys.readouterr().out.startswith("kl_k1 is not written yet. The notebook goes on")
    with pytest.raises(CheckFailed, match="kl_k1 is not written yet."):
        check(stub, fallback=False)


def test_minippos_own_function_does_not_count_as_solved(capsys):
    check = CHECKS["kl_k1"]
    assert check(check.reference) is check.reference
    assert "is minippo's own" in capsys.readouterr().out and RESULTS == {"kl_k1": "unwritten"}


def test_work_without_a_return_is_wrong_and_not_unwritten():
    def kl_k1(logprobs, ref_logprobs):
        ratio = logprobs - ref_logprobs
        ratio.abs()

    assert "a return may be missing" in message("kl_k1", kl_k1)


def test_not_implemented_inside_of_torch_is_an_error_and_no_stub():
    def kl_k1(logprobs, ref_logprobs):
        return unwritten_elsewhere(logprobs)

    namespace = {}
    source = "def unwritten_elsewhere(x):\n    raise NotImplementedError('no such kernel')\n"
    exec(compile(source, "<somewhere else>", "exec"), namespace)
    unwritten_elsewhere = namespace["unwritten_elsewhere"]  # as a kernel that torch lacks
    text = message("kl_k1", kl_k1)
    assert "It raises NotImplementedError" in text and "no such kernel" in text


# --- around -----------------------------------------------------------------------------------


def test_importing_minippo_imports_no_checks_and_the_checks_no_models():
    script = """
        import sys, minippo
        assert "minippo.checks" not in sys.modules and "torch" not in sys.modules
        import minippo.checks
        assert not {"transformers", "datasets", "minippo.models"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_a_check_can_be_called_without_gradients():
    with torch.no_grad():
        fn = written_as(CHECKS["lm_loss"], CHECKS["lm_loss"].reference)
        assert CHECKS["lm_loss"].judge(fn).status == "solved"


def test_numbers_of_the_message_differ_where_the_values_do():
    check = CHECKS["kl_k1"]
    text = message("kl_k1", written_as(check, lambda a, b: (a - b) * 1.0003))
    wanted, got = re.findall(r"result = \[\[(.*?)\]\]", text)
    assert wanted != got
