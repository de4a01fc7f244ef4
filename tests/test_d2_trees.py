"""The three published systems, real code and random weights, one process each.

They run where OPENTRANS_TREES names a folder with checkouts of detectron2, fc-clip and OpenTrans;
elsewhere one line says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("d2_tree_run.py")
TREES = {"fc-clip": "fc-clip", "han": "OpenTrans", "deeplab": "OpenTrans"}
TOWERS = {
    "fc-clip": ("backbone.clip_model.visual", "open_clip"),
    "han": ("backbone", "openai"),
    "deeplab": ("backbone", "torchvision"),
}


def missing(tree: str) -> str:
    folder = os.environ.get("OPENTRANS_TREES")
    if not folder:
        return "OPENTRANS_TREES is not set: no checkouts of detectron2, fc-clip and OpenTrans"
    absent = [n for n in ("detectron2", TREES[tree]) if not (Path(folder) / n).is_dir()]
    return f"OPENTRANS_TREES={folder} has no {', '.join(absent)}" if absent else ""


@pytest.mark.slow
@pytest.mark.parametrize("tree", list(TREES))
def test_the_accelerated_model_is_the_masked_dense_one(tree: str) -> None:
    if reason := missing(tree):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), tree], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout[done.stdout.rindex("\n{") :])
    assert (report["tower"], report["family"]) == TOWERS[tree]
    assert report["same_keys"] and not report["paths_lost"]
    assert report["mask_changes"] > 1e-3, "the mask changed nothing, so equality proves nothing"
    assert len(report["errors"]) == 3
    # Rounding: as much as the dense network's own other kernels make, and some.
    for size, errors in report["errors"].items():
        for name, error in errors.items():
            yardstick = report["dense_by_other_kernels"][name]
            assert error <= max(2e-5, 5 * yardstick), (size, name, error, yardstick)
    assert max(report["restored"].values()) <= 1e-6
    if tree == "fc-clip":
        assert report["frozen_more"] == 0
        assert any("frozen as a whole already" in note for note in report["notes"])
    else:
        assert report["frozen_more"] > 0
    if tree == "deeplab":
        assert any("another function" in note for note in report["notes"])
