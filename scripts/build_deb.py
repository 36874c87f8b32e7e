"""Makes a Debian package of a wheel: the package, the command, the units and the man pages.

    python scripts/build_deb.py WHEEL [FOLDER]      (default dist)

What it needs are Debian's own packages, in the versions that pyproject.toml asks for: Debian 13 has them.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

import make_man

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "any": "all"}
OLDEST_PYTHON = "3.11"
"""From here on tomli is not needed."""
LAUNCHER = """#!/usr/bin/python3
from psi_kv_governor.cli import main

main()
"""
PRERM = """#!/bin/sh
# What Python compiled here belongs to no package, and would stay behind.
set -e
folder=/usr/lib/python3/dist-packages/psi_kv_governor
if [ -d "$folder" ]; then
  find "$folder" -type d -name __pycache__ -prune -exec rm -rf {} +
fi
"""


def depends(requirements: list[str]) -> list[str]:
    """The wheel's requirements as Debian calls them; those of extras and of other systems are left out."""
    needed = [f"python3 (>= {OLDEST_PYTHON})"]
    for requirement in requirements:
        if ";" in requirement:
            continue
        name, _, version = requirement.partition(">=")
        needed.append(f"python3-{name.strip().lower()}" + (f" (>= {version.strip()})" if version else ""))
    return needed


def lay_out(wheel: Path, root: Path) -> dict[str, str]:
    """Put all files below `root`; gives the fields of the control file."""
    library = root / "usr/lib/python3/dist-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(library)
    (info,) = library.glob("*.dist-info")
    about = Parser().parsestr((info / "METADATA").read_text())
    _write(root / "usr/bin/psi-kv", LAUNCHER.encode(), 0o755)
    units = ROOT / "packaging/systemd"
    _write(root / "usr/lib/systemd/system/psi-kv@.service", (units / "psi-kv@.service").read_bytes())
    docs = root / "usr/share/doc/psi-kv-governor"
    for drop_in in units.glob("*.service.d/*.conf"):
        _write(docs / "examples" / drop_in.parent.name / drop_in.name, drop_in.read_bytes())
    _write(docs / "copyright", (ROOT / "LICENSE").read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        for page in make_man.write(Path(folder)):
            packed = gzip.compress(page.read_bytes(), mtime=0)
            _write(root / f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz", packed)
    (root / "etc/psi-kv").mkdir(parents=True)
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    machine = re.sub(r".*-(?:\w+\.)*(?:many)?linux_(?:\d+_\d+_)?", "", wheel.stem)
    return {
        "Package": "psi-kv-governor",
        "Version": str(about["Version"]),
        "Architecture": ARCHITECTURES[machine if machine in ARCHITECTURES else "any"],
        "Maintainer": "the PSI KV Governor project",
        "Installed-Size": str(size >> 10),
        "Depends": ", ".join([*depends(about.get_all("Requires-Dist", [])), "libc6 (>= 2.17)"]),
        "Section": "utils",
        "Priority": "optional",
        "Description": str(about["Summary"]),
    }


def build(wheel: Path, folder: Path) -> Path:
    """The package of `wheel`, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made) / "root"
        fields = lay_out(wheel, root)
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
        _write(root / "DEBIAN/prerm", PRERM.encode(), 0o755)
        (root / "DEBIAN").chmod(0o755)
        root.chmod(0o755)
        name = "{Package}_{Version}_{Architecture}.deb".format(**fields)
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", root, folder / name],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return folder / name


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: build_deb.py WHEEL [FOLDER]")
    print(build(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "dist")))
