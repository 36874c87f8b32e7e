"""A place that is memory under a name that does not say so is found out by what the machine counts."""

import contextlib
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from residence_help import ext4_image

from gguf_models import LARGE, write_model
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.events import Degraded
from psi_kv_governor.preflight import check_place as doctor_s_look
from psi_kv_governor.residence import Place, Refusal, check_place, files, place, witness
from psi_kv_governor.residence.storage import Storage
from waiting import until

MIB = 1 << 20
CONTEXT = [i % 240 + 5 for i in range(1200)]


@pytest.fixture
def unseen(mounted, monkeypatch) -> Iterator[Path]:
    """A disk in a file in memory, with what is below it out of sight, as in a container."""
    monkeypatch.setattr(place, "storage_of", lambda *_: Storage("ext4 on sda1", "ext4"))
    monkeypatch.setattr(witness, "_found", {})
    monkeypatch.setattr(files, "_speeds", {})
    with (
        mounted("tmpfs") as memory,
        mounted("ext4", "-o", "loop", source=ext4_image(memory, 128 * MIB)) as point,
    ):
        yield point


def refusal_of(point: Path) -> Refusal:
    """Looked at until it is found out: while others take or give back as much memory at the same moment the
    counters tell nothing, and it passes for a disk."""
    for _ in range(100):
        files._speeds.clear()
        if isinstance(found := check_place(str(point), "the test", reserve_bytes=0), Refusal):
            return found
        freed_goes_back(point)
    pytest.fail(f"it passes for a disk: {found}")


def freed_goes_back(point: Path) -> None:
    """To the memory below: nothing rises when blocks that are there already are written again, and the third
    look found nothing any more."""
    subprocess.run(["fstrim", str(point)], check=True)


def test_it_is_refused_when_it_is_opened_and_the_doctor_says_so(unseen):
    found = refusal_of(unseen)
    assert found.name == "memory"
    assert "MiB of memory, so parking there returns nothing" in found.why
    check = doctor_s_look(GovernorConfig(place=str(unseen), place_reserve_bytes=0))
    assert (check.state, "parking there returns nothing" in check.remedy) == ("fail", True), check
    assert "place" in check.remedy


def test_zram_that_is_no_swap_counts_as_memory(mounted, monkeypatch):
    monkeypatch.setattr(place, "storage_of", lambda *_: Storage("ext4 on sda1", "ext4"))
    monkeypatch.setattr(witness, "_found", {})
    monkeypatch.setattr(files, "_speeds", {})
    with zram_disk(128 * MIB) as device, mounted("ext4", source=device) as point:
        assert refusal_of(point).name == "memory"


@contextlib.contextmanager
def zram_disk(n_bytes: int) -> Iterator[str]:
    """A zram device with an ext4, of this test alone."""
    made = subprocess.run(
        ["zramctl", "--find", "--size", str(n_bytes)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no zram: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", device], check=True)
        yield device
    finally:
        # Another test's root of its own may have a copy of the mount until it ends.
        give_back = ["zramctl", "--reset", device]
        until(lambda: subprocess.run(give_back, capture_output=True, check=False).returncode == 0)


@pytest.mark.llama
@pytest.mark.parametrize("backing", ["memory", "file"])
def test_it_is_found_out_at_the_first_parking_and_nothing_is_parked_any_more(unseen, tmp_path, backing):
    from psi_kv_governor import GovernedLlama

    config = GovernorConfig(place=str(unseen), place_reserve_bytes=0, backing=backing)
    model = write_model(tmp_path / "model.gguf", LARGE)
    for _ in range(50):  # until nobody else takes or gives back memory at that moment
        files._speeds[unseen.stat().st_dev] = 5e8  # opened as a disk that was measured: nothing is noticed
        llm = GovernedLlama(
            str(model), config=config, auto=False, n_ctx=2048, n_threads=1, verbose=False, flash_attn=True
        )
        events = []
        llm.governor.subscribe(events.append)
        llm.eval(CONTEXT)
        whole = llm.save_state().llama_state
        assert llm.governor.status().place.startswith(str(unseen))
        assert llm.governor.trim(0.5).bytes_returned > MIB
        said = [event for event in events if isinstance(event, Degraded)]
        if said:
            break
        llm.close()
        freed_goes_back(unseen)
    try:
        assert [event.what for event in said] == ["park"]
        assert f"{unseen}" in said[0].why
        assert "is memory" in said[0].why
        assert "\n" not in said[0].why
        again = llm.governor.trim(1.0)
        if again.bytes_returned:  # of free cells, which need no place
            assert (again.cells, again.written_bytes) == (0, 0)
            again = llm.governor.trim(1.0)
        assert again.bytes_returned == 0
        assert "is memory" in again.problem
        assert llm.governor.status().place == ""
        assert bytes(llm.save_state().llama_state) == bytes(whole)  # what was parked is still what it was
        assert isinstance(check_place(str(unseen), "the next model"), Refusal)
    finally:
        llm.close()


def test_a_disk_stays_a_place_whatever_others_do_in_memory_at_the_same_moment(disk, mounted, monkeypatch):
    monkeypatch.setattr(witness, "_found", {})
    monkeypatch.setattr(files, "_speeds", {})
    with mounted("tmpfs") as memory:
        stop = threading.Event()

        def others() -> None:
            """Take memory in a tmpfs and give it back, in no rhythm, for as long as it is looked at."""
            with (memory / "theirs").open("w+b") as file:
                while not stop.is_set():
                    file.truncate(64 * MIB)
                    with mmap.mmap(file.fileno(), 64 * MIB) as view:
                        for at in range(0, 64 * MIB, mmap.PAGESIZE):
                            view[at] = 1
                    file.truncate(0)

        thread = threading.Thread(target=others)
        thread.start()
        try:
            for _ in range(4):
                files._speeds.clear()
                assert isinstance(check_place(str(disk), "the test", reserve_bytes=0), Place)
                assert witness.memory_behind(str(disk / files.own_folder_name())) == ""
        finally:
            stop.set()
            thread.join()


def test_a_disk_stays_a_place_while_shared_memory_fills_as_fast_as_the_disk_takes_ours(disk, monkeypatch):
    """A longer write gives the other more time, so that it fits at every size."""
    began_s = time.monotonic()
    real = os.pwrite

    def slow(descriptor, content, offset):
        time.sleep(len(content) / (100 * MIB))
        return real(descriptor, content, offset)

    monkeypatch.setattr(witness, "_found", {})
    monkeypatch.setattr(os, "pwrite", slow)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
    monkeypatch.setattr(witness, "held_bytes", lambda: int((time.monotonic() - began_s) * 100 * MIB))
    assert witness.memory_behind(str(disk)) == ""


def test_what_memory_files_hold_is_counted_without_proc(mounted, monkeypatch):
    for name in ("_SWAPS", "_BLOCKS"):
        monkeypatch.setattr(witness, name, Path("/nonexistent"))
    with mounted("tmpfs") as memory:
        file = memory / "file"

        def rise() -> int:
            file.unlink(missing_ok=True)
            before = witness.held_bytes()
            file.write_bytes(os.urandom(32 * MIB))
            return witness.held_bytes() - before

        until(lambda: 28 * MIB <= rise() <= 40 * MIB)
