"""Prometheus' own checker."""

from __future__ import annotations

import shutil

from packages_help import CACHE, alone, needs_apt, run

_FETCH = ("apt-get", "--quiet", "-o", "APT::Sandbox::User=", "download", "prometheus")


def promtool() -> str:
    """The one of this machine, or Debian's, unpacked into the cache of the tests. Raises Unavailable."""
    if found := shutil.which("promtool"):
        return found
    needs_apt("Debian's prometheus")
    with alone(CACHE / "test-servers" / "prometheus") as folder:
        folder.mkdir(exist_ok=True)
        program = folder / "promtool"
        if not program.is_file():
            for deb in folder.glob("*.deb"):
                deb.unlink()
            run(_FETCH, cwd=folder)
            (deb,) = folder.glob("*.deb")
            run(["dpkg-deb", "-x", deb, folder / "root"])
            (folder / "root/usr/bin/promtool").rename(program)
            shutil.rmtree(folder / "root")
            deb.unlink()
        return str(program)
