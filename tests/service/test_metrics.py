"""Metrics: what Prometheus scrapes is what the status and the events say."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_tool import promtool
from service_help import MIB

from packages_help import Unavailable
from psi_kv_governor.service.address import Address
from psi_kv_governor.service.metrics import REASONS, Metrics, MetricsServer
from waiting import PATIENCE_S

BOARD = Path(__file__).parents[2] / "packaging" / "grafana" / "psi-kv.json"
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture
def metrics(governor):
    made = Metrics(governor)
    yield made
    made.close()


def text(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def values(metrics: Metrics) -> dict[tuple, float]:
    """By name and sorted label values."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text(metrics))
        for sample in family.samples
    }


def names(metrics: Metrics) -> set[str]:
    found = re.findall(r"^# TYPE (\S+) ", text(metrics), re.MULTILINE)
    return {name for name in found if not name.endswith("_created")}


def steps(governor, n: int) -> None:
    for _ in range(n):
        governor.step()


def test_what_stands_now_is_what_the_status_says(governor, engine, source, metrics):
    source.stall = 0.01
    steps(governor, 2)
    got, status = values(metrics), governor.status()
    assert got["psikv_stall_ratio", "machine", "some"] == pytest.approx(0.01)
    assert got["psikv_headroom_bytes", "machine"] == 6000 * MIB
    assert got["psikv_limit_bytes", "machine"] == 8000 * MIB
    assert got["psikv_resident_bytes",] == status.resident_bytes > 0
    assert got["psikv_live_bytes",] == 2500 * engine.caches[1].cell_bytes
    assert got["psikv_cells", "live", "running"] == 1500
    assert got["psikv_cells", "idle", "live"] == 1000
    assert got["psikv_sequences", "idle"] == 1
    assert [got["psikv_mode", mode] for mode in ("calm", "trimming")] == [1.0, 0.0]


def test_trims_are_counted_by_the_kind_of_their_reason_with_time_and_bytes(governor, source, metrics):
    steps(governor, 2)
    source.stall, source.headroom_bytes = 0.6, 2000 * MIB
    steps(governor, 3)
    got = values(metrics)
    assert got["psikv_trims_total", "stall"] >= 1
    assert got["psikv_returned_bytes_total", "stall"] > 0
    assert got["psikv_trims_total", "headroom"] == 0
    assert got["psikv_trim_seconds_count",] == got["psikv_trims_total", "stall"]
    assert got["psikv_reaction_seconds_count",] == 1
    assert got["psikv_written_bytes_total",] > 0
    source.stall, source.headroom_bytes = 0.0, 100 * MIB
    steps(governor, 3)
    assert values(metrics)["psikv_trims_total", "headroom"] >= 1


def test_restores_are_timed(governor, source, metrics):
    governor.trim(1.0)
    assert values(metrics)["psikv_masked_bytes",] > 0
    governor.restore()
    got = values(metrics)
    assert got["psikv_trims_total", "by_hand"] == 1
    assert got["psikv_restore_seconds_count",] == 1
    assert got["psikv_restored_bytes_total",] > 0
    assert got["psikv_masked_bytes",] == 0


def test_the_number_of_series_does_not_grow_with_what_happens(governor, source, metrics):
    steps(governor, 2)
    before = len(values(metrics))
    for stall in (0.3, 0.45, 0.6, 0.2, 0.9):
        source.stall, source.headroom_bytes = stall, 1000 * MIB
        steps(governor, 2)
    assert len(values(metrics)) == before
    assert all(("psikv_trims_total", reason) in values(metrics) for reason in REASONS)


def test_names_and_units_follow_the_rules_of_prometheus(governor, metrics):
    try:
        checker = promtool()
    except Unavailable as error:
        pytest.skip(f"promtool can't be had: {error}")
    governor.step()
    done = subprocess.run(
        [checker, "check", "metrics"], input=text(metrics), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_metric_is_in_the_docs(metrics):
    told = set(re.findall(r"`(psikv_\w+)`", DOCS.read_text()))
    assert told == names(metrics)


def test_the_board_asks_for_nothing_that_is_not_there(metrics):
    board = json.loads(BOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    known = {sample[0] for sample in values(metrics)} | names(metrics)
    used = {name for query in asked for name in re.findall(r"psikv_\w+", query)}
    assert used
    assert not used - known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert {"title", "type", "gridPos", "datasource"} <= panel.keys()


def test_grafana_s_own_models_take_the_board_and_lose_nothing_of_it():
    board = json.loads(BOARD.read_text())
    taken = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert lost(board, taken) == []


def lost(asked: object, taken: object, where: str = "") -> list[str]:
    """What is in `asked` and not, or not so, in `taken`."""
    if isinstance(asked, dict) and isinstance(taken, dict):
        return [one for key in asked for one in lost(asked[key], taken.get(key), f"{where}.{key}")]
    if isinstance(asked, list) and isinstance(taken, list) and len(asked) == len(taken):
        pairs = enumerate(zip(asked, taken, strict=True))
        return [one for number, (a, b) in pairs for one in lost(a, b, f"{where}[{number}]")]
    return [] if asked == taken else [where]


def test_prometheus_understands_every_query_of_the_board(tmp_path):
    try:
        checker = promtool()
    except Unavailable as error:
        pytest.skip(f"promtool can't be had: {error}")
    board = json.loads(BOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    rules = [
        {"record": f"a:b{n}", "expr": one.replace("$__rate_interval", "5m")} for n, one in enumerate(asked)
    ]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    done = subprocess.run(
        [checker, "check", "rules", tmp_path / "rules.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(asked)} rules found" in done.stdout


# -- the server --------------------------------------------------------------------------------------------


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        return answer.read().decode()


def test_a_scrape_over_http_while_the_governor_works(governor):
    server = MetricsServer(governor, Address("127.0.0.1", 0))
    try:
        assert "psikv_resident_bytes" in scrape(server.port)
    finally:
        server.close()
    with pytest.raises(OSError, match="refused"):
        scrape(server.port)


def test_a_port_in_use_is_an_error_and_leaves_nothing_behind(governor):
    before = set(threading.enumerate())  # one of an earlier scrape may be about to end
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        MetricsServer(governor, Address("127.0.0.1", taken.getsockname()[1]))
    assert not set(threading.enumerate()) - before
    assert not governor._bus._subscribers


def test_an_engine_that_is_gone_can_still_be_scraped(governor, engine, metrics):
    engine.close()
    assert values(metrics)["psikv_caches",] == 0
