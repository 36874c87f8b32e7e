"""Pairs of scenes, and what is made of them."""

from __future__ import annotations

import pytest

from psi_kv_governor.bench import scene_pairs
from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.record import Options
from psi_kv_governor.bench.script import SceneResult
from psi_kv_governor.errors import PsiKvError


def result(variant: Variant, tokens_per_s: float, p99_s: float | None, **others) -> SceneResult:
    seconds = others.pop("seconds", 10.0)
    values = {
        "tokens": round(tokens_per_s * seconds), "calm_tokens_per_s": 40.0, "p50_s": p99_s,
        "peak_resident_bytes": 0, "final_resident_bytes": 0, "least_resident_bytes": 0,
        "most_swapped_bytes": 0, "bytes_returned": 0, "trims": 0, "first_trim_s": None, "restored": None,
        "missing_cells": 0, "restore_s": 0.0, "restored_by_hand": False, "killed": False,
        "neighbour_killed": False, "stall": None,
    }  # fmt: skip
    return SceneResult(
        variant=variant, tokens_per_s=tokens_per_s, p99_s=p99_s, seconds=seconds, **{**values, **others}
    )


def test_the_order_changes_and_each_result_is_in_its_place():
    played: list[Variant] = []

    def play(variant: Variant) -> SceneResult:
        played.append(variant)
        return result(variant, 1.0, 0.1)

    pairs = [scene_pairs.pair_of(number, play) for number in range(4)]
    assert played == ["fixed", "psi", "psi", "fixed"] * 2
    assert all(fixed.variant == "fixed" and psi.variant == "psi" for fixed, psi in pairs)


def figures_of(*pairs):
    return {(entry.case, entry.name): entry for entry in scene_pairs.figures(pairs)}


def test_ratios_are_of_the_runs_of_one_pair():
    found = figures_of(
        (result("fixed", 4.0, 0.5), result("psi", 10.0, 0.2, first_trim_s=0.5)),
        (result("fixed", 2.0, 0.4), result("psi", 3.0, 0.1)),
        (result("fixed", 1.0, 0.2), result("psi", 4.0, 0.3)),
    )
    gain = found["", "governed over ungoverned speed"]
    share = found["", "governed over ungoverned p99"]
    assert gain.values == [2.5, 1.5, 4.0]
    assert gain.passed
    assert share.values == pytest.approx([0.4, 0.25, 1.5])
    assert share.passed
    assert found["ungoverned", "speed"].values == [4.0, 2.0, 1.0]
    assert found["governed", "first trim after"].values == [0.5]


def test_a_governed_run_that_is_no_better_fails():
    found = figures_of((result("fixed", 4.0, 0.5), result("psi", 4.1, 0.5)))
    assert found["", "governed over ungoverned speed"].passed is False
    assert found["", "governed over ungoverned p99"].passed is False
    assert ("governed", "first trim after") not in found


def test_a_run_that_decoded_nothing_counts_as_less_than_one_token():
    stood = result("fixed", 0.0, None, seconds=20.0, killed=True)
    found = figures_of((stood, result("psi", 5.0, 0.2)))
    assert found["", "governed over ungoverned speed"].values == [100.0]
    assert found["", "governed over ungoverned p99"].values == [0.01]
    assert found["ungoverned", "killed"].median == 1


def test_without_a_pen_it_is_refused_before_anything_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(scene_pairs.Pen, "available", staticmethod(lambda swap: (False, "run it as root")))
    with pytest.raises(PsiKvError, match="run it as root"):
        scene_pairs.run(Options(model=tmp_path / "any.gguf"))


def test_the_scene_is_the_demo_s_and_the_number_of_pairs_is_what_was_asked(monkeypatch, tmp_path):
    model = tmp_path / "any.gguf"
    model.write_bytes(b"")
    played = []

    def play(variant, scene, on_event):
        played.append((variant, scene.context_tokens, scene.swap))
        return result(variant, 2.0 if variant == "fixed" else 5.0, 0.1 if variant == "psi" else 0.5)

    monkeypatch.setattr(scene_pairs.Pen, "available", staticmethod(lambda swap: (True, "")))
    monkeypatch.setattr(scene_pairs, "run_scene", play)
    report = scene_pairs.run(Options(model=model, repeats=2))
    assert played == [(variant, 5000, "zram") for variant in ("fixed", "psi", "psi", "fixed")]
    assert report.passed
    assert report.header.threads == [1]
