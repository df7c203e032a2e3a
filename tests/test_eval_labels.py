"""Several classes an image, ClassLabels of TFDS, ObjectNet: readers and mean average precision."""

import io
import json
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from helpers import decoded
from PIL import Image
from sklearn.metrics import average_precision_score

from align_jax.data.sources.multilabel_tars import open_multilabel
from align_jax.data.sources.open_source import open_labelled
from align_jax.evals import make_evaluator
from align_jax.evals.multilabel import average_precisions
from align_jax.evals.tables import format_table


def write_splits(folder, features, splits):
    """Writes a TFDS dataset of ArrayRecord files; splits: name -> examples. Returns the folder."""
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    infos = []
    for split, examples in splits.items():
        path = folder / f"made-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for example in examples:
            for value in example.values():
                if isinstance(value, io.BytesIO):
                    value.seek(0)
            writer.write(features.serialize_example(features.encode_example(example)))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="made", split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(examples)],
                num_bytes=path.stat().st_size,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, check_data=False
    )
    return folder


def test_average_precisions_by_hand():
    scores = np.array([[5.0], [4], [3], [2], [1]])
    found = average_precisions(scores, np.array([[1], [0], [1], [0], [1]], bool))
    assert found["map"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # Recall 0 to 0.3 is reached at precision 1, 0.4 to 0.6 at 2/3, 0.7 to 1 at 3/5.
    assert found["map11"] == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)


def test_average_precisions_equal_scikit_learn_and_its_interpolation():
    rng = np.random.default_rng(0)
    scores, is_right = rng.normal(size=(50, 4)), rng.random((50, 4)) < 0.3
    found = average_precisions(scores, is_right)
    expected = [average_precision_score(is_right[:, c], scores[:, c]) for c in range(4)]
    assert found["map"] == pytest.approx(expected)
    for c in range(4):
        order = np.argsort(-scores[:, c])
        hits = np.cumsum(is_right[order, c])
        recalls, precisions = hits / hits[-1], hits / np.arange(1, 51)
        points = [precisions[recalls >= t / 10 - 1e-12].max() for t in range(11)]
        assert found["map11"][c] == pytest.approx(np.mean(points))


def _add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _png(level, size=8, mode="L"):
    file = io.BytesIO()
    Image.new("L", (size, size), level).convert(mode).save(file, "PNG")
    return file.getvalue()


def _npy(values):
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


class _Model:
    """Images of level 0 to 90 are dark, the others bright."""

    def encode_image(self, images, on_error):
        levels = np.array([int(image[0, 0, 0]) for image in decoded(images, on_error)])
        return self._vectors(levels / 200)

    def encode_text(self, texts):
        return self._vectors(np.array([0.0 if "dark" in text else 1.2 for text in texts]))

    def _vectors(self, angle):
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@pytest.fixture
def tars(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wds" / "test").mkdir(parents=True)
    with tarfile.open(tmp_path / "wds" / "test" / "0.tar", "w") as archive:
        for number, (level, row) in enumerate(
            [(0, [1, 0, 0]), (100, [1, 1, 0]), (240, [0, 1, 0]), (60, [0, 0, 0])]
        ):
            _add(archive, f"{number}.png", _png(level))
            _add(archive, f"{number}.npy", _npy(row))
        _add(archive, "4.png", _png(9))
        _add(archive, "4.npy", _npy([1, 0]))
        _add(archive, "5.png", b"broken")
        _add(archive, "5.npy", _npy([1, 0, 0]))
    (tmp_path / "wds" / "classnames.txt").write_text("dark\nbright\nabsent\n")
    return tmp_path


def test_images_of_several_classes_are_read_and_scored(tars):
    source = open_multilabel("wds/test")
    assert source.labels.tolist()[:2] == [[True, False, False], [True, True, False]]
    assert source.problems == {"class_unknown": 1} and len(source) == 5
    evaluator = make_evaluator("voc", {"type": "multilabel", "source": "wds/test"})
    metrics = evaluator(_Model())
    # Dark: 0 60 100 240, right at 1 and 3. Bright: 240 100 60 0, right at 1 and 2.
    assert metrics["map"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)
    assert metrics["num_images"] == 4 and metrics["num_skipped"] == 2
    assert metrics["num_absent_classes"] == 1 and metrics["chance_map"] == pytest.approx(50.0)
    assert evaluator.clip_benchmark(metrics)[1]["mean_average_precision"] == metrics["map"] / 100
    table = format_table({f"voc/{key}": value for key, value in metrics.items()}, [evaluator])
    assert "11-point mAP" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "none"}, "Evaluator 'voc': none does not exist"),
        ({"source": "empty"}, "Evaluator 'voc': empty holds no .tar with key.jpg"),
        ({"class_names": ("a",)}, "Evaluator 'voc': there are 1 class_names, and wds/test has 3"),
    ],
)
def test_bad_multilabel_arguments_are_one_line(tars, arguments, message):
    (tars / "empty").mkdir()
    entry = {"type": "multilabel", "source": "wds/test"} | arguments
    with pytest.raises(ValueError, match=message):
        make_evaluator("voc", entry)


def test_class_labels_of_tfds_are_labelled_images(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "coarse": tfds.features.ClassLabel(names=["old", "new"]),
        "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }
    rows = [
        {"image": io.BytesIO(_png(n, mode="RGB")), "coarse": n % 2, "label": n % 3}
        for n in range(7)
    ]
    folder = write_splits(tmp_path / "set/1.0.0", features, {"train": rows, "test": rows[:2]})
    source = open_labelled(f"{tmp_path}/set?split=train")
    assert source.classes == ("a", "b", "c") and len(source) == 7
    assert [source[i].label for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    with Image.open(io.BytesIO(source[3].image)) as image:
        assert image.getpixel((0, 0)) == (3, 3, 3)
    coarse = open_labelled(f"{folder}?split=train[2:]&label=coarse&max=2")
    assert coarse.classes == ("old", "new") and [coarse[i].label for i in range(2)] == [0, 0]
    assert len(open_labelled(f"{folder}?split=train&part=2/2")) == 3
    assert len({s.stamp() for s in (source, coarse, open_labelled(f"{folder}?split=test"))}) == 3
    with pytest.raises(ValueError, match="label='fine' is no ClassLabel; there are: coarse, label"):
        open_labelled(f"{folder}?label=fine")
    with pytest.raises(ValueError, match="split 'val' is not in"):
        open_labelled(f"{folder}?split=val")


def test_objectnet_takes_its_shared_classes_without_the_border(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("air_freshener", "alarm_clock", "backpack"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        pixels = np.full((9, 9, 3), (255, 0, 0), np.uint8)
        pixels[2:-2, 2:-2] = 7
        Image.fromarray(pixels).save(tmp_path / "images" / folder / "1.png")
    (tmp_path / "mappings").mkdir()
    labels = {
        "backpack": "Backpack",
        "alarm_clock": "Alarm clock",
        "air_freshener": "Air freshener",
    }
    (tmp_path / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Alarm clock": "analog clock", "Backpack": "backpack, back pack"}
    (tmp_path / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    source = open_labelled("images?mappings=mappings")
    assert source.classes == ("Alarm clock", "Backpack") and not source.problems
    assert [source[i].label for i in range(len(source))] == [0, 1]
    assert source[0].image.shape == (5, 5, 3) and (source[0].image == 7).all()
    assert isinstance(open_labelled("images?mappings=mappings&border=0")[0].image, bytes)
    with pytest.raises(ValueError, match="none/folder_to_objectnet_label.json does not exist"):
        open_labelled("images?mappings=none")
