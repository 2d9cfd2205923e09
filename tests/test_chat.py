"""Chat: which two models it talks to, how far it remembers, and where it ends."""

import builtins
import json
from pathlib import Path

import pytest
from tiny_runs import save_base

from minippo.app import chat
from minippo.engine import loading
from minippo.models import Policy, load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random base model of 512 positions."""
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def shipped(tmp_path, base, monkeypatch):
    """A data folder with a random SFT and PPO model in the place of the shipped ones."""
    copy_models(base, [tmp_path / "data" / "checkpoints" / stage for stage in ("sft", "ppo")])
    monkeypatch.setattr(loading, "DATA_DIR", tmp_path / "data")


def copy_models(base: Path, targets: list[Path]) -> None:
    """The base in other places; its config says which, for who asks later."""
    policy, tokenizer = Policy.from_pretrained(base), load_tokenizer(base)
    for target in targets:
        policy.save_pretrained(target)
        tokenizer.save_pretrained(target)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "made_for": str(target)}))


def save_run(folder: Path, base: Path, checkpoints: dict[str, str]) -> Path:
    """A run folder with the named checkpoint of each stage."""
    copy_models(base, [folder / stage / name for stage, name in checkpoints.items()])
    for stage, name in checkpoints.items():
        (folder / stage / "latest").write_text(name)
    return folder


def typed(monkeypatch, lines: list[str]) -> None:
    """What a person types; then the input ends."""
    left = iter(lines)

    def answer(prompt=""):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", answer)


@pytest.fixture
def asked(monkeypatch):
    """Every question that reaches a model: (which model, question, history); fakes its answer."""
    seen = []

    def fake(policy, tokenizer, question, history, seed, temperature, limit):
        seen.append((policy.config.made_for, question, list(history)))
        return f"answer {len(seen)}"

    monkeypatch.setattr(chat, "_answer", fake)
    return seen


# which two


def test_without_a_run_the_shipped_pair_answers_and_it_says_so(
    shipped, asked, monkeypatch, capsys, tmp_path
):
    typed(monkeypatch, ["one"])
    chat.talk(out=tmp_path / "runs")
    places = [str(tmp_path / "data" / "checkpoints" / stage) for stage in ("sft", "ppo")]
    assert [model for model, _, _ in asked] == places
    first = capsys.readouterr().out.splitlines()[0]
    assert str(tmp_path / "runs" / "demo") in first and "ships" in first


@pytest.mark.parametrize("name", ["demo", "mine"])
def test_both_models_are_those_of_the_run_and_it_says_which(
    shipped, base, asked, monkeypatch, capsys, tmp_path, name
):
    folder = save_run(tmp_path / name, base, {"sft": "final", "ppo": "final"})
    typed(monkeypatch, ["one"])
    chat.talk(name, tmp_path)
    places = [str(folder / stage / "final") for stage in ("sft", "ppo")]
    assert [model for model, _, _ in asked] == places
    first = capsys.readouterr().out.splitlines()[0]
    assert all(place in first for place in places) and "ships" not in first


def test_a_ppo_that_began_at_the_shipped_sft_model_answers_beside_it(
    shipped, base, asked, monkeypatch, capsys, tmp_path
):
    folder = save_run(tmp_path / "mine", base, {"ppo": "final"})
    typed(monkeypatch, ["one"])
    chat.talk("mine", tmp_path)
    places = [str(tmp_path / "data" / "checkpoints" / "sft"), str(folder / "ppo" / "final")]
    assert [model for model, _, _ in asked] == places
    assert "no stage 'sft': this is the shipped one" in capsys.readouterr().out


def test_a_name_of_no_run_is_refused(shipped, tmp_path):
    with pytest.raises(ValueError, match="no run .*dmeo.*--name"):
        chat.talk("dmeo", tmp_path)


@pytest.mark.parametrize(
    "checkpoints, missing",
    [
        ({"sft": "final"}, "ppo"),
        ({"sft": "final", "ppo": "step-000010"}, "ppo"),
        ({"sft": "step-000010", "ppo": "final"}, "sft"),
        ({}, "sft"),
    ],
)
@pytest.mark.parametrize("name", ["demo", "mine"])
def test_a_run_that_lacks_a_stage_is_refused_with_the_remedy(
    shipped, base, tmp_path, name, checkpoints, missing
):
    save_run(tmp_path / name, base, checkpoints).mkdir(exist_ok=True)
    remedy = f"no finished stage '{missing}'.*minippo {missing} --name {name}.*--resume"
    with pytest.raises(ValueError, match=remedy):
        chat.talk(name, tmp_path)


# the conversation


@pytest.mark.parametrize("ending", [["", "never read"], []])
def test_both_models_answer_until_an_empty_line_or_the_end(
    shipped, monkeypatch, capsys, tmp_path, ending
):
    typed(monkeypatch, ["How do I bake bread?", "And then?", *ending])
    chat.talk(out=tmp_path)
    said = capsys.readouterr().out
    assert said.count("  SFT: ") == said.count("  PPO: ") == 2


def test_each_model_keeps_its_own_conversation(shipped, asked, monkeypatch, tmp_path):
    typed(monkeypatch, ["one", "two"])
    chat.talk(out=tmp_path)
    later = [(question, history) for _, question, history in asked[2:]]
    assert later == [("two", [("one", "answer 1")]), ("two", [("one", "answer 2")])]


def test_the_oldest_turns_that_do_not_fit_are_dropped(base, monkeypatch):
    policy, tokenizer = Policy.from_pretrained(base), load_tokenizer(base)
    prompts = []
    monkeypatch.setattr(chat, "generate_many", lambda p, x, *a, **k: prompts.append(x[0]) or [[1]])
    history = [(f"question {i} " * 8, "an answer " * 8) for i in range(30)]
    chat._answer(policy, tokenizer, "And now?", history, 0, 1.0, 48)
    (prompt,) = prompts
    assert len(prompt) <= 512 - 48 and len(history) == 30
    text = tokenizer.decode(prompt)
    assert "question 29" in text and "question 0 " not in text and text.endswith("Assistant:")


def test_a_question_that_does_not_fit_alone_is_said(base):
    policy, tokenizer = Policy.from_pretrained(base), load_tokenizer(base)
    said = chat._answer(policy, tokenizer, "word " * 600, [], 0, 1.0, 48)
    assert "tokens" in said and f"at most {512 - 48}" in said


@pytest.mark.parametrize("limit", [3, 60])
def test_answers_are_cut_at_the_limit_that_was_given(shipped, monkeypatch, tmp_path, limit):
    limits = []

    def fake(policy, prompts, tokenizer, max_response_tokens, seed, **options):
        limits.append(max_response_tokens)
        return [[1]]

    monkeypatch.setattr(chat, "generate_many", fake)
    typed(monkeypatch, ["one"])
    chat.talk(out=tmp_path, max_response_tokens=limit)
    assert limits == [limit, limit]


def test_a_limit_beyond_the_context_is_refused(shipped, tmp_path):
    with pytest.raises(ValueError, match="513.*512"):
        chat.talk(out=tmp_path, max_response_tokens=512)


def test_a_temperature_of_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--temperature is 0"):
        chat.talk(out=tmp_path, temperature=0)
