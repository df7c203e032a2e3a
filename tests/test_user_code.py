"""storage/user_code.py: the file as it is now, and nothing beside it."""

import os

import pytest

from align_jax.storage.user_code import run_file


def test_file_is_run_as_it_is_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    path = tmp_path / "mine.py"
    for number in (1, 2):  # of the same size and time, by which Python would know bytecode
        path.write_text(f"import math\nCONTENT = math.sqrt({number**2}), __file__, __name__\n")
        os.utime(path, (1e9, 1e9))
        assert run_file(path, "given").CONTENT == (number, str(path), "given")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.py"]


def test_errors_are_those_of_the_file(tmp_path):
    path = tmp_path / "mine.py"
    for content, error in ((b"x = (", SyntaxError), (b"y = x", NameError)):
        path.write_bytes(content)
        with pytest.raises(error):
            run_file(path, "mine")
    path.write_bytes(b"\xef\xbb\xbf# coding: utf-8\nNAME = 'caf\xc3\xa9'\n")
    assert run_file(path, "mine").NAME == "café"
