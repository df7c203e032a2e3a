"""Arguments of `align serve` that cannot work: one line, before any model is loaded."""

import socket

import pytest
from helpers import error_of

from align_jax.cli import main as cli
from align_jax.serve import run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "--key-file, or --no-auth"),
        (("--host", "::"), "--key-file, or --no-auth"),
        (("--host", "192.168.1.1"), "--key-file, or --no-auth"),
        (("--host", "example.org"), "--key-file, or --no-auth"),
        (("--key-file", "empty"), "a key is one line"),
        (("--key-file", "two"), "a key is one line"),
        (("--key-file", "nowhere"), "nowhere"),
        (("--port", "65536"), "between 0 and 65,535"),
        (("--port", "-1"), "between 0 and 65,535"),
        (("--writable",), "--index"),
        (("--port", "0", "--model", "nowhere"), "nowhere"),
        (("--port", "0", "--name", ""), "--name"),
        (("--port", "0", "--batch-size", "0"), "batch_size=0"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capfd, tiny_hf, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("one\ntwo\n")
    assert said in error_of(capfd, "serve", "--model", tiny_hf[0], *arguments)


def test_a_port_in_use_is_a_failed_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--model", "any", "--port", port]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert f"127.0.0.1:{port}" in line and "in use" in line


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil.test", False)],
)  # fmt: skip
def test_which_addresses_are_of_this_machine(host, expected):
    assert run._is_loopback(host) is expected
