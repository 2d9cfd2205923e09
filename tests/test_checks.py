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

from minippo import checks, hh
from minippo.checks import CHECKS, CheckFailed
from minippo.checks.checking import RESULTS, Check

NAMES = """masked_mean masked_whiten response_mask response_window gather_logprobs
position_ids kl_k1 kl_k2 kl_k3 kl_full adapt_kl_coef per_token_rewards prompt_values
simple_advantages gae lm_loss
preference_loss ranking_loss policy_loss value_loss parse_pair""".split()
MISTAKES = [(name, n) for name, check in CHECKS.items() for n in range(len(check.mistakes))]
TENSOR_CHECKS = [name for name in NAMES if name not in ("parse_pair", "adapt_kl_coef")]


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


def kl_full_by_xlogy(logprobs_all, ref_logprobs_all):
    return torch.special.xlogy(logprobs_all.exp(), logprobs_all.exp()).sum(-1) - (
        logprobs_all.exp() * ref_logprobs_all
    ).sum(-1)


OTHER_WAYS = {
    "gae": gae_as_a_double_sum,
    "lm_loss": lm_loss_by_ignored_labels,
    "ranking_loss": ranking_loss_by_loops,
    "preference_loss": preference_loss_by_cross_entropy,
    "policy_loss": policy_loss_over_picked_tokens,
    "response_mask": response_mask_by_loops,
    "kl_full": kl_full_by_xlogy,
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


def test_a_history_of_tuples_is_as_good_as_one_of_lists():
    check = CHECKS["parse_pair"]

    def parse_pair(row):
        pair = check.reference(row)
        return pair | {"history": [tuple(turn) for turn in pair["history"]]}

    assert check.judge(written_as(check, parse_pair)).status == "solved"


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
