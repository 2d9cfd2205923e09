"""The command line: `minippo COMMAND --help`. Its options are the fields of the configs."""

import contextlib
import functools
import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from minippo.config import (
    EvalConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    ValueConfig,
)

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read once, when the hub is imported
Flat = tyro.conf.arg(name="")  # a config whose options stand without a prefix
Overwrite = Annotated[
    bool, tyro.conf.arg(help="replace this stage of the run, and those that build on it")
]
Temperature = Annotated[
    float,
    tyro.conf.arg(help="of the sampling; near 0 is the likeliest answer, 1 the policy itself"),
]
Name = Annotated[str, tyro.conf.arg(help="the run's folder is runs/NAME")]
Out = Annotated[Path, tyro.conf.arg(help="the folder of all runs")]
ABOUT = """RLHF with PPO, small enough to read.

Start with `minippo demo`: it runs every stage on a small preference world and ends with a report.
The stages one by one, in order: pretrain, sft, reward, value, ppo, evaluate. Those of one --name
build on each other. With --data FILE they run on your own rows in the format of HH-RLHF.
`minippo COMMAND --help` explains each setting and gives its usual range."""


def demo(
    run: Annotated[RunConfig, Flat] = RunConfig(),
    sft: SFTConfig = SFTConfig(),
    reward: RewardConfig = RewardConfig(),
    value: ValueConfig = ValueConfig(),
    ppo: PPOConfig = PPOConfig(),
    eval: EvalConfig = EvalConfig(),
    overwrite: Overwrite = False,
) -> None:
    """The whole of RLHF on TinyHH, from the shipped base to the report, in minutes.

    SFT, candidates and their rankings, reward model, critic warm-up, PPO, evaluation: ends with a
    table and runs/NAME/report.html. Stages have their options with a prefix: --ppo.kl-coef 0.1
    """
    from minippo.app import stages

    configs = {"sft": sft, "reward": reward, "value": value, "ppo": ppo, "eval": eval}
    began = time.perf_counter()
    with _open(run, configs, overwrite) as (opened, source):
        result = stages.demo_stages(opened, source)
        print("\n" + stages.table_text(result["table"]))
        minutes, gflops = (time.perf_counter() - began) / 60, stages.matmul_gflops()
        summary = {"minutes": minutes, "gflops": gflops, "resumed": run.resume}
        opened.write_json("summary.json", summary)
    print(f"\n{minutes:.1f} minutes on a machine of {gflops:.0f} GFLOP/s")
    print(f"report: {opened.folder / 'report.html'}")
    print(f"talk to both: minippo chat {run.options()}")


def pretrain(
    run: Annotated[RunConfig, Flat] = RunConfig(),
    config: Annotated[PretrainConfig, Flat] = PretrainConfig(),
    overwrite: Overwrite = False,
) -> None:
    """Train tokenizer and base model on the text of --data (TinyHH: several minutes)."""
    from minippo.app import stages

    with _open(run, {"pretrain": config}, overwrite) as (opened, source):
        stages.pretrain_stage(opened, source, config)


def sft(
    run: Annotated[RunConfig, Flat] = RunConfig(),
    config: Annotated[SFTConfig, Flat] = SFTConfig(),
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune the base on demonstrations; on a file, on its chosen answers."""
    from minippo.app import stages

    with _open(run, {"sft": config}, overwrite) as (opened, source):
        stages.sft_stage(opened, source, config)


def reward(
    run: Annotated[RunConfig, Flat] = RunConfig(),
    config: Annotated[RewardConfig, Flat] = RewardConfig(),
    overwrite: Overwrite = False,
) -> None:
    """Train the reward model on ranked candidates of the SFT model, or on given pairs."""
    from minippo.app import stages

    with _open(run, {"reward": config}, overwrite) as (opened, source):
        stages.reward_stage(opened, source, config)


def value(
    run: Annotated[RunConfig, Flat] = RunConfig(),
    config: Annotated[ValueConfig, Flat] = ValueConfig(),
    ppo: PPOConfig = PPOConfig(),
    overwrite: Overwrite = False,
) -> None:
    """Warm up the critic on the mean reward of each prompt's answers.

    The reward is PPO's, so what PPO will run with goes here too: --ppo.max-response-tokens 64.
    `minippo ppo` warms up a critic by itself; this command is for looking at the stage alone.
    """
    from minippo.app import stages

    with _open(run, {"value": config}, overwrite, ppo) as (opened, source):
        stages.value_stage(opened, source, config, ppo)


def ppo(
    run: Annotated[RunConfig, Flat] = RunConfig(),
    config: Annotated[PPOConfig, Flat] = PPOConfig(),
    value: ValueConfig = ValueConfig(),
    overwrite: Overwrite = False,
) -> None:
    """Align the SFT policy with PPO; warms up the critic (--value.*) first if the run has none.

    Watch the KL and read answers: a rising score alone is no success (it is what is optimised).
    KL runs away: raise --kl-coef, or set --target-kl. Nothing moves: raise --lr or lower --kl-coef.
    """
    from minippo.app import stages

    with _open(run, {"ppo": config}, overwrite) as (opened, source):
        if not opened.finished("value"):
            opened.add_stage("value", value)
            stages.value_stage(opened, source, value, config)
        elif value not in (ValueConfig(), opened.settings("value", ValueConfig)):
            message = f"the critic of {opened.folder} is warmed up already; leave out --value.*"
            raise ValueError(f"{message}, or redo it: `minippo value {run.options()} --overwrite`")
        else:
            opened.check_critic()
        stages.ppo_stage(opened, source, config)


def evaluate(
    run: Annotated[RunConfig, Flat] = RunConfig(name="evaluate"),
    config: Annotated[EvalConfig, Flat] = EvalConfig(),
    overwrite: Overwrite = False,
) -> None:
    """Compare SFT, PPO and best-of-n on held-out prompts, judged by the annotator.

    --name RUN evaluates that run; without it the shipped checkpoints are compared. While you choose
    settings use --prompts-of validation (TinyHH has them); evaluate on test once, at the end, with
    --overwrite, which replaces the first evaluation.
    """
    from minippo.app import stages
    from minippo.app.report import write_report

    with _open(run, {"eval": config}, overwrite) as (opened, source):
        result = stages.evaluate_stage(opened, source, config)
        print("\n" + stages.table_text(result["table"]))
        print(f"\nreport: {write_report(opened.folder)}")


def report(name: Name = RunConfig.name, out: Out = RunConfig.out) -> None:
    """Write runs/NAME/report.html anew from what the run's folder holds."""
    from minippo.app.report import write_report

    print(write_report(out / name))


def chat(
    name: Name = RunConfig.name,
    out: Out = RunConfig.out,
    temperature: Temperature = 1.0,
    seed: Annotated[int, tyro.conf.arg(help="of the sampling")] = 0,
    max_response_tokens: Annotated[int, tyro.conf.arg(help="answers are cut here")] = 48,
) -> None:
    """Talk to the SFT and the PPO model side by side; an empty line ends it.

    Without a run, to the shipped ones. Ask what the world knows, for example
    "How do I grow sweet tomatoes?" The annotator's score stands behind each answer; a question
    that names nothing of this world it takes to go on about the last subject.
    """
    from minippo.app.chat import talk

    talk(name, out, temperature, seed, max_response_tokens)


def doctor() -> None:
    """Say what is installed, which device there is, and whether the shipped checkpoints load."""
    from minippo.app.doctor import examine

    sys.exit(0 if examine() else 1)


def data(
    out: Annotated[Path, tyro.conf.arg(help="gets tinyhh/ and checkpoints/")] = Path("data"),
    checkpoints: Annotated[Path | None, tyro.conf.arg(help="the folder of such a run")] = None,
) -> None:
    """Write the packaged TinyHH rows to OUT; with --checkpoints also a run's models.

    The models, in half precision, are those of a run that went through `pretrain`, then `demo`.
    """
    from minippo.app.packaging import write_data

    write_data(out, checkpoints)


def grade(
    notebook: Annotated[Path, tyro.conf.Positional],
    json: Annotated[Path | None, tyro.conf.arg(help="write the verdicts to this file too")] = None,
    timeout: Annotated[int, tyro.conf.arg(help="seconds for one cell")] = 120,
    expect: Annotated[tuple[str, ...], tyro.conf.arg(help="exercises that must be in it")] = (),
) -> None:
    """Run a notebook with exercises anew and say which are solved.

    The file is read only. Exit status 0 if all are solved, 1 if not, 2 if it is no notebook.
    """
    from minippo.checks import grading

    verdicts = grading.grade(notebook, timeout, expect)
    print(grading.table(verdicts))
    if json is not None:
        grading.write_json(json, notebook, verdicts)
    sys.exit(0 if grading.all_solved(verdicts) else 1)


IN_ORDER = (demo, data, pretrain, sft, reward, value, ppo, evaluate, chat, report, grade, doctor)
COMMANDS = {command.__name__: command for command in IN_ORDER}


@contextlib.contextmanager
def _open(run: RunConfig, configs: dict, overwrite: bool, ppo: PPOConfig | None = None):
    """A run and its rows; no other process gets into the run's folder meanwhile."""
    from minippo.app.run import Run
    from minippo.app.sources import Source

    source = Source(run.data, run.limit, run.split)
    if source.report:
        print(source.report)
    opened = Run(run, configs, overwrite, ppo)
    try:
        yield opened, source
    finally:
        opened.unlock()


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; what a user can mend is one line on stderr and exit code 2."""
    try:
        command = _parse(arguments)
        with _joined():
            command()
    except KeyboardInterrupt as stop:
        said = str(stop) or "what is finished is saved; run it again, with --resume if it had begun"
        _end(stop, f"\nminippo: interrupted; {said}", 130)
    except (ValueError, OSError) as error:
        _end(error, f"minippo: {_one_line(str(error))}", 2)


def _parse(arguments: list[str] | None):
    """The chosen command with its options, not yet run. ValueError if they are wrong."""
    commands = {name: _deferred(command) for name, command in COMMANDS.items()}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands, prog="minippo", description=ABOUT, args=arguments
            )
    except SystemExit as end:
        if not end.code:
            raise  # --help
        raise ValueError(_mistake(said.getvalue())) from end


def _joined():
    """Joins the processes that torchrun started, if it did."""
    from minippo.app.launch import joined

    return joined()


def _end(error: BaseException, message: str, code: int) -> None:
    """Says what ended the command, on a line of its own below the bars, and exits."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    _let_main_speak(error)
    print(message, file=sys.stderr)
    sys.exit(code)


def _let_main_speak(error: BaseException) -> None:
    """Most errors are met by all processes of torchrun: only the main one's is to be read.

    When it has ended, torchrun ends the others while they wait here.
    """
    if os.environ.get("RANK", "0") != "0" and not getattr(error, "is_said_by_all", False):
        time.sleep(3)


def _deferred(command):
    @functools.wraps(command)
    def later(*options, **named):
        return functools.partial(command, *options, **named)

    return later


def _mistake(said: str) -> str:
    """What is wrong with the options, without the other commands' options that tyro lists."""
    text, titles = _one_line(said), "Unrecognized options|Value error|Parsing error|Invalid choice"
    near = re.search(r"Perhaps you meant: (--\S+)", text)
    text = re.split(r" Perhaps you meant:| For full helptext", text)[0]
    text = re.sub(rf"^({titles}) (?=Unrecognized|Error|invalid)", "", text)
    return f"{text}; did you mean {near[1]}?" if near else text


def _one_line(text: str) -> str:
    """A message of several lines, or in the box that tyro draws, as one line."""
    text = re.sub(r"__tyro-dummy-inner__\.", "", text)
    lines = [line.strip(" \u2502\u256d\u256e\u2570\u256f\u2500") for line in text.splitlines()]
    return " ".join(" ".join(line for line in lines if line).split())


if __name__ == "__main__":
    main()
