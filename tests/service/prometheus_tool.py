"""Prometheus' own checker."""

from __future__ import annotations

import shutil
import subprocess
from fcntl import LOCK_EX, flock

from servers import CACHE, Unavailable

_FETCH_S = 200


def promtool() -> str:
    """The one of this machine, or Debian's, unpacked into the cache of the tests. Raises Unavailable."""
    if found := shutil.which("promtool"):
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable("Debian's prometheus: there is no apt here")
    folder = CACHE / "prometheus"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        program = folder / "promtool"
        if not program.is_file():
            for deb in folder.glob("*.deb"):
                deb.unlink()
            fetch = ["apt-get", "--quiet", "-o", "APT::Sandbox::User=", "download", "prometheus"]
            try:
                subprocess.run(fetch, cwd=folder, capture_output=True, check=True, timeout=_FETCH_S)
                (deb,) = folder.glob("*.deb")
                unpack = ["dpkg-deb", "-x", deb, folder / "root"]
                subprocess.run(unpack, capture_output=True, check=True, timeout=_FETCH_S)
            except subprocess.SubprocessError as error:
                raise Unavailable(f"Debian's prometheus: {error}") from error
            (folder / "root/usr/bin/promtool").rename(program)
            shutil.rmtree(folder / "root")
            deb.unlink()
        return str(program)
