"""cli/main.py: what is told of mistakes with an experiment; see also test_cli_data."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time

import pytest
from helpers import (
    CONFIG,
    StubStep,
    align_command,
    environment,
    error_of,
    read_lines,
    saved_steps,
)

import align_jax
from align_jax import config, config_checks, evals
from align_jax.cli import main as cli
from align_jax.data import tokenizer
from align_jax.run import workdir

TRAIN = ("train", "--config", "config.py", "--workdir", "run")
EVAL = ("eval", "--workdir", "run", "--retrieval", "data?split=train")


def changed_config(change):
    with open("config.py") as file:
        text = file.read()
    with open("changed.py", "w") as file:
        file.write(text.replace("    return c\n", f"    {change}\n    return c\n"))
    line = text.splitlines().index("    return c") + 1
    return ("train", "--config", "changed.py", "--workdir", "new"), line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--config.trian.steps=3",
            "Unknown key config.trian. Did you mean 'train'? Known: checkpoint, data, debug, "
            "eval, init_from, init_towers, log, lora, loss, mesh, model, optim, task, train.",
        ),
        (
            "--config.train.stepz=3",
            "Unknown key config.train.stepz. Did you mean 'steps'? Known: batch_size, ema_decay, "
            "hang_s, max_rollbacks, microbatches, native_kernels, on_divergence, seed, spike, ",
        ),
        (
            "--config.train.steps=ten",
            "config.train.steps='ten' must be an integer, or a text such ",
        ),
        (
            "--config.train.steps=1.5",
            "config.train.steps='1.5' must be an integer, or a text such ",
        ),
        ("--config.data.max_tokens=1.5", "config.data.max_tokens=1.5 must be an integer."),
        ("--config.optim.eps=tiny", "config.optim.eps='tiny' must be a number."),
        ("--config.data.flip=maybe", "config.data.flip='maybe' must be true or false."),
        (
            "--config.optim.no_decay=bias",
            "config.optim.no_decay='bias' must be a tuple, e.g. \"('_bn/',)\".",
        ),
        (
            "--config.optim.no_decay=('(',)",
            "config.optim.no_decay holds '(', no regular expression: missing ), unterminated "
            "subpattern at position 0.",
        ),
        (
            "--config.train=3",
            "config.train=3 is a group of keys; set one, e.g. --config.train.KEY=...",
        ),
        (
            "--train.steps=3",
            "Unrecognised argument '--train.steps=3'; overrides look like "
            "--config.train.steps=200.",
        ),
        (
            "--config.model.image.variant=nanno",
            "config.model.image.variant='nanno' is unknown. Did you mean 'nano'? Known: "
            "femto, pico, nano, b0, b1, b2, b3, b4, b5, b6, b7, b8, l2, fused-nano, v2-b0, v2-b1, "
            "v2-b2.",
        ),
        (
            "--config.train.batch_size=12",
            "config.train.batch_size=12 is not divisible by 8 devices; use 8 or 16.",
        ),
        (
            "--config.model.bn_group_size=3",
            "config.model.bn_group_size=3 does not divide config.train.batch_size=8; choose one "
            "of [2, 4, 8].",
        ),
        ("--config.train.seed=4294967296", "config.train.seed=4294967296 must be below 2**32."),
        ("--config.optim.eps=nan", "config.optim.eps=nan must be positive and finite."),
        (
            "--config.data.source=nowhere?split=train",
            "config.data.source: nowhere does not exist; accepted: ",
        ),
        (
            "--config.data.source=data?split=dev",
            "config.data.source: data?split=dev: split 'dev' is not in data; it has train.",
        ),
        (
            "--config.data.tokenizer=nowhere",
            "No tokenizer at nowhere (config.data.tokenizer): looked for ",
        ),
        (
            "--config.eval.evaluators.own.source=nowhere",
            "config.eval.evaluators: Evaluator 'own': nowhere does not exist; accepted: ",
        ),
        (
            "--config.eval.evaluators.own.type=retreival",
            "config.eval.evaluators: Unknown evaluator 'retreival'. Did you mean 'retrieval'? ",
        ),
    ],
)
def test_wrong_override_is_one_line_and_makes_no_workdir(inside, capfd, override, message):
    command = ("train", "--config", "config.py", "--workdir", "new", override)
    assert error_of(capfd, *command).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("c.trian = 3", "Unknown key config.trian. Did you mean 'train'? Known: "),
        ("c.train.stepz = 3", "Unknown key config.train.stepz. Did you mean 'steps'? Known: "),
        ("c.train.steps = None", "config.train.steps=None must be an integer, or a text such as "),
        ("c.train.seed = None", "config.train.seed=None must be an integer."),
        ("c.eval.evaluators.x = 'a'", "config.eval.evaluators.x='a' must be a group of keys."),
        ("c.trian.steps = 3", "--config changed.py:{line}: AttributeError: 'trian' Did you mean "),
        ("c.train.seed = 'ten'", "--config changed.py:{line}: TypeError: Could not override "),
        ("c.train.steps = stepz", "--config changed.py:{line}: NameError: name 'stepz' is not "),
        ("c.train.steps = = 3", "--config changed.py:{line}: SyntaxError: invalid syntax"),
        ("return None", "--config changed.py must define get_config() that returns a ConfigDict"),
    ],
)
def test_wrong_experiment_file_is_one_line_that_names_the_place(inside, capfd, change, message):
    command, line = changed_config(change)
    assert error_of(capfd, *command).startswith(message.format(line=line))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nowhere.py", "--config nowhere.py cannot be read: No such file or directory."),
        ("images", "--config images cannot be read: Is a directory."),
    ],
)
def test_missing_experiment_file_is_one_line(inside, capfd, file, message):
    command = ("train", "--config", file, "--workdir", "new")
    assert error_of(capfd, *command) == message


def test_workdir_that_is_a_file_is_one_line(inside, capfd):
    command = ("train", "--config", "config.py", "--workdir", "config.py")
    assert error_of(capfd, *command) == "--workdir config.py is a file; name a folder."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--config.model.image.variant=nano",
            "config.model.image.variant='nano', but the run in run was started with 'femto'; ",
        ),
        ("--config.train.seed=1", "config.train.seed=1, but the run in run was started with 0; "),
        ("--config.train.steps=9", "config.train.steps=9, but the run in run was started with 10"),
    ],
)
def test_resume_with_another_config_names_both_values(inside, capfd, override, message):
    assert error_of(capfd, *TRAIN, override).startswith(message)


def test_resume_with_another_tokenizer_names_both_fingerprints(inside, capfd):
    own, other = (
        tokenizer.load_tokenizer(folder).fingerprint() for folder in ("tokenizer", "other")
    )
    assert error_of(capfd, *TRAIN, "--config.data.tokenizer=other") == (
        f"config.data.tokenizer=other has fingerprint {other}, but the run in run uses {own}; use "
        "that one or another --workdir."
    )


@contextlib.contextmanager
def replaced(path, content):
    with open(path, "rb") as file:
        original = file.read()
    try:
        with open(path, "w") as file:
            file.write(content)
        yield
    finally:
        with open(path, "wb") as file:
            file.write(original)


@pytest.mark.parametrize("command", [TRAIN, EVAL], ids=["train", "eval"])
def test_replaced_tokenizer_in_the_workdir_names_both_fingerprints(inside, capfd, command):
    own, other = (
        tokenizer.load_tokenizer(folder).fingerprint() for folder in ("tokenizer", "other")
    )
    with open("other/tokenizer.json") as file:
        content = file.read()
    with replaced("run/tokenizer/tokenizer.json", content):
        assert error_of(capfd, *command) == (
            f"run/tokenizer has fingerprint {other}, but the run was trained with {own}; put that "
            "tokenizer back."
        )


@pytest.mark.parametrize("command", [TRAIN, EVAL], ids=["train", "eval"])
def test_preprocessing_that_is_not_of_the_run_names_both_values(inside, capfd, command):
    with open("run/preprocessing.json") as file:
        content = json.load(file) | {"image_size": 64}
    with replaced("run/preprocessing.json", json.dumps(content)):
        assert error_of(capfd, *command).startswith(
            "run contradicts itself: image_size is 64 by preprocessing.json, 32 by config.json"
        )


@pytest.mark.parametrize("command", ["train", "eval"])
def test_checkpoint_of_another_size_names_a_tensor_and_both_shapes(inside, capfd, command):
    edited = workdir.load_config("run")
    edited.model.embed_dim = 64
    arguments = {
        "train": (*TRAIN, "--config.model.embed_dim=64"),
        "eval": EVAL,
    }
    with replaced("run/config.json", config.to_json(edited)):
        message = error_of(capfd, *arguments[command])
    assert "checkpoints, step 10, does not fit the model: " in message
    assert "params/image_projection/bias is (32,), the model expects (64,)" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "run/config.json cannot be used: Expecting property name "),
        ("config.json", "[]", "run/config.json cannot be used: it holds no groups of keys."),
        ("preprocessing.json", "{}", "run/preprocessing.json cannot be used: "),
    ],
)
def test_damaged_file_of_the_workdir_is_named(inside, capfd, name, content, message):
    with replaced(f"run/{name}", content):
        assert error_of(capfd, *EVAL).startswith(message)


def test_lost_config_of_a_run_is_one_line(inside, capfd):
    os.rename("run/config.json", "set_aside.json")
    try:
        message = error_of(capfd, *TRAIN)
    finally:
        os.rename("set_aside.json", "run/config.json")
    assert message.startswith("run holds checkpoints but no config.json; put that file back or ")


def test_damaged_checkpoint_is_named_with_a_way_out(inside, capfd):
    os.rename("run/checkpoints/10/small", "run/set_aside")
    try:
        message = error_of(capfd, *TRAIN)
    finally:
        os.rename("run/set_aside", "run/checkpoints/10/small")
    assert message.endswith(
        "run/checkpoints/10 is damaged: its 'small' cannot be read. Remove that folder to use "
        "the checkpoint before it."
    )


def test_config_error_in_a_process_of_its_own_is_fast_and_has_no_traceback(project):
    start_s = time.monotonic()
    done = subprocess.run(
        align_command(*TRAIN, "--config.trian.steps=3"),
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - start_s < 15
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("align: Unknown key config.trian.")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(inside):
    with pytest.raises(ValueError, match="Unknown key config.trian"):
        cli.main([*TRAIN, "--debug", "--config.trian.steps=3"])


def test_overrides_are_read_as_the_type_of_their_key(inside):
    loaded = config.load_config(
        "config.py:plain",
        [
            "--config.train.steps=1_000",
            "--config.optim.learning_rate=1",
            "--config.data.flip=false",
            "--config.data.source=a=b?c=d",
            "--config.optim.no_decay=('a', 'b')",
        ],
    )
    assert loaded.train.steps == 1000 and type(loaded.train.steps) is int
    assert loaded.optim.learning_rate == 1.0 and type(loaded.optim.learning_rate) is float
    assert loaded.data.flip is False
    assert loaded.data.source == "a=b?c=d"
    assert loaded.optim.no_decay == ("a", "b")
    assert len(loaded.eval.evaluators) == 0  # get_config("plain")


def test_experiment_files_may_start_from_one_another(inside, tmp_path):
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "base.py").write_text(CONFIG)
    (tmp_path / "family" / "child.py").write_text(
        "from family.base import get_config as base\n\n\n"
        "def get_config():\n    c = base()\n    c.train.steps = 7\n    return c\n"
    )
    loaded = config.load_config(str(tmp_path / "family" / "child.py"))
    assert loaded.train.steps == 7 and loaded.model.text.variant == "tiny"


def test_config_survives_json(inside):
    loaded = config.load_config("config.py")
    assert config.from_json(config.to_json(loaded)).to_dict() == loaded.to_dict()


def test_config_of_an_older_version_gets_defaults_for_newer_keys(inside):
    loaded = config.load_config("config.py")
    older = json.loads(config.to_json(loaded))
    del older["data"]["mixture"], older["loss"]["negatives"]
    assert config.from_json(json.dumps(older)).to_dict() == loaded.to_dict()
    older["data"]["mixtures"] = {}
    with pytest.raises(ValueError, match="Unknown key config.data.mixtures. Did you mean 'mixture"):
        config.from_json(json.dumps(older))


def test_interrupted_start_leaves_a_workdir_that_the_same_command_continues(
    inside, monkeypatch, capfd
):
    def crash_at_3(step):
        if step == 3:
            raise RuntimeError("crash")

    command = ("train", "--config", "config.py:plain", "--workdir", "early")
    StubStep(act=crash_at_3).patch(monkeypatch)
    assert cli.main(command) == 1
    StubStep().patch(monkeypatch)
    assert cli.main(command) == 0
    assert "starting early" in capfd.readouterr().err
    lines = read_lines(inside / "early" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))


def test_module_runs_as_a_program(project):
    done = subprocess.run(
        [sys.executable, "-m", "align_jax.cli.main", "--version"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip().count(".") >= 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--config", "config.py", "--workdir", "gs://bucket/run"),
        (
            "train",
            "--config",
            "config.py",
            "--workdir",
            "no",
            "--config.data.source=gs://bucket/x?split=train",
        ),
        ("eval", "--workdir", "run", "--retrieval", "data", "--out", "gs://bucket/x.json"),
        ("eval", "--workdir", "run", "--retrieval", "s3://bucket/data"),
        ("pack", "captions.jsonl?images=images", "--out", "gs://bucket/x"),
        ("pack", "captions.jsonl?images=gs://bucket/images", "--out", "no"),
        ("curate", "gs://bucket/t.parquet", "--preset", "align", "--out", "no"),
        ("curate", "captions.jsonl", "--preset", "align", "--out", "gs://bucket/x"),
        ("scan", "data", "--out", "gs://bucket/x.parquet"),
        ("vocab", "data", "--out", "gs://bucket/x"),
        ("embed", "--model", "run", "--images", "gs://bucket/x", "--out", "no"),
        ("convert", "run", "gs://bucket/x"),
    ],
)
def test_a_bucket_is_refused_in_one_line_and_no_folder_appears(inside, capfd, arguments):
    assert re.search(r"(gs|s3):// is not a file system here; name", error_of(capfd, *arguments))
    assert not os.path.exists("gs:") and not os.path.exists("s3:")


def test_every_argument_of_every_verb_that_may_be_a_path_refuses_a_bucket(inside, capfd):
    seen = set()
    for verb, parser in verbs(cli._parser()):
        for action in parser._actions:
            takes_text = action.type in (None, str) and action.nargs != 0 and not action.choices
            if takes_text and action.dest not in cli._NO_PATHS:
                command = [*verb, *filled(parser, action)]
                line = error_of(capfd, *command)
                assert "s3://b/x: s3:// is not a file system here; name a local" in line, command
                seen.add((verb[0], action.dest))
    assert {("embed", "images"), ("train", "workdir"), ("classify", "templates")} <= seen
    assert len({verb for verb, _ in seen}) >= 17 and len(seen) > 60


def test_garbage_is_collected_again_after_an_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_seldom.py").write_text("import gc\nwhile_importing = gc.isenabled()\n")
    (tmp_path / "imported_never.py").write_text("raise ValueError")
    monkeypatch.setattr(cli.gc, "freeze", lambda: None)  # of a process of its own
    cli._import("imported_seldom")
    assert not sys.modules.pop("imported_seldom").while_importing and cli.gc.isenabled()
    with pytest.raises(ValueError):
        cli._import("imported_never")
    assert cli.gc.isenabled()


def verbs(parser):
    """((verb, or verb and action), its parser) of all."""
    for action in parser._actions:
        for name, inner in action.choices.items() if isinstance(action.choices, dict) else ():
            nested = [((name, *deeper), leaf) for deeper, leaf in verbs(inner)]
            yield from nested or [((name,), inner)]


def filled(parser, target):
    """Arguments of which one is a bucket, and all that must be there are."""
    arguments, groups = [], [g for g in parser._mutually_exclusive_groups if g.required]
    first = {g._group_actions[0] for g in groups if target not in g._group_actions}
    for action in parser._actions:
        if action is target or action.required or action in first:
            value = next(iter(action.choices)) if action.choices else "1"
            value = "s3://b/x" if action is target else value
            arguments += [*action.option_strings[-1:], value]
    return arguments


@pytest.mark.parametrize(
    "key",
    [
        *("init_from", "data.source", "data.tokenizer", "data.image_embeddings"),
        *("eval.evaluators.own.source", "eval.evaluators.shapes.source"),
    ],
)
def test_every_path_of_a_config_refuses_a_bucket(inside, capfd, key):
    command = ("train", "--config", "config.py", "--workdir", "new", f"--config.{key}=gs://b/x")
    assert error_of(capfd, *command).startswith(f"config.{key} gs://b/x: gs:// is not a file sys")


def test_paths_of_mixtures_models_and_evaluators_refuse_a_bucket(inside):
    c = config.load_config("config.py")
    c.data.source = ""
    with c.unlocked():
        c.data.mixture.web = {"source": "s3://b/x", "weight": 1.0}
    with pytest.raises(ValueError, match="^config.data.mixture.web.source s3://b/x: s3:// is not"):
        config_checks.validate(c, num_devices=1)
    with pytest.raises(ValueError, match="^model gs://b/x: gs:// is not a file system here"):
        align_jax.load("gs://b/x")
    with pytest.raises(ValueError, match="^Evaluator 'a'.source gs://b: gs:// is not a file"):
        evals.make_evaluators({"a": {"type": "retrieval", "source": "gs://b"}})


def test_last_step_is_saved_whatever_the_period(project):
    assert saved_steps(project / "run") == [8, 10]
