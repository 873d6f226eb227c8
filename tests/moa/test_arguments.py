import os
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from safetensors import SafetensorError

from moa.arguments import parse, run


class Strategy(Enum):
    NO = "no"
    STEPS = "steps"


@dataclass
class Data:
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the tasks."})
    tasks: list[str] = field(default_factory=lambda: ["sst2"], metadata={"help": "Which tasks."})
    source: Literal["hub", "pocket"] = field(default="hub", metadata={"help": "Where rows come from."})


@dataclass
class Training:
    model: str = field(metadata={"help": "The base model."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Step size."})
    steps: int | None = field(default=60, metadata={"help": "Optimizer steps."})
    shuffle: bool = field(default=True, metadata={"help": "Shuffle the rows."})
    eval_strategy: Strategy | str = field(default="steps", metadata={"help": "When to evaluate."})
    scheduler_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Extras."})

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must not be negative,\ngot {self.learning_rate}")


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def refusal(capsys):
    """The one sentence that a command line gets, after checking that it is one line and the status 2."""

    def of(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse((Data, Training), argv)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return of


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(config):
    path = config("model: from-file\nlearning_rate: 0.5\n")
    data, training = parse((Data, Training), ["--config", path, "--learning_rate", "0.25"])
    assert (training.model, training.learning_rate, training.steps) == ("from-file", 0.25, 60)
    assert data == Data()


def test_one_dataclass_alone_comes_back_in_a_tuple():
    assert parse(Data, []) == (Data(),)


@pytest.mark.parametrize("flag", ["--data_dir", "--data-dir"])
@pytest.mark.parametrize("joined", [True, False])
def test_options_are_spelt_with_underscores_or_hyphens(flag, joined):
    argv = [f"{flag}=rows"] if joined else [flag, "rows"]
    assert parse(Data, argv)[0].data_dir == "rows"


def test_the_config_file_is_read_with_an_equals_sign_too(config):
    (training,) = parse(Training, [f"--config={config('model: m')}"])
    assert training.model == "m"


def test_without_argv_the_process_arguments_are_parsed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--tasks", "mnli", "rte"])
    assert parse(Data)[0].tasks == ["mnli", "rte"]


def test_a_file_named_after_the_script_is_not_read(monkeypatch, tmp_path):
    (tmp_path / "train.args").write_text("--data_dir surprise")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert parse(Data)[0].data_dir is None


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("learning_rate: '1e-3'", "learning_rate", 1e-3),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("shuffle: no", "shuffle", False),
        ("shuffle: true", "shuffle", True),
        ("steps: null", "steps", None),
        ("steps:", "steps", None),
        (
            "scheduler_kwargs: {min_lr: 1e-5, cycles: [2]}",
            "scheduler_kwargs",
            {"min_lr": 1e-5, "cycles": [2]},
        ),
        ("tasks: [sst2, 12, no]", "tasks", ["sst2", "12", "no"]),
        ("tasks: mnli", "tasks", ["mnli"]),
        ("data_dir: 2024", "data_dir", "2024"),
        ("source: pocket", "source", "pocket"),
    ],
)
def test_a_value_in_the_file_means_what_its_text_means_on_the_command_line(config, text, name, value):
    parsed = parse((Data, Training), ["--config", config(text), "--model", "m"])
    (got,) = [getattr(one, name) for one in parsed if hasattr(one, name)]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("lerning_rate: 1", ["line 1", "unknown option 'lerning_rate'", "did you mean 'learning_rate'?"]),
        ("training:\n  learning_rate: 1", ["unknown option 'training'"]),
        ("steps: 3\nlearning_rate: abc", ["line 2: learning_rate takes a number, got 'abc'"]),
        ("steps: 1.5", ["steps takes a whole number, got '1.5'"]),
        ("steps: true", ["steps takes a whole number, got 'true'"]),
        ("steps: [1, 2]", ["steps takes a whole number, got a list"]),
        ("steps: {n: 1}", ["steps takes a whole number, got a mapping"]),
        ("shuffle: maybe", ["shuffle takes true or false, got 'maybe'"]),
        ("learning_rate:", ["learning_rate takes a number, got nothing"]),
        ("source: pockt", ["takes one of hub, pocket, got 'pockt'", "did you mean 'pocket'?"]),
        ("steps: 1\n\nsteps: 2", ["line 3: 'steps' is already on line 1"]),
        ("scheduler_kwargs:\n  a: 1\n  a: 2", ["line 3: 'a' is already on line 2"]),
        ("scheduler_kwargs: {a: !!python/name:os.system x}", ["scheduler_kwargs cannot be read"]),
        ("env: [A, B]", ["env takes a mapping", "got a list"]),
        ("", ["is empty"]),
        ("# only a comment", ["is empty"]),
        ("- steps\n- 3", ["must hold `name: value` lines, got a list"]),
        ("just words", ["must hold `name: value` lines, got 'just words'"]),
        ("steps: [1", ["is not valid YAML", "line"]),
        ("config: other.yaml", ["unknown option 'config'"]),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_one_sentence(config, refusal, text, fragments):
    sentence = refusal("--config", config(text), "--model", "m")
    assert "run.yaml" in sentence
    for fragment in fragments:
        assert fragment in sentence


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--lerning_rate", "1"], ["unknown option --lerning_rate", "did you mean '--learning_rate'?"]),
        (["--lerning-rate=1"], ["unknown option --lerning-rate", "did you mean '--learning-rate'?"]),
        (["--modle", "m"], ["unknown option --modle", "did you mean '--model'?"]),
        (["-lr", "1"], ["unknown option -lr"]),
        (["--learn", "1"], ["unknown option --learn"]),
        (["--learning_rate", "abc"], ["--learning_rate", "'abc'"]),
        (["--learning_rate"], ["--learning_rate", "expected one argument"]),
        (["--source", "disk"], ["--source", "'disk'", "'hub', 'pocket'"]),
        (["run.yaml"], ["'run.yaml' belongs to no option: write --config run.yaml"]),
        (["--config"], ["--config", "expected"]),
        (["--config", "a.yaml", "--config=b.yaml"], ["--config was given 2 times (a.yaml, b.yaml)"]),
        (["--learning_rate", "-1"], ["learning_rate must not be negative, got -1.0"]),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused_in_one_sentence(refusal, argv, fragments):
    sentence = refusal(*argv) if "--modle" in argv else refusal("--model", "m", *argv)
    for fragment in fragments:
        assert fragment in sentence


def test_a_missing_required_option_is_named(refusal):
    assert "--model" in refusal("--learning_rate", "1")


def test_a_missing_config_file_is_refused_with_the_nearest_one_there(config, refusal):
    path = config("model: m")
    sentence = refusal("--config", path.replace("run.yaml", "runn.yaml"))
    assert "there is no such file" in sentence and path in sentence


def test_a_negative_number_is_a_value_and_no_option():
    assert parse(Training, ["--model", "m", "--steps", "-1"])[0].steps == -1
    assert parse(Data, ["--tasks", "-1e-3", "-.5", "-2.E+4"])[0].tasks == ["-1e-3", "-.5", "-2.E+4"]


def test_the_env_block_becomes_environment_variables_as_written(config, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "unset by the file below")
    monkeypatch.setenv("MOA_TEST_PORT", "")
    parse(Training, ["--config", config("env: {TOKENIZERS_PARALLELISM: false, MOA_TEST_PORT: 01}\nmodel: m")])
    assert (os.environ["TOKENIZERS_PARALLELISM"], os.environ["MOA_TEST_PORT"]) == ("false", "01")


def test_a_refused_command_leaves_the_environment_alone(config, refusal, monkeypatch):
    monkeypatch.delenv("MOA_TEST_VARIABLE", raising=False)
    refusal("--config", config("env: {MOA_TEST_VARIABLE: 1}\nstepz: 2"), "--model", "m")
    assert "MOA_TEST_VARIABLE" not in os.environ


def test_help_lists_every_field_with_its_default_and_ends_with_the_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parse((Data, Training), ["--help"], prog="moa train", description="Train.", examples="moa train --x 1")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert text.startswith("usage: moa train [--config FILE.yaml] [--option value ...] Train.")
    for help_text in (
        "Folder of the tasks.",
        "Step size. (default: 2e-05)",
        "--config FILE.yaml",
    ):
        assert help_text in text
    assert text.endswith("examples: moa train --x 1")


def test_the_help_of_a_negated_flag_is_its_own(capsys):
    with pytest.raises(SystemExit):
        parse((Data, Training), ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--shuffle [SHUFFLE] Shuffle the rows. (default: True) --no_shuffle, --no-shuffle the same as" in text
    assert "--no_shuffle, --no-shuffle the same as --shuffle false --eval_strategy" in text
    for words in (["--no_shuffle"], ["--no-shuffle"], ["--shuffle", "false"]):
        assert parse(Training, ["--model", "m", *words])[0].shuffle is False


def test_the_training_arguments_of_trl_go_through(config, tmp_path):
    from trl import SFTConfig

    path = config(f"output_dir: {tmp_path}\neval_strategy: no\nlearning_rate: 1e-3\nreport_to: none\nbf16: false")
    (training,) = parse(SFTConfig, ["--config", path, "--use_cpu", "--max-steps", "3"])
    assert training.learning_rate == 1e-3 and training.max_steps == 3
    assert training.eval_strategy.value == "no" and training.report_to == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("the rank must be positive,\n got 0"), "error: the rank must be positive, got 0\n"),
        (FileNotFoundError("no adapter at x: give a folder"), "error: no adapter at x: give a folder\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), "error: x: No such file or directory\n"),
        (
            SafetensorError("No space left on device"),
            "error: a file could not be written or read (No space left on device): "
            "see that the disk has room, and run it again\n",
        ),
    ],
)
def test_run_turns_an_error_of_the_user_into_one_line_and_status_2(capsys, error, sentence):
    @run
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err == sentence


def test_run_shows_the_traceback_when_asked(monkeypatch):
    @run
    def main():
        raise ValueError("a sentence")

    monkeypatch.setenv("MOA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a sentence"):
        main()


def test_run_keeps_the_traceback_of_a_bug():
    @run
    def main():
        return {}["absent"]

    with pytest.raises(KeyError):
        main()


def test_run_ends_quietly_on_ctrl_c(capsys):
    @run
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_run_passes_arguments_result_and_name_through():
    @run
    def main(argv: list[str] | None = None) -> int:
        """What it does."""
        return len(argv or [])

    assert main(["a", "b"]) == 2 and main.__name__ == "main" and main.__doc__ == "What it does."


def test_trl_is_named_in_one_file_of_the_package():
    package = Path(sys.modules["moa.arguments"].__file__).parent
    users = [path.name for path in package.glob("*.py") if "import TrlParser" in path.read_text()]
    assert users == ["arguments.py"]
