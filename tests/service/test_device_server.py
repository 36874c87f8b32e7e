"""A server whose cache is in memory of a device, under `psi-kv exec`: what can be parked of it are the
states that it saves, and these lie in host memory. The device is Mesa's lavapipe, a driver in software."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from servers import Server, debian_server, free_port, resident_bytes, with_agent

from gguf_models import LARGE, write_model
from packages_help import Unavailable
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.governor import Governor
from waiting import until

# A driver in software takes its time, and more on a busy machine.
pytestmark = [pytest.mark.llama, pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPT = "Once upon a time there was a machine that "


@pytest.fixture(scope="module")
def device_server(tmp_path_factory) -> tuple[list[str], dict[str, str]]:
    """The command of Debian's server with every layer on the device, and the driver's environment."""
    try:
        program = debian_server("libggml0-backend-vulkan", "mesa-vulkan-drivers")
    except Unavailable as error:
        pytest.skip(f"Debian's llama-server with Vulkan can't be had here: {error}")
    root = Path(program[-1]).parents[2]
    driver = next(root.glob("usr/lib/*/libvulkan_lvp.so"), None)
    if driver is None:
        pytest.skip("Debian's Mesa has no driver in software for this processor")
    manifest = root.parent / "lavapipe.json"
    icd = {"library_path": str(driver), "api_version": "1.4.0"}
    manifest.write_text(json.dumps({"ICD": icd, "file_format_version": "1.0.0"}))
    told = {"VK_DRIVER_FILES": str(manifest), "GGML_VK_VISIBLE_DEVICES": "0", "LP_NUM_THREADS": "2"}
    model = write_model(tmp_path_factory.mktemp("model") / "bytes.gguf", LARGE)
    # Batches of eight take vectors times matrices only: what is larger the driver compiles for half a minute.
    flags = ["-c", "2048", "-np", "2", "-t", "1", "-ngl", "99", "--cache-ram", "512", "--no-warmup"]
    flags += ["-b", "8"]
    return [*program, "-m", str(model), *flags], told


def test_the_saved_states_of_a_server_on_a_device_are_parked_and_come_back(device_server, folder, tmp_path):
    command, told = device_server
    port, fleet = free_port(), Fleet(place=str(folder), backing="memory")
    environ = {**with_agent(fleet.name, folder, "memory"), **told}
    with (
        contextlib.closing(fleet),
        Server([*command, "--port", str(port)], port, environ, log=tmp_path / "log", ready_s=900) as server,
    ):
        until(lambda: bool(fleet.pids), "the agent said nothing")
        first = server.complete(PROMPT * 6, 2)
        assert "Vulkan0" in fleet.describe().capabilities.release.why
        # Others come, and what the first left in its slot is saved to the prompt cache.
        for other in ("A recipe for bread: ", "The rules of chess: "):
            server.complete(other * 6, 1)
        until(lambda: states(fleet) != [], "nothing was saved")
        before = resident_bytes(server.pid, "Anonymous")  # the driver's code comes and goes
        assert Governor(fleet).park().problem == ""
        assert all(blob.parked for blob in states(fleet))
        n_bytes = sum(blob.n_bytes for blob in states(fleet))
        assert n_bytes > 1 << 20
        assert before - resident_bytes(server.pid, "Anonymous") >= 0.9 * n_bytes
        again = server.complete(PROMPT * 6, 2)
    assert again.text == first.text
    assert again.prompt_n < first.prompt_n  # what was parked was read back, and not computed again


def states(fleet: Fleet):
    return [blob for cache in fleet.snapshot().caches for blob in cache.blobs]
