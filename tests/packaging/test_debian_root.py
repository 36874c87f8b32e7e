"""The Debian package in a Debian of its own: installed, used, its unit verified, and removed again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from packages_help import CACHE, Unavailable, alone, debian_mirror, run
from waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
SUITE = "trixie"
NEEDS = (
    "systemd,python3-click,python3-rich,python3-msgspec,python3-numpy,python3-pyelftools,python3-platformdirs"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a root"),
    pytest.mark.skipif(
        shutil.which("debootstrap") is None, reason="there is no debootstrap: apt install debootstrap"
    ),
]


@pytest.fixture(scope="module")
def debian() -> Iterator[Path]:
    """A Debian with what the package depends on, made once and kept in the cache of the tests: another run
    on this machine waits for it."""
    with alone(CACHE / "test-servers" / SUITE) as root:
        ready = root.with_name(f"{SUITE}.ready")
        if not ready.is_file():
            shutil.rmtree(root, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", f"--include={NEEDS}", SUITE, root]
            try:
                run([*command, debian_mirror()], seconds=800)
            except Unavailable as error:
                pytest.skip(f"a Debian can't be had: {error}")
            ready.touch()
        yield root


@pytest.fixture
def package(wheel, tmp_path) -> Path:
    """The package of a wheel that has this machine's agent in it."""
    subprocess.run([sys.executable, ROOT / "scripts/build_deb.py", wheel, tmp_path], check=True)
    (deb,) = tmp_path.glob("*.deb")
    return deb


def inside(root: Path, *command: str, status: int = 0) -> str:
    # Python compiles there as it does for a user, whose machine forbids it as little.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        ["chroot", str(root), *command],
        capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S, env=environ,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_it_installs_runs_has_a_sound_unit_and_leaves_nothing(debian, package):
    shutil.copy(package, debian / "root")
    inside(debian, "dpkg", "--install", f"/root/{package.name}")
    try:
        assert inside(debian, "psi-kv", "--version").startswith("psi-kv ")
        inside(debian, "psi-kv", "exec", "--", "sh", "-c", "exit 7", status=7)
        dry = inside(debian, "psi-kv", "exec", "--dry-run", "--", "sh")
        assert "/usr/lib/python3/dist-packages/psi_kv_governor/engines/llama/libpsikv_agent.so" in dry
        (debian / "etc/psi-kv").mkdir(exist_ok=True)
        (debian / "etc/psi-kv/x.env").write_text("COMMAND=/bin/true\n")
        assert inside(debian, "systemd-analyze", "verify", "--man=no", "psi-kv@x.service") == ""
        (debian / "etc/psi-kv/x.env").unlink()
        for page in ("man1/psi-kv.1", "man1/psi-kv-exec.1", "man5/psi-kv.toml.5"):
            inside(debian, "gzip", "-t", f"/usr/share/man/{page}.gz")
    finally:
        inside(debian, "dpkg", "--purge", "psi-kv-governor")
        (debian / "root" / package.name).unlink()
    assert not (debian / "usr/bin/psi-kv").exists()
    assert not (debian / "usr/lib/python3/dist-packages/psi_kv_governor").exists()
