"""What is read on several hosts, which configurations can be governed, and which versions."""

from types import SimpleNamespace

import pytest
from vllm_help import Clock, SchedulerOnPaper

from psi_kv_governor.engines.vllm import checks, scheduling, versions
from psi_kv_governor.engines.vllm.hosts import HostsSource, far_levels, with_others
from psi_kv_governor.engines.vllm.messages import About, Finished, Report
from psi_kv_governor.pressure.reading import Level, Reading

MACHINE = Level(name="machine", some=0.0, full=0.0, headroom_bytes=8 << 30, limit_bytes=16 << 30)
NEAR = Level(name="/cgroup/near", some=0.0, full=0.0, headroom_bytes=2 << 30, limit_bytes=4 << 30)
FAR = Level(name="/cgroup/far", some=0.5, full=0.2, headroom_bytes=1 << 20, limit_bytes=1 << 30)


def reading(*levels: Level) -> Reading:
    return Reading(time_s=1.0, interval_s=0.1, levels=levels, source="here")


def about(*levels: Level) -> About:
    return About("host", 1, 4096, reading=reading(*levels))


class Own:
    name = "own"
    closed = False

    def read(self):
        return reading(MACHINE, NEAR)

    def close(self):
        self.closed = True


def test_the_level_of_a_far_host_is_seen_beside_our_own():
    seen = with_others(reading(MACHINE, NEAR), {0: about(MACHINE, NEAR), 3: about(MACHINE, FAR)})
    assert [level.name for level in seen.levels] == ["machine", "/cgroup/near", "/cgroup/far of rank 3"]
    assert seen.worst is not None
    assert seen.worst.headroom_bytes == 1 << 20


def test_two_ranks_of_one_host_count_once():
    seen = with_others(reading(MACHINE), {0: about(MACHINE, FAR), 1: about(MACHINE, FAR)})
    assert len(seen.levels) == 2


def test_a_worker_without_a_reading_changes_nothing():
    assert with_others(reading(MACHINE), {0: About("host", 1, 4096)}) == reading(MACHINE)


def test_whether_there_is_anything_far_to_look_at():
    assert not far_levels((MACHINE, NEAR), {0: about(MACHINE, NEAR)})
    assert far_levels((MACHINE, NEAR), {0: about(MACHINE, NEAR), 1: about(MACHINE, FAR)})


def test_old_readings_are_left_out_and_new_ones_asked_for():
    asked, own, age = [], Own(), [0.0]
    source = HostsSource(own, lambda: {0: about(FAR)}, lambda: age[0], asked.append, lambda limit: limit // 3)
    assert len(source.read().levels) == 3
    age[0] = 60.0
    assert source.read().levels == (MACHINE, NEAR)
    assert asked == [True, False]  # soon, as long as the far host is known to be short
    source.close()
    assert own.closed


def test_an_idle_engine_looks_at_far_hosts_once_a_second_and_ten_times_where_headroom_is_low(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(scheduling, "time", clock)
    one, woken = SchedulerOnPaper(), list[int]()
    one.until_idle()
    one.side.far, one.side.wake = True, lambda: woken.append(1)
    clock.now_s += 0.3
    one.side.look_again(False)
    assert (woken, one.side.pending()) == ([], False)
    one.side.look_again(True)
    assert (woken, one.side.pending()) == ([1], True)
    one.side.look_again(False)
    clock.now_s += 1.0
    assert one.side.pending()


def test_answers_of_ranks_are_added_up():
    one = Report({1: Finished(10, 0, 5)}, {0: About("a", 1, 1)})
    two = Report({1: Finished(7, 0, 1, "full"), 2: Finished(1)}, {1: About("b", 2, 1)})
    both = one.merged(two)
    assert both.finished[1] == Finished(17, 0, 6, "full", ranks=2)
    assert both.finished[2].ranks == 1
    assert set(both.about) == {0, 1}


def config(**given):
    model = SimpleNamespace(
        enable_sleep_mode=given.get("sleep", False), enforce_eager=given.get("eager", False)
    )
    parallel = SimpleNamespace(pipeline_parallel_size=given.get("stages", 1), decode_context_parallel_size=1)
    compilation = SimpleNamespace(mode=given.get("mode", 2))
    return SimpleNamespace(model_config=model, parallel_config=parallel, compilation_config=compilation)


class MambaSpec:
    pass


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"device": "cuda"}, "on a cuda"),
        ({"sleep": True}, "sleep mode"),
        ({"stages": 2, "eager": True}, "pipeline stages"),
        ({"stages": 2, "mode": 0}, "pipeline stages"),
        ({"mamba": True}, "Mamba"),
        ({"stages": 2}, ""),
        ({"eager": True}, ""),
        ({}, ""),
    ],
)
def test_what_can_not_be_governed_is_named(given, why):
    group = SimpleNamespace(kv_cache_spec=MambaSpec() if given.get("mamba") else None)
    cache = SimpleNamespace(has_mamba_layers=False, kv_cache_groups=[group])
    told = checks.why_not(config(**given), cache, given.get("device", "cpu"))
    assert (why in told) if why else told == ""


@pytest.mark.parametrize(
    ("text", "usable"),
    [("0.31.0", True), ("0.32.0+cpu", True), ("1.2", True), ("0.30.9", False), ("", False)],
)
def test_which_versions_are_usable(text, usable):
    assert (versions.why_not(text) == "") is usable


def test_a_development_version_is_read_by_its_numbers():
    assert versions.version_of("0.33.0rc1.dev12+g0a1b2c") == (0, 33)
    assert versions.doubt("0.33.0rc1.dev12")
    assert not versions.doubt("0.32.1")
