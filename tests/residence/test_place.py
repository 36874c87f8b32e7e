"""A folder of our own is found on every machine, or the way out is said: nothing raises."""

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from residence_help import ext4_image, in_child, probes_end

from psi_kv_governor.residence import Place, Refusal, check_place, choose_backing, find_place, swap_state
from psi_kv_governor.residence.files import PROBE_S, open_unlinked
from psi_kv_governor.residence.storage import Kernel


def test_the_order_is_the_setting_the_service_manager_the_users_cache_and_var_tmp(disk):
    environ = {
        "CACHE_DIRECTORY": f"{disk}/cache:{disk}/second",
        "STATE_DIRECTORY": f"{disk}/state",
        "XDG_CACHE_HOME": f"{disk}/xdg",
        "HOME": f"{disk}/home",
        "TMPDIR": f"{disk}/temporary",
    }
    name = f"psi-kv-{os.geteuid()}"
    assert folder_of(find_place(f"{disk}/set", environ=environ)) == f"{disk}/set/{name}"
    for expected, variable in [
        ("cache", "CACHE_DIRECTORY"),
        ("state", "STATE_DIRECTORY"),
        ("xdg", "XDG_CACHE_HOME"),
        ("home/.cache", "HOME"),
        ("temporary", "TMPDIR"),
    ]:
        assert folder_of(find_place(environ=environ)) == f"{disk}/{expected}/{name}"
        del environ[variable]
        environ["HOME"] = environ.get("HOME", "/")  # HOME=/ is no home, and neither is none at all


def folder_of(search) -> str:
    assert search.place is not None, search.why_none
    return search.place.folder


def test_the_setting_is_used_or_nothing():
    search = find_place("/proc/nothing")
    assert search.place is None
    assert "place" in search.why_none
    assert [refusal.name for refusal in search.refused] == ["absent"]


def test_a_user_without_a_home_or_a_name_still_gets_a_place_or_the_way_out():
    """A random user in a container: HOME=/, no entry in passwd, and /run/user/UID not to be read."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")

    def body() -> str:
        os.setgid(54321)
        os.setuid(54321)
        search = find_place(environ={"HOME": "/", "XDG_RUNTIME_DIR": "/run/user/0"}, reserve_bytes=0)
        return search.place.folder if search.place else search.why_none

    answer = in_child(body)
    assert "/psi-kv-54321" in answer
    if answer == "/var/tmp/psi-kv-54321":
        assert stat.S_IMODE(Path(answer).stat().st_mode) == 0o700
        Path(answer).rmdir()
    else:
        assert "place" in answer


def test_a_read_only_root_is_refused_with_the_way_out(mounted, tmp_path):
    image = ext4_image(tmp_path, 8 << 20)
    with mounted("ext4", "-o", "loop,ro", source=image) as point:
        found = check_place(str(point / "cache"), "the test")
        assert isinstance(found, Refusal)
        assert found.name == "read-only"
        assert "PSI_KV_PLACE" in found.way_out


def test_our_folder_is_closed_to_others(disk):
    found = check_place(f"{disk}/wide", "the test")
    assert isinstance(found, Place)
    Path(found.folder).chmod(0o755)
    assert isinstance(check_place(f"{disk}/wide", "the test"), Place)
    assert stat.S_IMODE(Path(found.folder).stat().st_mode) == 0o700


def test_a_link_in_the_place_of_our_folder_is_not_followed(disk):
    (disk / "elsewhere").mkdir(exist_ok=True)
    (disk / "linked").mkdir(exist_ok=True)
    (disk / "linked" / f"psi-kv-{os.geteuid()}").symlink_to(disk / "elsewhere")
    found = check_place(f"{disk}/linked", "the test")
    assert isinstance(found, Refusal)
    assert found.name == "not ours"
    assert "link" in found.why


def test_a_folder_of_somebody_else_is_not_used(disk):
    if os.geteuid() != 0:
        pytest.skip("making another user's folder needs root")
    theirs = disk / "theirs" / "psi-kv-0"
    theirs.mkdir(parents=True)
    os.chown(theirs, 54321, 54321)
    found = check_place(str(theirs.parent), "the test")
    assert isinstance(found, Refusal)
    assert (found.name, found.why) == ("not ours", "it belongs to user 54321")
    shutil.rmtree(theirs.parent)


def test_files_have_no_name_and_are_closed_to_others(place):
    descriptor = open_unlinked(place.folder)
    found = os.fstat(descriptor)
    assert (found.st_nlink, stat.S_IMODE(found.st_mode)) == (0, 0o600)
    assert list(Path(place.folder).iterdir()) == []
    os.close(descriptor)


def test_without_o_tmpfile_a_file_is_unlinked_before_a_byte_is_in_it(place, monkeypatch):
    real = os.open

    def without(path, flags, *rest, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", without)
    descriptor = open_unlinked(place.folder)
    assert (os.fstat(descriptor).st_nlink, list(Path(place.folder).iterdir())) == (0, [])
    os.close(descriptor)


def test_free_space_is_told_without_the_reserve_and_up_to_the_limit(disk):
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    limited = check_place(str(disk), "the test", limit_bytes=1 << 20, reserve_bytes=0)
    assert isinstance(limited, Place)
    assert limited.free_bytes == 1 << 20
    full = check_place(str(disk), "the test", reserve_bytes=free * 2)
    assert isinstance(full, Refusal)
    assert full.name == "full"


def test_noexec_is_no_obstacle_to_parking_and_is_told(mounted, tmp_path):
    image = ext4_image(tmp_path, 8 << 20)
    with mounted("ext4", "-o", "loop,noexec", source=image) as point:
        found = check_place(str(point), "the test", reserve_bytes=0)
        assert isinstance(found, Place), found
        assert not found.runs_programs


def test_a_stuck_disk_is_not_waited_for(place, monkeypatch):
    import threading

    from psi_kv_governor.residence import files

    forever = threading.Event()
    monkeypatch.setattr(files, "_speeds", {})
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: forever.wait(300))
    tmpfile, speed = files.try_out(place.folder)
    forever.set()
    probes_end()  # its file is no other test's
    assert (tmpfile, speed) == (place.tmpfile, 0.0)
    assert PROBE_S < 1


def test_a_disk_that_others_keep_busy_is_as_fast_as_most_of_what_it_takes(place, monkeypatch):
    from psi_kv_governor.residence import files

    disk = types.SimpleNamespace(pieces=0, busy_s=0.0)

    def takes(_descriptor: int) -> None:
        disk.pieces += 1
        disk.busy_s += 0.05 if disk.pieces % 4 == 0 else 0.001

    monkeypatch.setattr(files, "_speeds", {})
    monkeypatch.setattr(files, "PROBE_MOST_S", 300.0)
    monkeypatch.setattr(files, "_working_s", lambda _thread: disk.busy_s)  # of this disk, not of this machine
    monkeypatch.setattr(os, "fdatasync", takes)
    _, speed = files.try_out(place.folder)
    assert speed == pytest.approx(files._CHUNK_BYTES / 0.001)


def test_waiting_for_a_processor_is_no_slowness_of_a_disk():
    """Beside fifteen busy programs a disk of 1 GB/s was taken for one of 20 MB/s."""
    from psi_kv_governor.residence import files

    if not os.path.exists("/proc/self/schedstat"):  # noqa: PTH110
        pytest.skip("this kernel does not count how long a thread waits for a processor (CONFIG_SCHED_INFO)")
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})  # of this thread, and of what it starts
    busy = [subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=-1)
            for _ in range(3)]  # fmt: skip
    try:
        for one in busy:
            assert one.stdout.readline()
        thread = threading.get_native_id()
        began_s, worked_s = time.monotonic(), files._working_s(thread)
        # One that counts all time counts it for ever. A machine that stands still while it is our turn has
        # its time counted too, and so more of it is looked at.
        while (took_s := time.monotonic() - began_s) < 0.5 or (
            files._working_s(thread) - worked_s >= 0.7 * took_s
        ):
            assert took_s < 300
    finally:
        os.sched_setaffinity(0, everywhere)
        for one in busy:
            one.kill()
            one.wait()
            one.stdout.close()


@pytest.mark.parametrize(
    ("changes", "setting", "swap", "expected", "why"),
    [
        ({}, "auto", (False, True), "file", "no swap"),
        ({}, "auto", (True, False), "file", "may use no swap"),
        ({}, "auto", (True, True), "memory", "there is swap"),
        ({}, "file", (True, True), "file", "asked for"),
        ({}, "memory", (False, False), "memory", "asked for"),
        ({"write_bytes_per_s": 9e6}, "auto", (False, False), "memory", "takes 9 MB/s"),
        ({"free_bytes": 1 << 20}, "file", (False, False), "memory", "above the reserve"),
        ({"fs_type": "zfs"}, "file", (False, False), "memory", "full disk could kill"),
        (None, "auto", (False, False), "memory", "no folder"),
    ],
)
def test_a_cache_is_born_in_a_file_where_the_kernel_would_kill(changes, setting, swap, expected, why):
    usual = {
        "folder": "/var/tmp/psi-kv-0",
        "device": "ext4 on sda1",
        "fs_type": "ext4",
        "free_bytes": 1 << 34,
        "write_bytes_per_s": 5e8,
        "why": "",
    }
    place = None if changes is None else Place(**{**usual, **changes})
    backing, reason = choose_backing(setting, place, *swap, n_bytes=1 << 28)
    assert backing == expected
    assert why in reason


def test_swap_is_of_the_machine_and_of_every_cgroup_above(tmp_path):
    kernel = Kernel(proc=tmp_path)
    header = "Filename\tType\tSize\tUsed\tPriority\n"
    (tmp_path / "swaps").write_text(header)
    assert swap_state(kernel, list) == (False, True)
    (tmp_path / "swaps").write_text(header + "/dev/sda2 partition 1 0 -2\n")
    inner, outer = tmp_path / "outer" / "inner", tmp_path / "outer"
    inner.mkdir(parents=True)
    for folder, most in ((inner, "max"), (outer, "max")):
        (folder / "memory.swap.max").write_text(f"{most}\n")
    assert swap_state(kernel, lambda: [inner, outer]) == (True, True)
    (outer / "memory.swap.max").write_text("0\n")
    assert swap_state(kernel, lambda: [inner, outer]) == (True, False)
    (inner / "memory.limit_in_bytes").write_text("1000\n")
    (inner / "memory.memsw.limit_in_bytes").write_text("1000\n")
    assert swap_state(kernel, lambda: [inner]) == (True, False)
    assert swap_state() == swap_state()
