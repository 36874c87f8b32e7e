"""Build hook: compiles the agent into the wheel of a platform.

`$CC` says with what, `$PSIKV_PLATFORM` for which platform tag (default this machine's). Where there is no
compiler, and no platform was asked for, the wheel is one for any platform and the agent is compiled on first
use; so it always is in an editable install.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_LLAMA = Path("psi_kv_governor/engines/llama")
_NATIVE = Path("psi_kv_governor/native")


class AgentHook(BuildHookInterface[Any]):
    """Hatchling calls `initialize` before a wheel is put together, and `finalize` after it."""

    _folder = ""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and have the result included at the place where `native/building.py` looks for it."""
        wanted = os.environ.get("PSIKV_PLATFORM", "")
        platform = wanted or sysconfig.get_platform().replace("-", "_").replace(".", "_")
        if version == "editable" or "linux" not in platform:
            return
        compiler = (
            os.environ.get("CC", "").split() or [n for n in ("cc", "gcc", "clang") if shutil.which(n)][:1]
        )
        if not compiler and not wanted:
            self.app.display_warning("no C compiler: the agent will be compiled on first use")
            return
        self._folder = tempfile.mkdtemp(prefix="psi-kv-build-")
        target = Path(self._folder) / "libpsikv_agent.so"
        command = _compiling(Path(self.root) / "src" / _NATIVE)(compiler or ["cc"], str(target))
        # Without symbols: two thirds of it, and nobody debugs a wheel.
        done = subprocess.run([*command, "-s"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            if wanted:
                raise RuntimeError(f"compiling the agent for {platform} failed:\n{done.stderr}")
            self.app.display_warning("compiling the agent failed: it will be compiled on first use")
            return
        build_data["force_include"][str(target)] = str(_LLAMA / target.name)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"  # it is a program's plugin, and knows nothing of Python

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _compiling(folder: Path) -> Any:
    """`compile_command` of the package, without the package: its dependencies are not there yet."""
    spec = importlib.util.spec_from_file_location("compiling", folder / "compiling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compile_command
