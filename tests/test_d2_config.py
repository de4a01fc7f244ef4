"""``MODEL.OPENTRANS``: keys, defaults, checks. No detectron2 and no yacs are needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh_process
import pytest

from opentrans.d2.config import OpenTransConfig, config_rows
from opentrans.d2.config_check import imp_config
from opentrans.d2.config_nodes import ConfigError
from opentrans.d2.register import add_opentrans_config

DOCS = Path(__file__).resolve().parents[1] / "docs" / "detectron2.md"


class Node(dict):
    """What a yacs CfgNode is to this code: a dict with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def config(**options: Any) -> Node:
    cfg = Node(MODEL=Node(WEIGHTS=""))
    add_opentrans_config(cfg)
    for key, value in options.items():
        *path, last = key.split("__")
        node = cfg.MODEL.OPENTRANS
        for part in path:
            node = node[part]
        node[last] = value
    return cfg


def test_defaults_survive_the_way_through_a_config() -> None:
    assert OpenTransConfig.from_cfg(config()) == OpenTransConfig()
    assert OpenTransConfig.from_cfg(config().MODEL.OPENTRANS) == OpenTransConfig()
    assert json.loads(json.dumps(OpenTransConfig().to_dict())) == OpenTransConfig().to_dict()


def test_lower_case_keys_and_missing_ones_are_read() -> None:
    found = OpenTransConfig.from_cfg({"mask": {"file": "m.safetensors"}, "imp": {"rate": 1 / 2}})
    assert (found.MASK.FILE, found.IMP.RATE, found.IMP.ROUNDS) == ("m.safetensors", 0.5, 22)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"FREEZE__RULES": "median"}, r"Did you mean MODEL\.OPENTRANS\.FREEZE\.RULE\?"),
        ({"MASKS": "x"}, r"Did you mean MODEL\.OPENTRANS\.MASK\?"),
        ({"ZZZZ": 1}, "Keys: ARCH"),
        ({"MASK": "file.pth"}, r"group of keys.*MODEL\.OPENTRANS\.MASK\.FILE"),
        ({"MASK__AT": "3"}, "must be a int, such as 0"),
        ({"MASK__AT": True}, "must be a int"),
        ({"IMP__ENABLED": 1}, "must be a bool"),
        ({"OUT_FEATURES": "res5"}, "must be a list"),
        ({"OUT_FEATURES": ["res9"]}, "stem, res2"),
        ({"WIDTH": 24}, "multiple of 16"),
        ({"LAYERS": [3, 4]}, r"4 numbers of blocks, such as \[3, 4, 6, 3\]"),
        ({"INPUT_RESOLUTION": 100}, "multiple of 32"),
        ({"MASK__AT": 5}, "MASK.AT and REMOVE_AT mean nothing"),
        ({"MASK__FILE": "m", "MASK__AT": 5, "MASK__REMOVE_AT": 5}, "behind MASK.AT=5"),
        ({"MASK__FILE": "global:90"}, "Did you mean global:0.9"),
        ({"FREEZE__RULE": "meadian"}, "Did you mean"),
        ({"FREEZE__RULE": "ratio:1.0"}, "freezes everything. Use a share between 0 and 1"),
        ({"FREEZE__RULE": "ratio:0.0"}, "freezes nothing"),
        ({"FREEZE__RULE": "opentrans"}, "Use median"),
        ({"FREEZE__FIT": "best"}, "xmin_peak"),
        ({"FREEZE__NORMS": "eval"}, "frozen, affine, train"),
        ({"FREEZE__RULE": "median", "FREEZE__PLAN": "p.json"}, "exclude each other"),
        ({"FREEZE__AT": 10}, "freezes nothing"),
        ({"FREEZE__SKIP": True}, "needs FREEZE.RULE"),
        (
            {"FREEZE__SKIP": True, "FREEZE__RULE": "median", "FREEZE__NORMS": "train"},
            "needs FREEZE.NORMS frozen",
        ),
        ({"FREEZE__SKIP": True, "FREEZE__RULE": "median", "FREEZE__AT": 5}, "Set FREEZE.AT 0"),
        (
            {"FREEZE__SKIP": True, "FREEZE__RULE": "median", "ACCELERATE__ENABLED": True},
            "--eval-only",
        ),
        (
            {"FREEZE__SKIP": True, "FREEZE__RULE": "median", "MASK__FILE": "m", "MASK__AT": 5},
            "Set MASK.AT 0",
        ),
        (
            {"FREEZE__SKIP": True, "FREEZE__RULE": "median", "MASK__FILE": "m"}
            | {"MASK__REMOVE_AT": 5},
            "MASK.REMOVE_AT -1, or FREEZE.SKIP False",
        ),
        ({"IMP__RATE": 1.5}, "between 0 and 1"),
        ({"IMP__ALLOCATION": "best"}, "global, uniform, macs, latency"),
        ({"IMP__ENABLED": True, "IMP__OUTPUT": ""}, "folder"),
        ({"IMP__ENABLED": True, "MASK__FILE": "m", "MASK__AT": 2}, "MASK.AT must be 0"),
        ({"ACCELERATE__DEVICE": "gpu"}, "auto, require"),
        ({"ACCELERATE__INPUT_SIZE": [512]}, r"\[height, width\]"),
        ({"ACCELERATE__THREADS": -1}, "0 \\(torch's setting\\)"),
        ({"TEXT_CACHE__CHUNK": 0}, "1 or more"),
    ],
)
def test_bad_values_are_refused_with_the_fix(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        OpenTransConfig.from_cfg(config(**options))


def test_a_config_without_the_node_is_told_what_to_call() -> None:
    with pytest.raises(ConfigError, match="add_opentrans_config"):
        OpenTransConfig.from_cfg(Node(MODEL=Node()))
    with pytest.raises(ConfigError, match="get_cfg"):
        add_opentrans_config(Node())
    with pytest.raises(ConfigError, match="only once"):
        add_opentrans_config(config())
    with pytest.raises(ConfigError, match="Pass the detectron2 config"):
        OpenTransConfig.from_cfg(3)


def test_the_pruning_schedule_is_the_one_of_the_keys() -> None:
    options = OpenTransConfig.from_cfg(
        config(IMP__TARGET_DENSITY=0.1, IMP__FIRST_AFTER=1, IMP__PERIOD=50, IMP__REWIND=0)
    )
    made = imp_config(options.IMP)
    assert (made.schedule.target_density, made.schedule.first_after, made.rewind) == (0.1, 1, 0)
    plain = imp_config(OpenTransConfig().IMP)
    assert (plain.schedule.target_density, plain.schedule.first_after, plain.rewind) == (None,) * 3


def test_every_key_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = list(config_rows())
    assert len(rows) > 30
    missing = [row for row in table() if row not in text]
    assert not missing, "docs/detectron2.md lacks:\n" + "\n".join(missing)


def table() -> list[str]:
    """The rows of the page's table."""
    return [f"| `{key}` | `{value!r}` | {meaning} |" for key, value, meaning in config_rows()]


def run_python(code: str) -> str:
    done = fresh_process.run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_but_the_registered_parts_needs_detectron2() -> None:
    out = run_python(
        """
        import importlib.abc, sys

        class Absent(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.partition(".")[0] in ("detectron2", "fvcore", "yacs"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Absent())
        import opentrans, opentrans.d2
        from opentrans_kernels import OpenTransError
        needing = {"OpenTransCLIPResNet", "require_detectron2", "build_opentrans_hooks"}
        needing |= {name for name in opentrans.d2.__all__ if name.endswith("Hook")}
        for name in opentrans.d2.__all__:
            try:
                value = getattr(opentrans.d2, name)
                if name == "require_detectron2":
                    value()
                assert name not in needing, name
            except OpenTransError as error:
                assert name in needing, (name, error)
                assert "on PYTHONPATH" in str(error) and isinstance(error, ImportError), error
                print(name)
        """
    )
    assert len(out.split()) == 8


@pytest.mark.parametrize(
    ("version", "hook", "fix"), [("0.5", True, "0.6 or later"), ("0.6", False, "Take a later one")]
)
def test_a_detectron2_that_is_too_old_is_refused(version: str, hook: bool, fix: str) -> None:
    out = run_python(
        f"""
        import sys, types
        names = ("detectron2", "detectron2.engine", "detectron2.engine.train_loop",
                 "detectron2.modeling")
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        sys.modules["detectron2"].__version__ = {version!r}
        base = type("HookBase", (), {{"state_dict": None}} if {hook} else {{}})
        sys.modules["detectron2.engine.train_loop"].HookBase = base
        from opentrans.d2 import DetectronMissing, require_detectron2
        try:
            require_detectron2()
        except DetectronMissing as error:
            print(error)
        """
    )
    assert fix in out


def test_what_detectron2_itself_misses_is_named() -> None:
    out = run_python(
        """
        import sys, types
        class Broken(types.ModuleType):
            __path__ = []
        sys.modules["detectron2"] = Broken("detectron2")
        sys.modules["detectron2.engine"] = Broken("detectron2.engine")
        import importlib.abc
        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "detectron2.engine.train_loop":
                    raise ModuleNotFoundError("No module named 'fvcore'", name="fvcore")
        sys.meta_path.insert(0, Finder())
        from opentrans.d2 import DetectronMissing, require_detectron2
        try:
            require_detectron2()
        except DetectronMissing as error:
            print(error)
        """
    )
    assert "pip install fvcore" in out
