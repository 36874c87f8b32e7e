"""What others wrote, from the registries of Debian, Python and npm, into folders of the tests' own.

Nothing is installed. What can't be had is Unavailable, and its tests are skipped by name.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

CACHE = user_cache_path("psi-kv")
FETCH_S = 600
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


class Unavailable(Exception):
    """It can't be had here."""


@contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """The folder, for one test run at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        flock(lock, LOCK_EX)
        yield folder


def run(command: Sequence[Any], seconds: float = FETCH_S, **options: Any) -> str:
    """What it said. Raises Unavailable."""
    words = list(map(str, command))
    try:
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
    except OSError as error:
        raise Unavailable(f"{words[0]}: {error}") from error
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException as error:  # also Ctrl-C: nothing goes on compiling behind us
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unavailable(f"{Path(words[0]).name} took more than {seconds:.0f} s") from error
        raise
    if process.returncode != 0:
        last = (err.strip() or out.strip()).splitlines()[-1:]
        raise Unavailable(f"{Path(words[0]).name} {words[1]}: {' '.join(last)}")
    return out


def needs_apt(what: str) -> None:
    """Raises Unavailable where there is none."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable(f"{what}: there is no apt here")


def unpack_debs(root: Path, config: str, packages: Sequence[str], *flags: str) -> None:
    """Fetch `packages` with what they need by an apt of `config` alone, and unpack them into `root`.

    The lists and the archives are under `root` too, so that no right and no lock of the machine's apt is
    needed. Raises Unavailable.
    """
    for part in ("lists/partial", "archives/partial"):
        (root / "apt" / part).mkdir(parents=True)
    file = root / "apt" / "apt.conf"
    file.write_text(
        f'Dir::State::lists "{root}/apt/lists";\nDir::Cache "{root}/apt";\n'
        f'Dir::Cache::archives "{root}/apt/archives";\nAPT::Sandbox::User "";\nDebug::NoLocking "true";\n'
        + config
    )
    environ = {**os.environ, "APT_CONFIG": str(file)}
    run(["apt-get", "--quiet", "update", "--error-on=any"], env=environ)
    what = ["--yes", "--no-install-recommends", "--download-only", *flags, *packages]
    run(["apt-get", "--quiet", "install", *what], env=environ)
    for deb in sorted((root / "apt/archives").glob("*.deb")):
        run(["dpkg-deb", "-x", deb, root])
    shutil.rmtree(root / "apt")


def debian_mirror() -> str:
    """The mirror of Debian that this machine uses itself. Raises Unavailable."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.*"))]
    for file in files:
        if file.suffix in {".list", ".sources"} and file.is_file():
            found = re.search(r"^[^#\n]*?(https?://\S+/debian)/?(?:\s|$)", file.read_text(), re.MULTILINE)
            if found:
                return found[1]
    raise Unavailable("apt on this machine knows no mirror of Debian")
