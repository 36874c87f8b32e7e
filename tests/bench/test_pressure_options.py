"""What the pressure benchmark takes, refuses, and in which order it plays."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.sandbox.scene_options import CALM_TOKENS
from psikv_bench.messages import VARIANTS
from psikv_bench.options import chosen as chosen_options
from psikv_bench.pressure import setting
from psikv_bench.pressure.options import PressureOptions, turns
from psikv_bench.pressure.setting import (
    Size,
    choose_setting,
    is_judged,
    limit_for,
    mapped_by_others,
    remarks,
    scene_of,
)

SIZE = Size(resident_bytes=265 * MIB, weights_bytes=94 * MIB, cell_bytes=23_040)


def options(**given) -> PressureOptions:
    return chosen_options(PressureOptions(model="model.gguf"), given)


class TestOptions:
    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"n_predict": 0}, "--n-predict 0 is not usable"),
            ({"pressure_mib": -1}, "--pressure-mib -1"),
            ({"pressure_step_mib": 0}, "--pressure-step-mib 0"),
            ({"pressure_warmup_s": float("nan")}, "--pressure-warmup-s nan"),
            ({"variant_cooldown_s": float("inf")}, "--variant-cooldown-s inf"),
            ({"memory_limit_mib": 1}, "--memory-limit-mib 1"),
            ({"ctx_size": 100}, "--ctx-size 100 is too small"),
            ({"prompt_tokens": 4090}, "--prompt-tokens 4090"),
            ({"keep": 2000, "tail": 3000}, "protect all of the prompt"),
            ({"variants": ()}, "--variants"),
            ({"variants": ("psi", "psi")}, "--variants"),
            ({"isolate": "host", "memory_limit_mib": 400}, "--memory-limit-mib needs a cgroup"),
            ({"pressure_rate_mib_s": 5.0}, "--load ramp"),
        ],
    )
    def test_what_makes_no_sense_is_refused_by_its_option(self, given, words):
        with pytest.raises(BadInputError) as caught:
            options(**given)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_prompt_fills_what_is_not_decoded(self):
        given = options(ctx_size=2048, n_predict=100)
        assert given.prompt + 100 + CALM_TOKENS + 1 == 2048
        assert options(prompt_tokens=700).prompt == 700


class TestOrder:
    def test_fixed_first_and_psi_first_are_each_other_s_reverse(self):
        assert turns(options(repeats=2)) == [("fixed", "reference", "psi")] * 2
        assert turns(options(repeats=2, variant_order="psi-first")) == [("psi", "reference", "fixed")] * 2

    def test_variants_keep_their_order_however_they_are_named(self):
        assert turns(options(variants=("psi", "fixed"), repeats=1)) == [("fixed", "psi")]

    @given(st.integers(0, 10**6), st.integers(1, 12), st.sets(st.sampled_from(VARIANTS), min_size=1))
    def test_random_plays_each_variant_once_a_repeat_and_the_same_for_a_seed(self, seed, repeats, variants):
        given = options(variant_order="random", seed=seed, repeats=repeats, variants=tuple(variants))
        played = turns(given)
        assert [Counter(order) for order in played] == [Counter(variants)] * repeats
        assert played == turns(given)

    def test_random_is_not_one_order_again_and_again(self):
        assert len(set(turns(options(variant_order="random", repeats=20)))) > 2


class TestLimit:
    @given(
        st.integers(50, 8000), st.integers(50, 500), st.integers(1000, 500_000),
        st.integers(512, 65_536), st.integers(1, 20_000),
    )  # fmt: skip
    def test_the_model_alone_fits_and_with_the_load_it_does_not(self, weights, other, cell, cells, mib):
        resident_bytes = (weights + other) * MIB + cell * cells
        size = Size(resident_bytes=resident_bytes, weights_bytes=weights * MIB, cell_bytes=cell)
        asked = options(ctx_size=cells, n_predict=1, keep=1, tail=1, pressure_mib=mib)
        try:
            limit = limit_for(size, asked)
        except BadInputError as error:
            enough = int(re.search(r"give (\d+) or more", str(error))[1])
            assert enough > mib
            limit = limit_for(size, structs.replace(asked, pressure_mib=enough))
            mib = enough
        assert resident_bytes < limit
        assert limit < (weights + mib) * MIB + cell * cells + other * MIB / 4

    def test_the_demo_model_s_limit_leaves_the_governor_something_and_plain_llama_none(self):
        free = limit_for(SIZE, options()) - 250 * MIB - SIZE.weights_bytes
        cache = 4096 * SIZE.cell_bytes
        assert 0.2 * cache + 16 * MIB < free < cache

    def test_without_swap_the_trimmed_cache_fits_beside_all_that_can_t_go_and_the_whole_one_does_not(self):
        free = limit_for(SIZE, options(swap="none")) - 250 * MIB - SIZE.resident_bytes
        assert free == pytest.approx(-0.4 * 4096 * SIZE.cell_bytes, abs=1)

    def test_without_a_neighbour_there_is_plenty(self):
        assert limit_for(SIZE, options(pressure_mib=0)) == 2 * SIZE.resident_bytes


@pytest.fixture
def machine(monkeypatch):
    """What sandboxes this machine can make, by the swap that is asked for."""
    able = {"zram": (True, ""), "none": (True, "")}
    monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": able[swap]))
    monkeypatch.setattr(setting, "size_of", lambda *_, **__: SIZE)
    return able


class TestSetting:
    def test_the_limit_is_chosen_by_the_model_s_size(self, machine, tmp_path):
        chosen = choose_setting(options())
        assert (chosen.isolate, chosen.swap, chosen.limit_bytes) == (
            "cgroup",
            "zram",
            limit_for(SIZE, options()),
        )
        scene = scene_of(options(), chosen, tmp_path)
        assert (scene.setup.cells, scene.setup.context_tokens) == (4096, options().prompt)
        assert scene.limit_bytes == chosen.limit_bytes
        assert dict(zip(scene.neighbour[-10::2], scene.neighbour[-9::2], strict=True)) == {
            "--mib": "250", "--step-mib": "25", "--rate-mib-s": "0.0", "--seed": "1", "--folder": "",
        }  # fmt: skip

    def test_a_limit_that_is_given_needs_no_run_of_the_model(self, machine, monkeypatch):
        monkeypatch.setattr(setting, "size_of", None)
        assert choose_setting(options(memory_limit_mib=400)).limit_bytes == 400 * MIB

    def test_the_governor_gets_what_the_reference_keeps(self, machine):
        chosen = choose_setting(options(keep=32, tail=128))
        assert (chosen.governor["sink_cells"], chosen.governor["window_cells"]) == (32, 128)

    def test_auto_does_without_a_cgroup_and_says_so(self, machine, monkeypatch):
        machine["none"] = machine["zram"] = (False, "no right: run it as root")
        monkeypatch.setattr(setting, "outside_bytes", lambda: 100 * MIB)
        chosen = choose_setting(options())
        assert (chosen.isolate, chosen.limit_bytes, chosen.swap) == ("host", None, None)
        assert chosen.pressure_bytes == 100 * MIB
        first, second = remarks(options(), chosen)
        assert first.startswith("NOT ISOLATED")
        assert "run it as root" in first
        assert "100 MiB of the 250 MiB" in second

    @pytest.mark.parametrize(
        ("given", "judged"),
        [
            ({}, True),
            ({"pressure_mib": 0, "swap": "none"}, True),
            ({"load": "files"}, False),
            ({"swap": "none"}, False),
            ({"isolate": "host"}, False),
        ],
    )
    def test_a_verdict_is_given_only_on_what_was_asked(self, machine, given, judged):
        asked = options(**given)
        chosen = choose_setting(asked)
        assert is_judged(asked, chosen) is judged
        assert bool(list(remarks(asked, chosen))) is not judged

    def test_a_neighbour_that_reads_files_makes_them_where_the_report_goes(self, machine, tmp_path):
        given = options(load="files")
        assert scene_of(given, choose_setting(given), tmp_path).neighbour[-2:] == ("--folder", str(tmp_path))


def test_who_else_has_the_model_mapped_is_found(tmp_path):
    model = tmp_path / "model.gguf"
    for pid, line in (
        (7, f"7f00-7f01 r--s 0 fe:00 11    {model}\n"),
        (8, "7f00-7f01 r--s 0 fe:00 12 /lib/x\n"),
    ):
        folder = tmp_path / "proc" / str(pid)
        folder.mkdir(parents=True)
        (folder / "maps").write_text("00400000-00401000 r-xp 0 fe:00 1 /bin/any\n" + line)
        (folder / "comm").write_text("server\n")
    assert list(mapped_by_others(model, tmp_path)) == [(7, "server")]
    assert list(mapped_by_others(Path("/else"), tmp_path)) == []
