"""Processes that tests start are as fresh as those of ``python -c``, and end as they do."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import fresh_process
import pytest


def test_code_sees_its_own_arguments_environment_folder_and_modules(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 5\n")
    code = """
        import os, sys, beside
        print(sys.argv[1:], os.environ.get("ONE"), "HOME" in os.environ, os.getcwd())
        print("torch" in sys.modules, "opentrans_kernels" in sys.modules, beside.value, __name__)
        """
    environment = {"ONE": "1", "PYTHONPATH": str(tmp_path)}
    for folder in (fresh_process.ROOT, tmp_path):
        done = fresh_process.run(code, "a b", 2, environment=environment, folder=folder)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.splitlines() == [
            f"['a b', '2'] 1 False {folder}", "True False 5 __main__"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("raise ValueError('odd')", 1, "ValueError: odd\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'late')", 0, "late"),
    ],
)
def test_an_end_is_told_as_of_any_process(code: str, status: int, said: str) -> None:
    done = fresh_process.run(code)
    assert done.returncode == status and done.stderr.endswith(said)


def test_processes_run_together_and_a_hanging_one_is_ended(tmp_path: Path) -> None:
    meet = """
        import sys, time
        from pathlib import Path
        own, other = (Path(sys.argv[1]) / name for name in sys.argv[2:])
        own.touch()
        while not other.exists():
            time.sleep(0.01)
        print(own.name)
        """
    done = fresh_process.run_together(meet, [(tmp_path, "a", "b"), (tmp_path, "b", "a")])
    assert [(one.returncode, one.stdout) for one in done] == [(0, "a\n"), (0, "b\n")]
    with pytest.raises(subprocess.TimeoutExpired):
        fresh_process.run(meet, tmp_path, "c", "d", timeout=2)
    assert (tmp_path / "c").exists(), "it never ran"
    assert fresh_process.run("import os; print(os.getpid())").stdout != f"{os.getpid()}\n"
