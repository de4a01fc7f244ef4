"""Whole pruning runs: saving, continuing, rewinding, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from imp_training import Training, fresh, same, small_net
from torch import nn

from opentrans import MaskedOptimizer
from opentrans.imp import ImpConfig, ImpSchedule, NotFiniteLoss, Pruner, iterative_magnitude_pruning
from opentrans.state import random_states, set_random_states
from opentrans_kernels.errors import CheckpointError, MaskError, OpenTransError, PlanError
from opentrans_kernels.masks import MaskSet


def test_a_whole_run(tmp_path: Path) -> None:
    training, seen = fresh(), []
    result = training.run(tmp_path / "run", on_progress=seen.append, synthetic=True)
    total = 8 * 16 * 9 + 16 * 6
    expected = list(ImpSchedule(5, 0.3, period=3).kept(total))
    assert [r.kept for r in result.records] == expected
    assert training.seen == list(range(15)) and len(seen) == 15
    assert [p.step for p in seen if p.record is not None] == [3, 6, 9, 12, 15]
    assert seen[-1].density == result.masks.density() == expected[-1] / total
    previous = None
    for record in result.records:
        path = tmp_path / "run" / f"round-{record.round:03d}.safetensors"
        masks = MaskSet.load(path)
        assert masks.nnz == record.kept and masks.source.synthetic
        notes = masks.source.notes
        assert notes["round"] == str(record.round) and "rate 0.3" in notes["rule"]
        assert float(notes["density"]) == pytest.approx(record.density, abs=1e-6)
        if previous is not None:
            assert not any(bool((masks.masks[n] & ~previous[n]).any()) for n in masks.masks)
        previous = masks.masks
        for name, share in record.layers.items():
            assert share == pytest.approx(float(masks.masks[name].float().mean()))
    zeros = MaskSet.from_model_zeros(training.model).masks
    assert all(torch.equal(zeros[n], previous[n]) for n in previous)
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert [r["kept"] for r in log["rounds"]] == expected and log["config"]["rate"] == 0.3
    assert "round" in str(result) and len(str(result).splitlines()) == 7
    assert not list((tmp_path / "run").glob(".*")), "temporary files are left"


@pytest.mark.parametrize("stop_at", [0, 2, 3, 7, 14])
@pytest.mark.parametrize("rewind", [None, 2])
def test_a_continued_run_is_the_same_run(tmp_path: Path, stop_at: int, rewind: int | None) -> None:
    whole = fresh()
    expected = whole.run(rewind=rewind)
    with pytest.raises(KeyboardInterrupt):
        fresh(stop_at=stop_at).run(tmp_path / "run", rewind=rewind)
    again = Training()
    torch.manual_seed(99)  # the state of the run is used, not this one
    result = again.run(tmp_path / "run", rewind=rewind)
    assert again.seen[0] == stop_at // 3 * 3
    assert same(again.model, whole.model)
    assert result.masks.content_hash() == expected.masks.content_hash()
    assert [r.loss for r in result.records] == [r.loss for r in expected.records]
    assert again.schedule.state_dict() == whole.schedule.state_dict()
    # Finished: nothing more is trained, and the result is the same.
    third = Training()
    assert third.run(tmp_path / "run", rewind=rewind).masks.content_hash() == (
        expected.masks.content_hash()
    )
    assert third.seen == [] and same(third.model, whole.model)


def test_rewinding_puts_the_early_weights_back(tmp_path: Path) -> None:
    training = fresh()
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def look(progress: object) -> None:
        kept[progress.step] = {k: v.clone() for k, v in training.model.state_dict().items()}
        if progress.record is not None:
            assert not training.optimizer.state, "momentum of other weights stayed"

    result = training.run(rewind=1, rounds=2, on_progress=look)
    for step, number in ((3, 1), (6, 2)):
        assert number == result.records[number - 1].round
        for name, value in kept[step].items():
            early = kept[1][name]
            mask = result.masks.masks.get(name.removesuffix(".weight"))
            if mask is None or number == 1:
                assert torch.equal(value[value != 0], early[value != 0])
            else:
                assert torch.equal(value, early * mask)


def test_a_loss_that_is_not_a_number_keeps_the_rounds_before(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteLoss, match="Saved up to round 2 in .*run"):
        fresh(nan_at=7).run(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").glob("round-*")) == [
        "round-001.safetensors",
        "round-002.safetensors",
    ]
    again = Training()
    again.run(tmp_path / "run")
    assert again.seen[0] == 6
    with pytest.raises(NotFiniteLoss, match="lower learning rate"):
        fresh(nan_at=0).run()


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fresh(stop_at=8).run(tmp_path / "run", run_config={"lr": 0.01})
    before = (tmp_path / "run" / "state.pt").read_bytes()
    for options, words in (
        ({"rate": 0.2}, "rate is 0.3 in the run, 0.2 now"),
        ({"allocation": "uniform"}, "allocation is 'global' in the run, 'uniform' now"),
        ({"rewind": 0}, "rewind is None in the run, 0 now"),
        ({"run_config": {"lr": 0.1}}, "extra.lr is 0.01 in the run, 0.1 now"),
        ({"run_config": {}}, "extra.lr is 0.01 in the run, None now"),
        ({"scope": ["3"]}, r"the scope differs in 1 of 1 convolutions \(\['5'\]\)"),
    ):
        training = Training()
        start = {k: v.clone() for k, v in training.model.state_dict().items()}
        with pytest.raises(PlanError, match=words + ".*Continue with the settings of the run"):
            training.run(tmp_path / "run", **{"run_config": {"lr": 0.01}, **options})
        assert all(torch.equal(v, start[k]) for k, v in training.model.state_dict().items())
    mask = {"3": torch.rand(16, 8, 3, 3) > 0.3}
    with pytest.raises(PlanError, match="the masks to start from differ"):
        Training().run(tmp_path / "run", run_config={"lr": 0.01}, masks=MaskSet(mask))
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fresh(stop_at=4).run(tmp_path / "run")
    other = Training()
    other.model[1] = nn.Identity()
    with pytest.raises(CheckpointError, match="Continue with the model of the run"):
        other.run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="the same extras"):
        iterative_magnitude_pruning(
            small_net(), lambda m, i: None, rounds=5, rate=0.3, period=3, out_dir=tmp_path / "run",
            optimizer=torch.optim.SGD(small_net().parameters(), lr=1),
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="the way it was started"):
        iterative_magnitude_pruning(
            small_net(), lambda m, i: None, rounds=5, rate=0.3, period=3, out_dir=tmp_path / "run"
        )


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="start one with resume=None"):
        Training().run(tmp_path / "none", resume=True)
    with pytest.raises(CheckpointError, match="whose parent exists"):
        Training().run(tmp_path / "no" / "parent")
    fresh().run(tmp_path / "run", rounds=1)
    with pytest.raises(CheckpointError, match="name a new folder"):
        Training().run(tmp_path / "run", rounds=1, resume=False)
    state = tmp_path / "run" / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        Training().run(tmp_path / "run", rounds=1)
    state.write_bytes(b"")
    with pytest.raises(CheckpointError):
        Training().run(tmp_path / "run", rounds=1)
    torch.save({"version": 99}, state)
    with pytest.raises(CheckpointError, match="pass"):
        Training().run(tmp_path / "run", rounds=1)
    state.unlink()
    with pytest.raises(CheckpointError, match="pass masks= to start from one of them"):
        Training().run(tmp_path / "run", rounds=1)


def test_state_that_could_not_be_loaded_again_is_refused(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, object]:
            return {"path": Path("x")}

    with pytest.raises(OpenTransError, match="extras/odd/path is a .*Path.*plain values"):
        iterative_magnitude_pruning(
            small_net(), lambda m, i: None, out_dir=tmp_path / "run", extras={"odd": Odd()}
        )
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_foreign_loop_with_its_own_checkpoints() -> None:
    """What a training framework does: steps from outside, state in its own checkpoint."""
    config = ImpConfig(ImpSchedule(rounds=3, rate=0.4, period=2), rewind=1)

    def drive(training: Training, pruner: Pruner, steps: range) -> None:
        for iteration in steps:
            pruner.after_step(iteration + 1, training.step(training.model, iteration))

    whole = fresh()
    expected = Pruner(whole.model, config, optimizer=whole.optimizer)
    drive(whole, expected, range(8))
    first = fresh()
    pruner = Pruner(first.model, config, optimizer=first.optimizer)
    drive(first, pruner, range(3))
    saved = (pruner.state_dict(), first.model.state_dict(), first.optimizer.state_dict())
    schedule, states = first.schedule.state_dict(), random_states()
    second = Training()
    second.model.load_state_dict(saved[1])
    second.optimizer.load_state_dict(saved[2])
    second.schedule.load_state_dict(schedule)
    again = Pruner(second.model, config, optimizer=second.optimizer)
    again.load_state_dict(saved[0])
    set_random_states(states)
    drive(second, again, range(3, 8))
    assert again.masks.content_hash() == expected.masks.content_hash()
    assert same(second.model, whole.model) and again.finished


def test_settings_that_could_not_be_kept() -> None:
    with pytest.raises(PlanError, match="numbers, text, lists and dicts only"):
        Training().run(run_config={"lr": object()})


def test_broken_weights_are_refused_at_the_start() -> None:
    training = Training()
    training.model[3].weight.data[0] = torch.inf
    with pytest.raises(MaskError, match="magnitudes cannot be ranked"):
        training.run()


@pytest.mark.parametrize("rewind", [None, 0])
def test_an_optimizer_of_live_weights_follows_the_rounds(rewind: int | None) -> None:
    model = small_net()
    names = ("3", "5")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    ones = {n: torch.ones_like(model.get_submodule(n).weight) for n in names}
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, ones, lr=0.01, weight_decay=0.1)
    schedule = ImpSchedule(3, 0.3, period=2)
    pruner = Pruner(model, ImpConfig(schedule, rewind=rewind), optimizer=optimizer)
    for step in range(1, 9):
        optimizer.zero_grad()
        (model(torch.randn(2, 3, 6, 6)) - 1).pow(2).mean().backward()
        optimizer.step()
        record = pruner.after_step(step)
        for name in names:
            weight, mask = model.get_submodule(name).weight, pruner.masks.masks[name]
            assert torch.count_nonzero(weight[~mask]) == 0, f"regrown after step {step}"
            if rewind is not None and record is not None:
                assert torch.equal(weight[mask], start[f"{name}.weight"][mask])
    assert pruner.finished and pruner.kept < pruner.total


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def _turn(content: Any) -> None:
    """Another mask: one weight out, one in."""
    bits = content["pruner"]["masks"]["3"]
    odd = next(i for i, byte in enumerate(bits.tolist()) if byte not in (0, 255))
    kept = format(int(bits[odd]), "08b")
    bits[odd] = int(kept[1:] + kept[0], 2) if kept[1:] + kept[0] != kept else 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_turn, "masks do not have the recorded hash"),
        (lambda c: (c["pruner"].pop("digest"), c["pruner"]["masks"]["3"].zero_()), "masks keep"),
        (lambda c: c.pop("pruner"), "entry 'pruner' is missing"),
        (lambda c: c.pop("random"), "entry 'random' is missing"),
        (lambda c: c["pruner"].pop("config"), "entry 'config' is missing"),
        (lambda c: c["pruner"].pop("records"), "entry 'records' is missing"),
        (lambda c: c["pruner"].__setitem__("steps", -1), "entry 'steps' is -1"),
        (lambda c: c["pruner"].__setitem__("losses", ["a"]), "entry 'losses' is"),
        (lambda c: c["pruner"]["records"][0].pop("kept"), "entry 'kept' is missing"),
        (lambda c: c["pruner"]["records"][0].__setitem__("layers", 3), "entry 'layers' is 3"),
        (lambda c: c["pruner"]["masks"].pop("3"), "masks and their shapes disagree"),
        (
            lambda c: c["pruner"]["masks"].__setitem__("3", torch.ones(2, dtype=torch.uint8)),
            "does not have its shape",
        ),
        (lambda c: c["extras"].__setitem__("schedule", 1), "state of 'schedule' cannot"),
        (lambda c: c["optimizer"].pop("state"), "another optimizer, or is damaged"),
        (lambda c: c["random"].__setitem__("torch", torch.zeros(3)), "random states cannot"),
        (lambda c: c.__setitem__("version", 10**400), "version 1000"),
    ],
)
def test_a_damaged_state_is_one_clear_error(
    change: Callable[[Any], Any], words: str, tmp_path: Path
) -> None:
    fresh().run(tmp_path / "run", rounds=1)
    _edit(tmp_path / "run" / "state.pt", change)
    with pytest.raises(CheckpointError, match=words):
        fresh().run(tmp_path / "run", rounds=1)


def test_three_flipped_bits_do_not_lead_to_other_masks(tmp_path: Path) -> None:
    """One in the pickle, two in the masks; with and without checksums in the archive."""
    fresh().run(tmp_path / "run", rounds=1)
    path = tmp_path / "run" / "state.pt"
    content = torch.load(path, weights_only=True)
    bits = content["pruner"]["masks"]["3"].numpy().tobytes()
    plain = path.read_bytes()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(True)
    for saved, words in ((plain, "checksum"), (path.read_bytes(), "recorded hash")):
        data = bytearray(saved)
        at = data.index(bits)
        data[at] ^= 1
        data[at + 1] ^= 1
        if words == "checksum":
            data[data.index(b"seconds")] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=words):
            fresh().run(tmp_path / "run", rounds=1)
