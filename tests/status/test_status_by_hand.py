"""`status`, `limit`, `park` and `unpark`: one governed process, several, or none that can be understood."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
from click.testing import CliRunner, Result
from status_help import two_sequences_pressed

from psi_kv_governor import socket_place, status_client
from psi_kv_governor.cli import main
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.status_socket import StatusSocket

pytestmark = pytest.mark.skipif(not socket_place.able(), reason="this platform has no Unix sockets")


@pytest.fixture
def governor():
    with contextlib.closing(two_sequences_pressed()) as made:
        yield made


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_status_shows_every_governed_process_or_one(opened, governor):
    result = run("status")
    assert result.exit_code == 0, result.output
    assert f"{os.getpid()} my program  calm: " in result.stdout
    assert "limit: none" in result.stdout
    assert "   3 idle" in result.stdout  # since when changes from one look to the next
    for called in ("my program", str(os.getpid())):
        assert f"{os.getpid()} my program  calm: " in run("status", called).stdout
    (line,) = run("status", "--json").stdout.splitlines()
    assert json.loads(line)["status"]["live_cells"] == 3400


def test_status_shows_the_others_where_one_is_of_another_version(opened, governor, monkeypatch):
    other = StatusSocket(governor)
    other.start()
    asked = status_client.told

    def told(found):
        if found.path == other.path:
            raise PsiKvError(f"process {found.pid} runs another version of this package")
        return asked(found)

    monkeypatch.setattr("psi_kv_governor.cli.status.told", told)
    result = run("status")
    other.close()
    assert result.exit_code == 0
    assert result.stdout.count("my program  calm: ") == 1
    assert "another version" in result.stderr
    assert run("status").exit_code == 0


def test_status_fails_where_nobody_can_be_understood(opened, monkeypatch):
    monkeypatch.setattr("psi_kv_governor.status_client.VERSION", 9)
    result = run("status")
    assert result.exit_code == 1
    assert "another version" in result.stderr


@pytest.mark.parametrize(
    ("amount", "share", "n_bytes"),
    [
        ("2GiB", None, 2 << 30),
        ("1.5 gib", None, 3 << 29),
        ("300M", None, 300 << 20),
        ("0.5", 0.5, None),
        ("1", 1.0, None),
        ("0", 0.0, None),
        ("none", None, None),
    ],
)
def test_a_limit_is_bytes_a_share_or_none(opened, governor, amount, share, n_bytes):
    governor.limit(0.9)
    result = run("limit", str(os.getpid()), amount)
    assert result.exit_code == 0, result.output
    assert (governor.status().limit, governor.status().limit_bytes) == (share, n_bytes)


@pytest.mark.parametrize("amount", ["2", "-1", "nan", "much", "5 apples", "", "GiB"])
def test_a_limit_that_makes_no_sense_is_refused_in_one_line(opened, governor, amount):
    result = run("limit", "--", str(os.getpid()), amount)
    assert result.exit_code == 2
    assert "is not usable: give 2GiB, a share from 0 to 1, or none" in result.stderr
    assert governor.status().limit is None


def test_park_and_unpark_say_what_they_did(opened, governor):
    parked = run("park", "my program")
    assert parked.exit_code == 0, parked.output
    assert "psi-kv park: 400 cells, 13.8 MiB returned" in parked.stdout
    assert governor.status().parked_bytes > 0
    assert "psi-kv unpark: 400 cells, 8.8 MiB back in memory" in run("unpark", "my program").stdout
    one = run("park", str(os.getpid()), "--sequence", "0")
    assert "3,000 cells" in one.stdout
    assert "there is no sequence 9: there are 0, 3" in run("park", "my program", "--sequence", "9").stdout


@pytest.mark.parametrize("args", [["limit", "nobody", "none"], ["park", "nobody"], ["status", "nobody"]])
def test_a_process_that_is_not_there_is_one_line(opened, args):
    result = run(*args)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"nobody is not a governed process of this user: there are {os.getpid()}" in result.stderr


def test_what_the_process_refuses_is_told(opened, governor):
    governor.engine.close()
    result = run("park", str(os.getpid()))
    assert result.exit_code == 1
    assert "the simulated engine is closed" in result.stderr
