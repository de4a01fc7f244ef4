"""Prints what a step of each Triton loop issues and what tensor cores need for it; needs no GPU.

Compiled for sm_90. A loop whose instructions take longer than its products keeps tensor cores
waiting, whatever the memory does.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_triton_steps as steps  # noqa: E402


def main() -> None:
    print("| loop | instructions of a warp | cycles to issue | cycles of tensor cores |")
    print("|---|---|---|---|")
    rows = [(name, steps.conv_step(name)) for name in steps.CASES]
    for inner in (64, 128, 256):
        for name, found in zip(("3x3", "1x1, 1x1"), steps.chain_steps(inner), strict=True):
            rows.append((f"chain, {inner} inner channels, {name}", found))
    rows.append(("stem, one tap (64 pixels)", steps.stem_step()))
    for name, (count, issue, products) in rows:
        print(f"| {name} | {count} | {issue:.0f} | {products:.0f} |")


if __name__ == "__main__":
    main()
