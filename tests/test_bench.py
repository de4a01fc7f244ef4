"""Timing, core check, environment limits, dense variants and the trunk benchmark."""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from opentrans_kernels.bench import cores, environment, part, subject, timing, trunk, variants
from opentrans_kernels.errors import OpenTransError

TINY = "torchvision:resnet18"


@pytest.fixture(scope="module")
def tiny() -> subject.Subject:
    return subject.load_subject("uniform:0.80", arch=TINY)


def test_spread_is_median_and_quartiles() -> None:
    spread = timing.Spread.of([4, 1, 3, 2, 5])
    assert (spread.median, spread.q1, spread.q3, spread.iqr, spread.n) == (3, 2, 4, 2, 5)
    assert timing.Spread.of([7]).q3 == 7
    with pytest.raises(OpenTransError, match="at least 1 round"):
        timing.Spread.of([])


def test_rounds_rotate_and_every_turn_settles() -> None:
    calls: list[str] = []
    work = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    prepared: list[str] = []
    table = timing.interleave(
        work,
        rounds=3,
        warmup_s=0,
        settle=1,
        min_sample_ms=0,
        before={"b": lambda: prepared.append("b")},
    )
    warm = ["a"] * 2 + ["b"] * 2 + ["c"] * 2
    assert calls == warm + [name for order in ("abc", "bca", "cab") for name in order for _ in "12"]
    assert len(prepared) == 4  # warm-up and three rounds
    assert all(len(table[name].wall_ms) == len(table[name].cpu_ms) == 3 for name in "abc")


def test_small_functions_are_repeated_within_a_sample() -> None:
    table = timing.interleave({"nothing": lambda: None}, rounds=1, warmup_s=0, min_sample_ms=1)
    assert table["nothing"].calls_per_sample > 100
    assert table["nothing"].wall.median < 1


def test_sleep_is_wall_time_and_not_cpu_time() -> None:
    table = timing.interleave(
        {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.01)},
        rounds=3,
        warmup_s=0,
    )
    assert 1.3 < table.ratio("slow", "fast").median < 2.6
    assert table.fastest(["slow", "fast"]) == "fast"
    assert table["slow"].cpu.median < 0.5 * table["slow"].wall.median
    assert table["slow"].contended_share() == 1.0


def test_ratio_is_taken_within_rounds() -> None:
    # The machine slows down threefold after round 1: the ratio of medians would say 1.5.
    slow = timing.Timing("slow", 1, [2, 6, 6], [2, 6, 6])
    fast = timing.Timing("fast", 1, [1, 3, 3], [1, 3, 3])
    table = timing.TimingTable({"slow": slow, "fast": fast}, 3, 0)
    assert table.ratio("slow", "fast").to_dict()["iqr"] == 0
    assert table.ratio("slow", "fast").median == 2


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(OpenTransError, match="rounds >= 1"):
        timing.interleave({}, rounds=1)
    with pytest.raises(OpenTransError, match="rounds=0"):
        timing.interleave({"a": lambda: None}, rounds=0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_pinning_and_its_errors() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        assert timing.pin([min(allowed)]) == [min(allowed)]
        with pytest.raises(OpenTransError, match="Choose among those"):
            timing.pin([max(allowed) + 1])
        with pytest.raises(OpenTransError, match="at most 1 threads"):
            timing.choose_cpus(2)
    finally:
        os.sched_setaffinity(0, allowed)
    assert timing.choose_cpus(1) == [max(allowed)]


def test_core_verdicts() -> None:
    assert cores.judge(0.97) == "two physical cores"
    assert cores.judge(0.52).startswith("one shared core")
    assert cores.judge(0.78) == "unclear"
    for wrong in ([0], [0, 0], [0, 1, 2]):
        with pytest.raises(OpenTransError, match="two CPU numbers"):
            cores.physical_core_check(wrong)
    with pytest.raises(OpenTransError, match="Choose two of those"):
        cores.physical_core_check([0, 100_000])


def test_core_check_measures_two_loops() -> None:
    cpus = timing.available_cpus()
    if cpus is None or len(cpus) < 2:
        pytest.skip("fewer than two CPUs are available")
    check = cores.physical_core_check(cpus[:2], seconds=0.05, repeats=1)
    assert min(check.alone_gflops) > 0.1 and min(check.together_gflops) > 0.01
    assert check.rate_ratio == pytest.approx(sum(check.together_gflops) / sum(check.alone_gflops))
    assert check.verdict == cores.judge(check.rate_ratio)
    assert check.verdict in str(check)


def test_a_dead_core_worker_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    cpus = timing.available_cpus()
    if cpus is None or len(cpus) < 2:
        pytest.skip("fewer than two CPUs are available")
    with pytest.raises(OpenTransError, match="ended early"):
        cores.physical_core_check(cpus[:2])


def test_isa_limits_cover_both_sides() -> None:
    limits = environment.isa_environment("avx2", 2)
    assert limits["ATEN_CPU_CAPABILITY"] == limits["OPENTRANS_CPU_CAPABILITY"] == "avx2"
    assert limits["ONEDNN_MAX_CPU_ISA"] == limits["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert limits["OMP_NUM_THREADS"] == "2"
    assert environment.missing_limits("avx2", 2, limits) == []
    wrong = {**limits, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    assert environment.missing_limits("avx2", 2, wrong) == ["ONEDNN_MAX_CPU_ISA"]
    with pytest.raises(OpenTransError, match="Use one of native, avx2, avx512"):
        environment.isa_environment("sse9", 1)
    assert set(environment.SIMD_BITS) == set(environment.ISAS)


def test_an_instruction_set_that_the_cpu_lacks_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(environment.subprocess, "Popen", refuse)
    monkeypatch.setattr(environment, "machine", lambda: {"cpu": "Test", "flags": ["avx2", "fma"]})
    with pytest.raises(OpenTransError) as info:
        environment.rerun(["-m", "opentrans", "bench", "trunk"], "avx512", 1)
    text = str(info.value)
    assert "--isa avx512" in text and "no avx512f" in text and "native, avx2" in text
    assert "OPENTRANS_CPU_CAPABILITY" not in text
    environment.check_isa("avx2")
    monkeypatch.setattr(environment, "machine", lambda: {"cpu": "Test", "flags": []})
    environment.check_isa("avx512")  # flags are not known: the kernels will tell


def test_a_limited_process_reports_the_limit() -> None:
    if "avx2" not in environment.machine()["flags"]:
        pytest.skip("this CPU has no AVX2")
    code = (
        "import json; from opentrans_kernels.bench import environment as e;"
        "print(json.dumps([e.environment_block(), e.onednn_isa()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment.isa_environment("avx2", 1)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode and "without compiled kernels" in done.stderr:
        pytest.skip("the extension is not built")
    block, onednn = json.loads(done.stdout)
    assert block["torch_cpu_capability"] == "AVX2"
    assert block["opentrans_cpu_capability"] in ("avx2", None)
    assert block["limits"]["ATEN_CPU_CAPABILITY"] == "avx2"
    if torch.backends.mkldnn.is_available():
        assert "AVX2" in onednn and "AVX-512" not in onednn


def test_environment_names_versions_and_no_host() -> None:
    block = environment.environment_block()
    assert (
        block["versions"]["torch"] == torch.__version__.split("+")[0] or block["versions"]["torch"]
    )
    assert block["machine"]["cpus"] == os.cpu_count()
    host = platform.node()
    assert len(host) < 4 or host not in json.dumps(block["machine"])


def test_frozen_evidence_reads_the_generated_code() -> None:
    frozen = """
    def call(self, args):
        arg7_1, = args
        buf1 = torch.ops.mkldnn._convolution_pointwise.default(buf0, _frozen_param18)
    """
    found = variants.frozen_evidence([frozen])
    assert found["frozen"] and found["inputs"] == 1 and found["prepacked_convolutions"] == 1
    loose = frozen.replace("arg7_1, = args", "arg0_1, arg1_1, arg7_1 = args")
    assert variants.frozen_evidence([loose])["inputs"] == 3
    assert not variants.frozen_evidence([loose])["frozen"]
    assert not variants.frozen_evidence([frozen + "\n rsqrt(x)"])["frozen"]
    assert not variants.frozen_evidence([])["frozen"]


class ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


def test_compile_really_freezes() -> None:
    model = ConvNorm().eval().requires_grad_(False)
    x = torch.randn(1, 3, 9, 9)
    run, evidence = variants._freeze_compile(model, x, None)
    assert evidence["frozen"], evidence
    assert evidence["prepacked_convolutions"] == 1
    torch.testing.assert_close(run(), model(x))


def test_folding_is_exact_and_complete(tiny: subject.Subject) -> None:
    tower = tiny.masked_copy().double()
    x = torch.randn(1, 3, 40, 33, dtype=torch.float64)
    expected = part.TrunkModule(tower)(x)
    folded = copy.deepcopy(tower)
    module = part.TrunkModule(folded)
    variants.fold_batch_norms_(folded)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in module.modules())
    assert variants.relative_error(module(x), expected) < 1e-12
    assert any(isinstance(one, nn.BatchNorm2d) for one in tower.modules())


def test_eager_variants_compute_the_masked_trunk(tiny: subject.Subject) -> None:
    masked = tiny.masked_copy()
    x = torch.randn(1, 3, 32, 32)
    names = ["eager", "eager_channels_last", "folded", "folded_channels_last"]
    reference = part.TrunkModule(copy.deepcopy(masked).double())(x.double())
    built = variants.build_variants(masked, x, names)
    assert [variant.name for variant in built] == names
    for variant in built:
        assert variant.error is None
        assert variants.relative_error(variant.run(), reference) < 1e-4
    dense = part.TrunkModule(tiny.model)(x)
    assert variants.relative_error(dense, reference) > 1e-2, "the masks changed nothing"


def test_a_failing_variant_keeps_its_reason(
    tiny: subject.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler found")

    recipe = variants.Recipe("jit_optimized", "broken on purpose", broken)
    monkeypatch.setattr(variants, "RECIPES", (*variants.RECIPES[:1], recipe))
    built = variants.build_variants(tiny.model, torch.randn(1, 3, 32, 32), ["eager", recipe.name])
    assert built[0].run is not None
    assert built[1].run is None and built[1].error == "RuntimeError: no compiler found"
    with pytest.raises(OpenTransError, match="Choose among: eager"):
        variants.build_variants(tiny.model, torch.randn(1, 3, 32, 32), ["warp"])


def fake_table() -> timing.TimingTable:
    times = {"accelerated": [10.0, 10.0], "eager": [60.0, 60.0], "compile": [40.0, 44.0]}
    return timing.TimingTable(
        {name: timing.Timing(name, 1, list(ms), list(ms)) for name, ms in times.items()}, 2, 0
    )


def test_summary_takes_the_best_dense_variant() -> None:
    built = [
        variants.Variant("eager", run=lambda: torch.zeros(1)),
        variants.Variant("compile", run=lambda: torch.zeros(1), detail={"frozen": True}),
        variants.Variant("jit_optimized", error="RuntimeError: gone"),
    ]
    result = trunk.summarise(fake_table(), built, {"eager": 1e-6, "compile": 2e-6}, 1.5e-6)
    assert result["baseline"]["name"] == "compile" and result["baseline"]["ms"] == 42
    assert result["accelerated"]["ms"] == 10
    assert result["speedup"] == 4.0, "a round that took place: of two the lower"
    assert result["median_round"] == {"baseline_ms": 40.0, "ms": 10.0}
    assert result["variants"]["eager"]["speedup_of_accelerated"]["median"] == pytest.approx(6)
    assert result["variants"]["compile"]["frozen"]
    gone = result["variants"]["jit_optimized"]
    assert gone == {"available": False, "error": "RuntimeError: gone"}


def test_trunk_refuses_an_unlimited_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    with pytest.raises(OpenTransError, match="opentrans bench trunk"):
        trunk.TrunkOptions(isa="avx2").check()
    with pytest.raises(OpenTransError, match="height is 0"):
        trunk.TrunkOptions(height=0).check()


def test_trunk_benchmark_end_to_end(tiny: subject.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.isa_environment("native", 1).items():
        monkeypatch.setenv(name, value)
    options = trunk.TrunkOptions(
        height=40, width=48, rounds=2, warmup_s=0, variants=("eager", "folded"), layers=False
    )
    result = trunk.run(tiny, options)
    assert result["input"] == [1, 3, 40, 48] and result["threads"] == 1
    assert result["baseline"]["name"] in ("eager", "folded")
    assert result["exact"], (result["max_rel_err"], result["dense_own_rel_err"])
    assert 0 < result["dense_own_rel_err"] < 1e-4
    assert result["speedup"] > 0 and result["mask"]["synthetic"]
    assert result["variants"]["eager"]["wall"]["n"] == 2
