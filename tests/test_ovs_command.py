"""The training command without detectron2, or with one that is too old: one line, exit status 2."""

from __future__ import annotations

import fresh_process
import pytest

QUIET = "import sys, warnings; warnings.simplefilter('ignore')"
RUN = "import runpy; runpy.run_module('opentrans.d2.train_net', run_name='__main__')"
OLD = """
import types
old = types.ModuleType("detectron2")
old.__version__, old.__path__ = "0.5", []
loop = types.ModuleType("detectron2.engine.train_loop")
loop.HookBase = type("HookBase", (), {})
sys.modules |= {"detectron2": old, "detectron2.engine": types.ModuleType("engine"),
                "detectron2.engine.train_loop": loop, "detectron2.modeling": types.ModuleType("m")}
"""


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        ("sys.modules['detectron2'] = None", "error: detectron2 cannot be imported"),
        (OLD, "error: detectron2 0.5 is too old: 0.6 or later"),
    ],
)
def test_the_command_says_in_one_line_what_is_missing(prepare: str, reason: str) -> None:
    done = fresh_process.run(f"{QUIET}\n{prepare}\n{RUN}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(reason) and done.stderr.count("\n") == 1
    assert "PYTHONPATH" in done.stderr and "Traceback" not in done.stderr


def test_ovs_needs_no_detectron2() -> None:
    code = "import sys; sys.modules['detectron2'] = None; import opentrans.ovs as ovs; "
    code += "[getattr(ovs, name) for name in ovs.__all__]; "
    code += "from opentrans.d2.meta_arch_config import OvsConfig"
    done = fresh_process.run(code)
    assert done.returncode == 0, done.stderr
