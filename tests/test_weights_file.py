"""Weight files: every dtype and layout that torch writes, and files that must be refused."""

import io
import json
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from align_jax.hf import weights as weights_file

torch = pytest.importorskip("torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
safetensors_torch = pytest.importorskip("safetensors.torch")

DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()  # of torch
)


def tensors_of_every_kind():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 7, 5, generator=generator)
    tensors = {f"dtype.{name}": (base * 50).to(getattr(torch, name)) for name in DTYPES}
    return tensors | {
        "scalar": torch.tensor(0.25),
        "counter": torch.tensor(123_456_789_012),
        "transposed": base.permute(2, 0, 1),
        "sliced": base[1:5:2, 3:],
        "same_storage": base,
        "expanded": torch.arange(9).expand((4, -1)),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0]),
        "special": torch.tensor([np.nan, np.inf, -0.0, 1e-42]),
        "half_view": base.to(torch.bfloat16).permute(2, 1, 0)[1:],
    }


def assert_equal(found, tensors):
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.detach()
        if wanted.dtype in (torch.float16, torch.bfloat16):
            wanted = wanted.float()
        wanted = wanted.numpy()
        assert (found[name].shape, found[name].dtype) == (wanted.shape, wanted.dtype), name
        assert found[name].tobytes() == wanted.tobytes(), name


def archive(path, pickled, storages=None, method=zipfile.ZIP_STORED):
    """Writes a file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("model/data.pkl", pickled)
        for key, raw in (storages or {}).items():
            file.writestr(f"model/data/{key}", raw)
    return path


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


class Storage:
    """Pickles as a storage of 4 float32 with this key."""

    def __init__(self, key="0", numel=4):
        self.pid = ("storage", torch.FloatStorage, key, "cpu", numel)


def pickled(value, protocol=2):
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol)
    pickler.persistent_id = lambda item: item.pid if isinstance(item, Storage) else None
    pickler.dump(value)
    return file.getvalue()


def tensor_call(shape=(4,), strides=(1,), offset=0, storage=None):
    rebuild = torch._utils._rebuild_tensor_v2
    arguments = (storage or Storage(), offset, shape, strides, False, OrderedDict())
    return Call(rebuild, *arguments)


def error_of(path):
    """Returns the one line with which a file is refused."""
    with pytest.raises(ValueError) as caught:
        weights_file.read_tensors(path)
    message = str(caught.value)
    assert str(path) in message or os.path.basename(path) in message
    assert "\n" not in message
    return message


def test_torch_file_of_every_dtype_and_stride_reads_bit_for_bit(tmp_path):
    tensors = tensors_of_every_kind()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_equal(weights_file.read_tensors(tmp_path), tensors)


def test_torch_state_dict_with_metadata_reads(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    assert_equal(weights_file.read_tensors(tmp_path / "weights.pt"), module.state_dict())


def test_safetensors_file_of_every_dtype_reads_bit_for_bit(tmp_path):
    tensors = {name: t.detach().clone() for name, t in tensors_of_every_kind().items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal(weights_file.read_tensors(tmp_path), tensors)


def test_reading_a_pickle_maps_the_file_and_copies_nothing(tmp_path):
    torch.save({"a": torch.randn(64, 32), "b": torch.randn(64, 32).T}, tmp_path / "model.bin")
    for array in weights_file.read_tensors(tmp_path / "model.bin").values():
        assert not array.flags.writeable
        owner = array
        while isinstance(owner, np.ndarray | memoryview):
            owner = owner.obj if isinstance(owner, memoryview) else owner.base
        assert isinstance(owner, mmap.mmap)


def test_written_file_reads_in_safetensors_with_the_metadata_torch_wants(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, 6, 5))
    arrays = {
        "temperature": np.float32(0.5) * np.ones(()),
        "transposed": base.astype(np.float32).transpose(2, 0, 1),
        "strided": base[::2, 1:].astype(np.float16),
        "counter": np.asarray(7, np.int64),
        "flags": base[0] > 0,
        "bytes": np.arange(3, dtype=np.uint8),
        "empty": np.zeros((0, 2), np.float32),
    }
    file = tmp_path / "model.safetensors"
    weights_file.write_safetensors(file, arrays)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    for found in (
        safetensors_numpy.load_file(file),
        {name: tensor.numpy() for name, tensor in safetensors_torch.load_file(file).items()},
    ):
        assert found.keys() == arrays.keys()
        for name, wanted in arrays.items():
            assert (found[name].shape, found[name].dtype) == (wanted.shape, wanted.dtype)
            np.testing.assert_array_equal(found[name], wanted)
    with safetensors_torch.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "model.safetensors"
    weights_file.write_safetensors(file, {"a": np.ones(3, np.float32)})
    before = file.read_bytes()
    with pytest.raises(ValueError, match="model.safetensors cannot hold .*complex128"):
        weights_file.write_safetensors(file, {"b": np.ones(3, np.complex128)})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    (tmp_path / "nowhere").write_text("a file")
    with pytest.raises(OSError, match="nowhere"):
        weights_file.write_safetensors(tmp_path / "nowhere" / "model.safetensors", {})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_checkpoint_reads_as_one(tmp_path, kind):
    tensors = {name: torch.randn(3, 4) for name in "abc"}
    shards = {f"part-{i}.{kind}": part for i, part in enumerate(("ab", "c"))}
    stem = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    for file, part in shards.items():
        content = {name: tensors[name] for name in part}
        if kind == "bin":
            torch.save(content, tmp_path / file)
        else:
            safetensors_torch.save_file(content, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = tmp_path / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert_equal(weights_file.read_tensors(tmp_path), tensors)

    index.write_text(json.dumps({"weight_map": weight_map | {"d": f"part-1.{kind}"}}))
    assert "d" in error_of(index)
    (tmp_path / f"part-1.{kind}").unlink()
    assert f"part-1.{kind} is missing" in error_of(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../part-0.bin"}}))
    assert "outside of its own folder" in error_of(index)
    index.write_text("[]")
    assert "no index" in error_of(index)


def test_safetensors_are_preferred_to_a_pickle_beside_them(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    weights_file.write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    assert weights_file.read_tensors(tmp_path)["a"].sum() == 2


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["value", "key", "state", "argument"])
def test_malicious_pickle_is_refused_by_name_and_nothing_runs(tmp_path, where, protocol):
    sentinel = tmp_path / "sentinel"
    evil = Call(os.system, f"touch {sentinel}")
    content = {
        "value": {"a": tensor_call(), "b": evil},
        "key": Call(OrderedDict, [(evil, tensor_call())]),
        "state": Call(OrderedDict, state={"_metadata": evil}),
        "argument": {"a": tensor_call(shape=evil)},
    }[where]
    file = archive(tmp_path / "pytorch_model.bin", pickled(content, protocol), {"0": b"\0" * 16})
    message = error_of(file)
    assert "asks for posix.system" in message and "Nothing in it was run" in message
    assert not sentinel.exists()
    pickle.loads(pickled(evil))  # it does run where it may
    assert sentinel.exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, __import__, open, torch.load, np.load, type, object]
)
def test_any_other_callable_is_refused(tmp_path, function):
    file = archive(tmp_path / "model.bin", pickled({"a": Call(function, "1")}))
    assert f".{function.__name__}" in error_of(file)


@pytest.mark.parametrize("name", [b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict"])
@pytest.mark.parametrize("state", [b"}X\x08\0\0\0__call__Ns", b"N}X\x08\0\0\0__call__Ns\x86"])
def test_pickle_cannot_change_what_the_reader_calls(tmp_path, name, state):
    # BUILD sets attributes of what is on the stack: here {"__call__": None} of a callable.
    build = b"c" + name + b"\n" + state + b"b0"
    file = archive(tmp_path / "model.bin", b"\x80\x02" + build + b"}.")
    assert "no state dict" in error_of(file)
    without = archive(tmp_path / "fine.bin", b"\x80\x02" + b"c" + name + b"\n0}.")
    assert weights_file.read_tensors(without) == {}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shape": (5,)}, "strides"),
        ({"offset": 1}, "strides"),
        ({"offset": -1}, ""),
        ({"strides": (10**18,)}, ""),
        ({"strides": (-1,)}, ""),
        ({"shape": (2, 2)}, "strides"),
        ({"shape": (10**12, 10**12), "strides": (0, 0)}, ""),
        ({"shape": "ab"}, ""),
        ({"storage": Storage("1")}, "has no model/data/1"),
        ({"storage": Storage("../data.pkl")}, "has no"),
        ({"storage": 3}, ""),
    ],
)
def test_tensor_that_leaves_its_storage_is_an_error(tmp_path, changes, problem):
    file = archive(
        tmp_path / "model.bin", pickled({"a": tensor_call(**changes)}), {"0": bytes(range(16))}
    )
    message = error_of(file)
    assert "no state dict" in message and problem in message
    fine = archive(tmp_path / "fine.bin", pickled({"a": tensor_call()}), {"0": bytes(range(16))})
    assert weights_file.read_tensors(fine)["a"].tobytes() == bytes(range(16))


def test_file_that_is_no_state_dict_is_an_error_saying_what_it_holds(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "trainer.bin")
    assert "'state_dict' is no tensor" in error_of(tmp_path / "trainer.bin")
    torch.save(torch.ones(2), tmp_path / "tensor.bin")
    assert "it holds a" in error_of(tmp_path / "tensor.bin")
    packed = archive(tmp_path / "packed.bin", pickled({}), method=zipfile.ZIP_DEFLATED)
    assert "compressed" in error_of(packed)
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as file:
        file.writestr("word/document.xml", "<a/>")
    assert "without data.pkl" in error_of(tmp_path / "other.bin")


def test_file_of_another_kind_is_named_for_what_it_is(tmp_path):
    tensors = {"a": torch.ones(2)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert "before 1.6" in error_of(tmp_path / "old.bin")
    for name, content, problem in (
        ("empty.safetensors", b"", "empty (0 bytes)"),
        ("page.bin", b"\n<!DOCTYPE html><html>", "HTML page"),
        ("pointer.bin", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("noise.safetensors", bytes(range(100, 200)), "neither"),
        ("short.safetensors", b"abc", "neither"),
    ):
        (tmp_path / name).write_bytes(content)
        assert problem in error_of(tmp_path / name)
    assert "does not exist" in error_of(tmp_path / "absent.bin")
    (tmp_path / "folder").mkdir()
    assert "holds no weights; expected one of model.safetensors" in error_of(tmp_path / "folder")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncated_file_is_an_error_wherever_it_ends(tmp_path, kind):
    whole = tmp_path / f"whole.{kind}"
    tensors = {"a": torch.randn(40, 3), "b": torch.tensor(3)}
    if kind == "bin":
        torch.save(tensors, whole)
    else:
        safetensors_torch.save_file(tensors, whole)
    raw = whole.read_bytes()
    for length in (*range(1, len(raw), 23), len(raw) - 1):
        file = tmp_path / f"cut.{kind}"
        file.write_bytes(raw[:length])
        error_of(file)


def test_damaged_safetensors_header_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"

    def file_with(header, body=b"\0" * 16, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((length or len(text)).to_bytes(8, "little") + text + body)
        return path

    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    assert weights_file.read_tensors(file_with({"a": entry}))["a"].shape == (4,)
    for changes in (
        {"dtype": "F33"},
        {"shape": [5]},
        {"shape": [-1]},
        {"shape": [2**40, 2**40]},
        {"data_offsets": [0, 32]},
        {"data_offsets": [-16, 16]},
        {"data_offsets": [0, 15]},
        {"data_offsets": "ab"},
    ):
        assert "truncated or damaged" in error_of(file_with({"a": entry | changes}))
    for bad in (
        file_with({"a": 3}),
        file_with({"a": entry, "b": entry}),  # two tensors in the same bytes
        file_with({"a": entry}, body=b"\0" * 40),
        file_with({"a": entry}, length=2**40),
        file_with({"a": entry}, length=2**63),
        file_with({"a": entry}, length=9),
        file_with(b'{"a":' + b"[" * 100_000),
        file_with(b'{"\xff": 1}'),
    ):
        assert "truncated or damaged" in error_of(bad)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_type_that_numpy_lacks_is_named(tmp_path, name):
    tensors = {"a": torch.ones(2), "b": torch.ones(4).to(getattr(torch, name))}
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    assert "tensor b has the type F8_E" in error_of(tmp_path / "model.safetensors")
