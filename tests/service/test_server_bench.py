"""The scene of `psi-kv bench server`, small: one dies of its limit at once, the other serves."""

from __future__ import annotations

import json
import subprocess

import pytest
from servers import PSI_KV

from waiting import PATIENCE_S


@pytest.mark.llama
@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_a_limit_that_kills_the_server_at_its_start_the_governed_one_serves(
    python_of_servers, shallow_model, tmp_path
):
    # Whether it is as fast is for a quiet machine: the exit status says that too.
    out = tmp_path / "out"
    # A cache of 150 MB, all of it touched by a plain server as it starts.
    model = ["--model", str(shallow_model), "--limit-mib", "140"]
    command = [*PSI_KV, "bench", "server", "--quick", *model, "--out-dir", str(out)]
    subprocess.run(command, check=False)
    report = json.loads((out / "result.json").read_text())
    plain, governed = report["rows"]
    assert plain["kills"] >= 1
    assert plain["died"] == "starting"
    assert (governed["kills"], governed["died"]) == (0, "")
    assert governed["return_prompt_n"] == [2, 2]
    calm = {
        one["case"]: len(one["values"]) for one in report["figures"] if one["case"].startswith("with room")
    }
    assert calm == {"with room, one-shot": 2, "with room, return": 2}
    assert (out / "server.png").stat().st_size > 1000
    subprocess.run([*command, "--calm-pairs", "0", "--resume"], check=False, timeout=PATIENCE_S)
    assert json.loads((out / "result.json").read_text())["rows"] == [plain, governed]
