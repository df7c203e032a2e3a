"""Fine-tuning for classification: step, loss, schedule, crop and evaluator against other sums; what
stays as it is; runs that end and go on; what is refused.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
from unittest import mock

import jax
import numpy as np
import optax
import pytest
import torch
from helpers import error_of, read_checkpoint, read_lines
from PIL import Image

from align_jax import align, config, config_checks, losses, mesh, optim, train, train_step, trees
from align_jax.cli import main as cli
from align_jax.data import inception
from align_jax.evals import classify, image_classifier
from align_jax.models import efficientnet, layers
from align_jax.plan import aot

BATCH, SIZE, CLASSES = 16, 32, 5
HEAD = {"optim.image_lr_multiplier": 0.0}


def settings(**changes):
    c = config.default_config()
    c.task = "classify"
    c.model.image.variant, c.model.dtype = "pico", "float32"
    c.model.bn_group_size, c.model.bn_decay = 4, 0.9
    c.data.source = "scenes?size=64&seed=1&label=shape&image_size_px=48"
    c.data.image_size, c.data.eval_image_size, c.data.resize_size = SIZE, 40, 44
    c.data.resize, c.data.crop, c.data.num_threads = "pil", "inception", 1
    c.optim.name, c.optim.learning_rate, c.optim.warmup_steps = "sgd", 0.05, 0
    c.optim.schedule = "steps"
    c.train.batch_size, c.train.steps = BATCH, 4
    c.checkpoint.every_steps, c.eval.every_steps, c.eval.batch_size = 2, 4, 16
    c.log.every_steps = 1
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module", autouse=True)
def short_tower():
    # Two of the seven stages, and depthwise convolutions that are quick to compile.
    make = efficientnet.make_tower

    def make_short(c):
        return dataclasses.replace(make(c), stages=efficientnet.STAGES[:2])

    with (
        mock.patch.object(efficientnet, "make_tower", make_short),
        mock.patch.object(layers, "depthwise_conv", layers.native_depthwise_conv),
    ):
        yield


def make_batch(step):
    rng = np.random.default_rng(step)
    return {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        "index": rng.permutation(100)[:BATCH].astype(np.int32),
    }


@functools.cache
def run(devices, changes=()):
    """(losses, first state on the host, last state) of three steps."""
    m = mesh.make_mesh(devices, 1, devices=jax.devices()[:devices])
    made = train.make_program(settings(**dict(changes)), m, num_classes=CLASSES)
    model, optimizer, abstract, step_fn = made
    s = train_step.init_state(model, optimizer, abstract, seed=0)
    first, history = jax.device_get(s.variables()), []
    for step in range(3):
        s, metrics = step_fn(s, mesh.put_batch(make_batch(step), mesh.batch_sharding(m)))
        history.append(jax.device_get(metrics))
    return history, first, jax.device_get(s.variables())


def named(tree):
    return dict(trees.named_leaves(tree))


def test_loss_and_its_gradient_are_those_of_torch():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(7, 5)).astype(np.float32), rng.integers(0, 5, 7)
    for smoothing in (0.0, 0.2):
        theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(
            theirs, torch.tensor(labels), label_smoothing=smoothing
        )
        loss.backward()
        ours = functools.partial(losses.classify_loss, label_smoothing=smoothing)
        (value, parts), gradient = jax.value_and_grad(ours, has_aux=True)(logits, labels)
        assert float(value) == pytest.approx(loss.item(), abs=1e-6)
        np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7)
        assert float(parts["accuracy"]) == pytest.approx(100 * np.mean(logits.argmax(1) == labels))
    assert classify.cross_entropy(logits, labels) == pytest.approx(
        torch.nn.functional.cross_entropy(
            torch.tensor(logits).double(), torch.tensor(labels)
        ).item()
    )


def test_first_loss_is_that_of_chance_and_eight_devices_give_the_losses_of_one():
    one, eight = run(1)[0], run(8)[0]
    assert one[0]["loss"] == pytest.approx(math.log(CLASSES), abs=1e-6)  # the head starts at zero
    np.testing.assert_allclose(
        [line["loss"] for line in eight], [line["loss"] for line in one], rtol=2e-5
    )
    # 4 steps, times 0.2 after 30 % of them: 1.2.
    np.testing.assert_allclose([line["learning_rate"] for line in one], [0.05, 0.01, 0.002])


@pytest.mark.slow
def test_two_parts_of_a_batch_give_the_losses_of_one_pass():
    one, parts = run(1)[0], run(1, (("train.microbatches", 2),))[0]
    np.testing.assert_allclose(
        [line["loss"] for line in parts], [line["loss"] for line in one], rtol=2e-5
    )


def test_head_alone_learns_as_torch_says_and_leaves_the_tower_bitwise():
    history, first, last = run(1, tuple(HEAD.items()))
    for name, leaf in named(first).items():
        same = np.array_equal(leaf, named(last)[name])
        assert same == (not name.startswith("params/head/")), name
    # The features do not change, so the run is logistic regression by SGD.
    model = train.make_program(
        settings(**HEAD), mesh.make_mesh(1, 1, devices=jax.devices()[:1]), num_classes=CLASSES
    )[0]
    features = [
        np.asarray(model.apply(first, make_batch(step)["image"], False, method="encode_image"))
        for step in range(3)
    ]
    head = torch.nn.Linear(features[0].shape[1], CLASSES)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    descent = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-5)
    for step, rate in enumerate((0.05, 0.01, 0.002)):
        descent.param_groups[0]["lr"] = rate
        labels = torch.tensor(make_batch(step)["label"]).long()
        loss = torch.nn.functional.cross_entropy(
            head(torch.tensor(features[step])), labels, label_smoothing=0.1
        )
        assert float(history[step]["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        descent.zero_grad()
        loss.backward()
        descent.step()
    np.testing.assert_allclose(
        last["params"]["head"]["kernel"], head.weight.detach().numpy().T, atol=1e-6
    )
    np.testing.assert_allclose(
        last["params"]["head"]["bias"], head.bias.detach().numpy(), atol=1e-6
    )


def test_whole_network_learns_and_frozen_statistics_stay():
    for changes, moves in (((), True), ((("model.bn_mode", "frozen"),), False)):
        _, first, last = run(1, changes)
        moved = {
            name
            for name, leaf in named(first).items()
            if not np.array_equal(leaf, named(last)[name])
        }
        assert "params/image/stem_conv/kernel" in moved
        assert any(name.startswith("batch_stats/") for name in moved) == moves


def test_tower_learns_at_its_own_share_of_the_rate():
    # One step of SGD is the rate times the gradient, which is the same in both runs.
    def first_moves(share):
        c = settings(**{"optim.image_lr_multiplier": share})
        rule = optim.make_optimizer(c.optim, lambda step: 0.05, optim.CLASSIFIER)
        params = {"image": {"a": np.ones(3, np.float32)}, "head": {"b": np.ones(2, np.float32)}}
        updates, _ = rule.update(params, rule.init(params), params)
        return updates["image"]["a"][0], updates["head"]["b"][0]

    (whole, head), (tenth, same) = first_moves(1.0), first_moves(0.1)
    assert tenth == pytest.approx(whole / 10) and head == same
    assert head == pytest.approx(-0.05 * (1 + 1e-5))


@pytest.mark.parametrize(
    ("steps", "every", "factor", "expected"),
    [
        (10, 0.3, 0.2, [1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.04, 0.008]),
        (8, 0.5, 0.1, [1] * 4 + [0.1] * 4),
        (2, 0.25, 0.5, [0.5, 0.25]),  # 0.5, 1, 1.5 are rounded to 0, 1 and 2
        (2, 0.2, 0.5, [0.5, 0.125]),  # 0.4, 0.8, 1.2, 1.6: to 0, 1, 1 and 2
        (3, 1.0, 0.5, [1, 1, 1]),
    ],
)
def test_rate_falls_in_steps(steps, every, factor, expected):
    c = settings(**{"optim.learning_rate": 1.0}).optim
    c.decay_every, c.decay_factor = every, factor
    schedule = optim.make_schedule(c, steps)
    np.testing.assert_allclose([schedule(step) for step in range(steps)], expected, rtol=1e-6)


def test_steps_count_from_the_end_of_warm_up():
    c = settings(**{"optim.learning_rate": 1.0}).optim
    c.warmup_steps, c.decay_every, c.decay_factor = 2, 0.5, 0.1
    schedule = optim.make_schedule(c, 6)
    np.testing.assert_allclose([schedule(step) for step in range(6)], [0, 0.5, 1, 1, 0.1, 0.1])


def test_sgd_is_the_momentum_loop_of_its_papers_with_decay_in_the_gradient():
    c = settings(**{"optim.weight_decay": 0.1, "optim.b1": 0.8}).optim
    rule = optim.make_optimizer(c, lambda step: 0.5, optim.CLASSIFIER)
    weight = {"image": {"w": np.float32(2.0)}, "head": {"k": np.float32(1.0)}}
    memory, by_hand, velocity = rule.init(weight), 1.0, 0.0
    for gradient in (1.0, -2.0, 0.5):
        gradients = {"image": {"w": gradient}, "head": {"k": gradient}}
        updates, memory = rule.update(gradients, memory, weight)
        weight = optax.apply_updates(weight, updates)
        velocity = 0.8 * velocity + gradient + 0.1 * by_hand
        by_hand -= 0.5 * velocity
    assert float(weight["head"]["k"]) == pytest.approx(by_hand, rel=1e-6)


def test_parts_of_the_inception_crop_have_the_areas_and_shapes_asked_for():
    rng = np.random.default_rng(0)
    height, width = 300, 400
    parts = np.array([inception.draw_part(height, width, 0.25, rng) for _ in range(4000)])
    top, left, h, w = parts.T
    assert (top >= 0).all() and (top + h <= height).all()
    assert (left >= 0).all() and (left + w <= width).all()
    share, aspect = h * w / (height * width), w / h
    assert 0.248 < share.min() and share.max() <= 1.0
    assert 0.74 < aspect.min() < 0.77 and 1.30 < aspect.max() < 1.345
    # Uniform area, but that large parts of some shapes do not fit: its half lies below 0.6.
    small = share < 0.5  # all shapes fit
    assert (
        np.abs(np.quantile(share[small], [0.25, 0.5, 0.75]) - [0.3125, 0.375, 0.4375]).max() < 0.01
    )
    assert abs(np.median(np.log(aspect[small]))) < 0.03
    assert abs(np.mean((top / np.maximum(1, height - h))[small]) - 0.5) < 0.03


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((30, 32), (0, 0, 30, 32))],
)
def test_part_that_never_fits_is_the_largest_central_one_of_an_allowed_shape(shape, expected):
    class Widest:
        def uniform(self, low, high):
            return high if high == 1.0 else (low if shape[0] < shape[1] else high)

        def random(self, n):
            return np.zeros(n)

    if shape == (30, 32):
        expected = (0, 0, 30, 32)
    assert inception.draw_part(*shape, 0.5, Widest()) == expected


def test_inception_view_is_its_part_scaled_and_half_of_the_time_mirrored():
    pixels = np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8)
    mirrored = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        view = inception.inception_view(
            pixels,
            crop_px=32,
            min_area=0.3,
            method="pil",
            rng=np.random.default_rng(seed),
            flip=True,
        )
        top, left, h, w = inception.draw_part(60, 80, 0.3, rng)
        part = Image.fromarray(pixels).crop((left, top, left + w, top + h))
        part = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR))
        if rng.random() < 0.5:
            part, mirrored = part[:, ::-1], mirrored + 1
        np.testing.assert_array_equal(view, part)
    assert 8 < mirrored < 32


CONFIG = """
from align_jax.config import default_config


def get_config():
    c = default_config()
    c.update_from_flattened_dict({changes})
    c.eval.evaluators.own = {{
        "type": "classify", "source": "scenes?size=24&seed=6&label=shape&image_size_px=48"}}
    return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config of a user, and `whole`: a run of four steps."""
    folder = tmp_path_factory.mktemp("classify")
    plain, changes = settings().to_dict(), {}

    def flatten(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}.")
            else:
                changes[prefix + key] = value

    flatten(plain)
    (folder / "config.py").write_text(CONFIG.format(changes=changes))
    with contextlib.chdir(folder):
        assert cli.main(["train", "--config", "config.py", "--workdir", "whole"]) == 0
    return folder


def train_by(*arguments):
    return ["train", "--config", "config.py", *arguments]


def test_stopped_run_goes_on_bitwise_and_evaluates_the_same(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    save = train._Run._save

    def save_and_stop(self, state):
        save(self, state)
        if int(state.step) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train._Run, "_save", save_and_stop)
    assert cli.main(train_by("--workdir", "cut")) == 1
    monkeypatch.setattr(train._Run, "_save", save)
    assert cli.main(train_by("--workdir", "cut")) == 0
    whole, cut = (read_checkpoint(folder / name, 4) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name in whole if whole[name].tobytes() != cut[name].tobytes()] == []
    assert read_lines(folder / "whole" / "metrics.jsonl") == read_lines(
        folder / "cut" / "metrics.jsonl"
    )
    capfd.readouterr()
    assert cli.main(["eval", "--model", "whole", "--out", "whole.json"]) == 0
    assert "classifier [%]" in capfd.readouterr().out
    found = json.loads((folder / "whole.json").read_text())
    (last,) = [
        line for line in read_lines(folder / "whole" / "metrics.jsonl") if "eval/own/top1" in line
    ]
    assert found["results"] == {k[5:]: v for k, v in last.items() if k.startswith("eval/")}
    assert found["results"]["own/num_images"] == 24


def test_evaluation_sees_the_centre_of_its_own_size(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model = image_classifier.load("whole")
    assert (model.preprocessing.image_size, model.preprocessing.resize_size) == (40, 44)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 44, 44, 3), np.uint8)
    centre = pixels[:, 2:42, 2:42]
    expected = model.model.apply(jax.device_get(model.variables), centre, False)
    np.testing.assert_allclose(model.class_scores(pixels), expected, rtol=1e-4, atol=1e-5)
    z = model.encode_image(pixels)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)


def test_classifier_starts_from_a_classifier_with_or_without_its_head(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    before = read_checkpoint(folder / "whole", 4)
    for towers, has_head in (("both", True), ("image", False)):
        m = mesh.make_mesh(1, 1, devices=jax.devices()[:1])
        made = train.make_program(settings(), m, num_classes=7)
        state = train_step.init_state(*made[:3], seed=1)
        found = named(train.init_from.start_from("whole", towers, made[0], state.variables()))
        for name, leaf in found.items():
            if name.startswith("params/head/") and not has_head:
                assert not np.asarray(leaf).any()
            else:
                np.testing.assert_array_equal(leaf, before[f"weights/{name}"])
        said = capfd.readouterr().err
        assert ("image tower and head" in said) == has_head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "classfy"}, "config.task='classfy' is unknown. Did you mean 'classify'?"),
        ({"lora.rank": 4}, "config.lora.rank=4 has no meaning with config.task='classify'"),
        ({"loss.kind": "sigmoid"}, "config.loss.kind='sigmoid' has no meaning"),
        ({"loss.negatives": 0.5}, "config.loss.negatives=0.5 has no meaning"),
        ({"init_towers": "text"}, "config.init_towers='text' has no meaning"),
        ({"data.eval_image_size": 48}, "config.data.resize_size=44 is smaller than the crop of"),
        ({"data.eval_image_size": 16}, "config.data.eval_image_size=16 is below the trunk's"),
        ({"data.eval_image_size": -1}, "config.data.eval_image_size=-1 must be finite and not"),
        ({"data.crop_min_area": 0.0}, "config.data.crop_min_area=0.0 must lie in (0, 1]"),
        ({"data.crop": "inceptoin"}, "config.data.crop='inceptoin' is unknown. Did you mean"),
        ({"data.decode": "reduced"}, "config.data.decode='reduced' would leave too few pixels"),
        ({"optim.decay_factor": 1.5}, "config.optim.decay_factor=1.5 must lie in [0, 1)"),
        ({"optim.decay_every": 0.0}, "config.optim.decay_every=0.0 must be positive"),
        ({"optim.name": "sdg"}, "config.optim.name='sdg' is unknown. Did you mean 'sgd'?"),
        ({"optim.temperature": "fixed"}, "config.optim.temperature='fixed' has no meaning"),
        ({"optim.freeze": ("/text/",)}, "config.optim.freeze: '/text/' is in the name of none"),
        (HEAD | {"optim.freeze": ("^head",)}, "config.optim freezes all"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        config_checks.validate(settings(**changes), num_devices=1)
    assert str(error.value).startswith(message)


def test_what_a_classifier_cannot_do_is_said_in_one_line(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    message = error_of(capfd, *train_by("--workdir", "no", "--config.data.source=scenes?size=9"))
    assert "config.data.source: scenes?size=9 needs a label" in message
    message = error_of(
        capfd, "embed", "--model", "whole", "--images", "scenes?size=9", "--out", "y"
    )
    assert "whole is a classifier" in message
    message = error_of(
        capfd, "eval", "--model", "whole", "--retrieval", "scenes?size=9", "--out", "z.json"
    )
    assert "a classifier has no text tower" in message
    source = "scenes?size=24&label=colour"
    (folder / "colours.py").write_text(
        (folder / "config.py").read_text().replace("scenes?size=24&seed=6&label=shape", source)
    )
    message = error_of(capfd, "eval", "--model", "whole", "--config", "colours.py")
    assert "the classifier has 7 classes and source 10" in message
    with pytest.raises(ValueError, match="is a classifier"):
        align.load("whole")
    with pytest.raises(ValueError, match="config.task='classify' cannot be planned"):
        aot.compile_report(settings(), jax.devices())
    shutil.copytree("whole", "half", ignore=shutil.ignore_patterns("classes.json"))
    message = error_of(capfd, "eval", "--model", "half")
    assert message.startswith("half/classes.json cannot be used")
    for changed, argument in (("colours.py", ""), ("config.py", "--config.task=contrastive")):
        arguments = ["train", "--config", changed, "--workdir", "no", *filter(None, [argument])]
        if argument:
            arguments.append("--config.data.source=scenes?size=9")
        message = error_of(capfd, *arguments)  # before anything compiles
        said = "has no head of classes" if argument else "has 7 classes and source 10"
        assert (
            message.startswith("config.eval.evaluators: Evaluator 'own': the ") and said in message
        )


def test_evaluator_counts_what_it_cannot_read_and_gives_the_accuracies_by_hand():
    class Item:
        def __init__(self, key, image, label):
            self.key, self.image, self.label = key, image, label

    class Source(list):
        classes, problems = ("a", "b", "c"), {}

        def stamp(self):
            return "made"

    class Model:
        classes = ("a", "b", "c")

        def class_scores(self, readers, on_error):
            rows = []
            for read in readers:
                try:
                    rows.append([float(read()[0, 0, c]) for c in range(3)])
                except ValueError:
                    rows.append([math.nan] * 3)
            return np.array(rows, np.float32)

    def picture(*rgb):
        return np.full((4, 4, 3), rgb, np.uint8)

    source = Source(
        [
            Item("0", picture(9, 1, 0), 0),
            Item("1", picture(1, 9, 0), 0),
            Item("2", picture(5, 5, 0), 1),  # a tie: the lower class comes first
            Item("3", b"no image", 2),
            Item("4", picture(0, 0, 3), 2),
        ]
    )
    metrics = classify.Classify("own", source)(Model())
    assert (metrics["num_images"], metrics["num_skipped"]) == (4, 1)
    assert metrics["problems/image_not_an_image"] == 1
    assert metrics["top1"] == 50.0
    assert metrics["mean_per_class"] == pytest.approx((50 + 0 + 100) / 3)
    Model.classes = ("a", "b", "d")
    with pytest.raises(ValueError, match="other names"):
        classify.Classify("own", source)(Model())
