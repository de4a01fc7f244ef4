"""Have other tools write their files, read them, and compare with what their networks compute.

``python benchmarks/formats/make_files.py --folder DIR [TOOL ...]`` installs each tool, pinned, in
an environment of its own below DIR (on top of this one, so that torch is shared), runs tools.py
there and reads the files here. ``--record`` also writes names, shapes and dtypes of each file to
tests/formats, from which the tests build their equivalents.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from writing import structure

from opentrans import cli
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import MaskSet, load_masks, open_checkpoint, read_state_dict

HERE = Path(__file__).parent
RECORDS = HERE.parents[1] / "tests" / "formats"
#: Tool -> what to install; empty: in this environment already.
REQUIREMENTS = {
    "torch": (),
    "torch.ao": (),
    "timm": (),
    "nncf": ("nncf==3.4.0", "torchao==0.18.0"),
    "nni": ("nni==3.0",),
    "lightning": ("lightning==2.6.6",),
    "fasterai": ("fasterai==0.4.1",),
    "torch-pruning": ("torch-pruning==1.6.1",),
    "compressed-tensors": ("compressed-tensors==0.10.2",),
    "neural-compressor": ("neural-compressor==2.6",),
    "mmengine": ("mmengine==0.10.7",),
}


def environment(tool: str, folder: Path) -> Path:
    """The Python that has the tool."""
    if not REQUIREMENTS[tool]:
        return Path(sys.executable)
    place = folder / "environments" / tool
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, system_site_packages=True, with_pip=True)
        [packages] = place.glob("lib/python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [python, "-m", "pip", "install", "-q", *REQUIREMENTS[tool]]
        subprocess.run(install, check=True)
    return python


def write_files(tool: str, folder: Path) -> list[Path]:
    """The files that the tool wrote."""
    files = folder / "files" / tool
    shutil.rmtree(files, ignore_errors=True)
    command = [environment(tool, folder), HERE / "tools.py", tool, files]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tool} failed:\n{done.stderr[-2000:]}")
    return sorted(path.with_suffix("") for path in files.glob("*.truth"))


def verdict(path: Path) -> dict[str, Any]:
    """Kind, counts and whether masks and weights are those of the network; or the refusal."""
    truth = torch.load(f"{path}.truth", weights_only=True)
    found: dict[str, Any] = {}
    try:
        masks = load_masks(path)
    except OpenTransError as error:
        return {"refused": str(error)}
    removed = {name: weight == 0 for name, weight in truth.items()}
    read = {name: ~mask for name, mask in _by_name(masks.masks, truth).items()}
    found["kind"], found["masks"], found["kept"] = masks.source.kind, len(masks.masks), masks.nnz
    found["wrongly removed"] = sum(int((m & ~removed[n]).sum()) for n, m in read.items())
    unread = (int((m & ~read[n]).sum()) if n in read else int(m.sum()) for n, m in removed.items())
    found["zeros without a mask"] = sum(unread)
    try:
        state = read_state_dict(path)
        weights = {key.removesuffix(".weight"): value for key, value in state.items()}
        own = _by_name(weights, truth)
        found["weights"] = (
            all(torch.equal(own[name], weight) for name, weight in truth.items())
            if len(own) == len(truth)
            else "not in the file"
        )
    except OpenTransError as error:
        found["weights"] = str(error)
    return found


def _by_name(
    found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Entries by the network's own names; files put a prefix in front of them."""
    fits: dict[str, torch.Tensor] = {}
    for name, weight in truth.items():
        for key, tensor in found.items():
            ends = key == name or key.endswith(f".{name}")
            if ends and name not in fits and tensor.shape == weight.shape:
                fits[name] = tensor
    return fits


def inspected(path: Path) -> int:
    """Exit code of ``opentrans inspect``."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return cli.main(["inspect", str(path), "--size", "64"])


def record(tool: str, path: Path, seen: dict[str, Any], masks: MaskSet | None) -> None:
    """Write what the tests need to build the file again."""
    noted = Path(f"{path}.structure")
    entry = {
        "tool": tool,
        "version": version(tool),
        "kind": seen.get("kind"),
        "masks": sorted(masks.masks) if masks else [],
        "content": json.loads(noted.read_text())
        if noted.exists()
        else structure(open_checkpoint(path).content),
    }
    RECORDS.mkdir(exist_ok=True)
    text = json.dumps(entry, indent=0) + "\n"
    (RECORDS / f"{tool}-{path.stem}.json").write_text(text)


def version(tool: str) -> str:
    """Of the tool as pinned, else of the package here."""
    if REQUIREMENTS[tool]:
        return REQUIREMENTS[tool][0].partition("==")[2]
    module = __import__(tool.partition(".")[0])
    return str(module.__version__).partition("+")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=", ".join(REQUIREMENTS))
    parser.add_argument("--folder", type=Path, required=True, help="for environments and files")
    parser.add_argument("--record", action="store_true", help="renew tests/formats")
    options = parser.parse_args()
    for tool in options.tools or REQUIREMENTS:
        if tool not in REQUIREMENTS:
            parser.error(f"{tool!r} is none of {', '.join(REQUIREMENTS)}")
        for path in write_files(tool, options.folder.resolve()):
            seen = verdict(path)
            print(f"{tool} {version(tool)} {path.name}: inspect exits with {inspected(path)}")
            for key, value in seen.items():
                print(f"    {key}: {value}")
            if options.record:
                record(tool, path, seen, None if "refused" in seen else load_masks(path))


if __name__ == "__main__":
    main()
