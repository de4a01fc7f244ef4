"""The suite on another release of torch: ``run_torch.py VERSION [FILE ...]``.

The tree is copied to ``build/torch-VERSION``, compiled there against that torch, in an environment
of its own that stays for the next run, and tested with ``make test``: all of it, or the files that
are named.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_tree(to: Path) -> None:
    """Tracked files and new ones that git does not ignore, as they are now."""
    to.mkdir(parents=True, exist_ok=True)
    for old in to.iterdir():
        if old.name != ".venv":
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():  # not what was deleted and is still tracked
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def install(to: Path, version: str) -> None:
    python = to / ".venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", to / ".venv"], check=True)
    # Without constraints.txt: torchvision follows the torch that is asked for.
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-r", "requirements.txt", f"torch=={version}"],
        cwd=to, check=True,
    )  # fmt: skip


def main(version: str, files: list[str]) -> int:
    to = ROOT / "build" / f"torch-{version}"
    copy_tree(to)
    install(to, version)
    (to / ".venv" / ".deps").touch()
    print(f"== torch {version}: make test in {to}", flush=True)
    tests = [f"TESTS={' '.join(files)}"] if files else []
    return subprocess.run(["make", "test", *tests], cwd=to).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Name a release of torch: make test-torch VERSION=2.15.0")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
