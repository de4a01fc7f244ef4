"""errors, settings and native: the floor everything else stands on."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import fresh_process
import pytest
import torch

from opentrans_kernels import errors, native, settings
from opentrans_kernels.errors import BuildMismatch, KernelUnavailable, OpenTransError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "opentrans_kernels"
CAPABILITIES = ("avx512", "avx2", "neon", "generic")


def environment(cwd: Path, **variables: str) -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OPENTRANS_")}
    return environ | {"PYTHONPATH": str(cwd), **variables}


def with_torch(code: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Where the real torch is imported."""
    return fresh_process.run(code, environment=environment(cwd, **variables), folder=cwd)


def python(code: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(cwd, **variables),
        timeout=120,
    )


def test_every_error_is_an_opentrans_error() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), OpenTransError)
    assert issubclass(BuildMismatch, KernelUnavailable)


def test_defaults_apply_to_an_empty_environment() -> None:
    assert settings.Settings.from_env({}) == settings.Settings("auto", False, "auto", "auto")
    assert settings.Settings.from_env({"OPENTRANS_BACKEND": ""}).backend == "auto"
    assert settings.Settings.from_env({"OPENTRANS_CACHE": ""}).cache == settings.Settings().cache


def test_values_are_read_and_typed() -> None:
    found = settings.Settings.from_env(
        {"OPENTRANS_BACKEND": " CPU ", "OPENTRANS_STRICT": "1", "OPENTRANS_LOG": "info"}
    )
    assert found == settings.Settings("cpu", True, "auto", "info")
    assert settings.Settings.from_env({"OPENTRANS_CACHE": "/Some Where"}).cache == "/Some Where"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.backend = "auto"  # type: ignore[misc]


@pytest.mark.parametrize(
    "name", ["OPENTRANS_BACKEND", "OPENTRANS_STRICT", "OPENTRANS_CPU_CAPABILITY", "OPENTRANS_LOG"]
)
def test_an_unknown_value_names_the_choices_and_the_fix(name: str) -> None:
    with pytest.raises(OpenTransError) as caught:
        settings.Settings.from_env({name: "fastest"})
    message = str(caught.value)
    assert f"{name}='fastest'" in message and f"unset {name}" in message
    row = next(row for row in settings.table({}) if row.name == name)
    assert row.choices in message


def test_settings_are_read_once_until_reloaded(set_env, monkeypatch) -> None:
    set_env(OPENTRANS_BACKEND="reference")
    monkeypatch.setenv("OPENTRANS_BACKEND", "cpu")
    assert settings.get().backend == "reference"
    assert settings.reload().backend == "cpu"
    monkeypatch.setenv("OPENTRANS_BACKEND", "nonsense")
    with pytest.raises(OpenTransError):
        settings.reload()
    assert settings.get().backend == "cpu", "a failed reload must not change the settings"


def test_the_table_says_what_is_in_force_and_where_it_comes_from() -> None:
    rows = {row.name: row for row in settings.table({"OPENTRANS_STRICT": "1"})}
    assert (rows["OPENTRANS_STRICT"].value, rows["OPENTRANS_STRICT"].origin) == ("1", "environment")
    assert (rows["OPENTRANS_LOG"].value, rows["OPENTRANS_LOG"].origin) == ("auto", "default")
    assert rows["OPENTRANS_CUDA"].when == "build" and rows["OPENTRANS_BACKEND"].when == "run"
    assert all(row.doc.endswith(".") for row in rows.values())


def test_the_table_lists_every_variable_that_the_code_reads() -> None:
    quoted = re.compile(r"[\"'](OPENTRANS_[A-Z_]+)[\"']")
    files = [ROOT / "setup.py", *PACKAGE.rglob("*.py"), *(ROOT / "opentrans").rglob("*.py")]
    files += [path for path in (ROOT / "csrc").rglob("*.*") if path.is_file()]
    used = {name for path in files for name in quoted.findall(path.read_text(encoding="utf-8"))}
    assert used == {row.name for row in settings.table({})}


def test_a_log_level_attaches_one_handler_and_auto_removes_it(set_env) -> None:
    logger = logging.getLogger("opentrans_kernels")
    set_env(OPENTRANS_LOG=None)
    before = list(logger.handlers)
    set_env(OPENTRANS_LOG="info")
    set_env(OPENTRANS_LOG="debug")
    assert len(logger.handlers) == len(before) + 1
    assert logger.level == logging.DEBUG and not logger.propagate
    set_env(OPENTRANS_LOG="off")
    assert not logger.isEnabledFor(logging.CRITICAL)
    set_env(OPENTRANS_LOG=None)
    assert logger.handlers == before and logger.propagate and logger.level == logging.NOTSET


def test_a_recorded_build_loads() -> None:
    if "_C" not in native.build_info().get("built", ()):
        pytest.skip(str(native.reason()))
    assert native.load(), native.reason()
    assert native.reason() is None
    native.require()


def test_the_capability_is_one_of_the_known_ones(extension, set_env) -> None:
    set_env(OPENTRANS_CPU_CAPABILITY=None)
    assert native.cpu_capability() in CAPABILITIES


def test_a_forced_capability_is_honoured_or_refused(extension) -> None:
    code = """
        from opentrans_kernels import errors, native
        try:
            print("runs", native.cpu_capability())
        except errors.KernelUnavailable as error:
            print("refused", error)
        """
    verdicts = {}
    for forced in CAPABILITIES:
        done = with_torch(code, OPENTRANS_CPU_CAPABILITY=forced)
        assert done.returncode == 0, done.stderr
        verdicts[forced], _, text = done.stdout.strip().partition(" ")
        if verdicts[forced] == "runs":
            assert text == forced
        else:
            assert f"OPENTRANS_CPU_CAPABILITY={forced}" in text and "Unset" in text
            assert str(ROOT) not in text
    assert verdicts["generic"] == "runs"
    # No CPU has both, so this cannot pass by everything being accepted.
    assert "refused" in (verdicts["avx2"], verdicts["neon"])


def test_forcing_after_the_choice_is_an_error(extension, set_env) -> None:
    set_env(OPENTRANS_CPU_CAPABILITY=None)
    other = "avx2" if native.cpu_capability() == "generic" else "generic"
    set_env(OPENTRANS_CPU_CAPABILITY=other)
    with pytest.raises(KernelUnavailable, match="before starting Python"):
        native.cpu_capability()


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A copy of the package without extension and record; returns the folder to import from."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignore)
    return tmp_path


@pytest.fixture
def quick_torch(unbuilt: Path) -> Path:
    """Beside the copy, a torch that has a version only: enough where no extension is found."""
    (unbuilt / "torch.py").write_text("__version__ = '2.14.1+cpu'\n")
    return unbuilt


REPORT = """
    import json
    import opentrans_kernels
    from opentrans_kernels import errors, native
    try:
        native.require("packing")
    except errors.KernelUnavailable as error:
        kind, text = type(error).__name__, str(error)
    print(json.dumps([native.load(), native.reason(), native.cpu_capability(), kind, text]))
"""


@pytest.mark.usefixtures("quick_torch")
def test_without_the_extension_the_reason_says_how_to_build(unbuilt: Path) -> None:
    done = python(REPORT, unbuilt)
    assert done.returncode == 0, done.stderr
    loaded, reason, capability, kind, text = json.loads(done.stdout)
    assert (loaded, capability, kind) == (False, None, "KernelUnavailable")
    assert "never built" in reason and native.REBUILD in reason and "reference" in reason
    assert text.startswith("packing needs the compiled CPU kernels.") and reason in text


@pytest.mark.usefixtures("quick_torch")
def test_the_recorded_reason_is_repeated(unbuilt: Path) -> None:
    record = {"built": [], "not_built": {"_C": "no C++ compiler was found"}}
    (unbuilt / PACKAGE.name / "_build.json").write_text(json.dumps(record))
    done = python(REPORT, unbuilt)
    assert "not installed: no C++ compiler was found." in json.loads(done.stdout)[1]


@pytest.mark.usefixtures("quick_torch")
def test_forcing_a_capability_without_the_extension_is_an_error(unbuilt: Path) -> None:
    code = "from opentrans_kernels import native; native.cpu_capability()"
    done = python(code, unbuilt, OPENTRANS_CPU_CAPABILITY="generic")
    assert done.returncode and "KernelUnavailable" in done.stderr
    assert "OPENTRANS_CPU_CAPABILITY=generic has no effect" in done.stderr


def test_an_unloadable_extension_is_a_build_mismatch(unbuilt: Path) -> None:
    package = unbuilt / PACKAGE.name
    (package / "_C.abi3.so").write_bytes(b"not an ELF file")
    (package / "_build.json").write_text('{"torch": "2.99.0", "built": ["_C"], "not_built": {}}')
    done = with_torch(REPORT, unbuilt)
    assert done.returncode == 0, done.stderr
    loaded, reason, _, kind, _ = json.loads(done.stdout)
    assert (loaded, kind) == (False, "BuildMismatch")
    assert "2.99.0" in reason and torch.__version__ in reason and native.REBUILD in reason


def test_an_old_torch_is_a_build_mismatch(quick_torch: Path) -> None:
    (quick_torch / "torch.py").write_text("__version__ = '2.10.1+cu126'\n")
    done = python(REPORT, quick_torch)
    assert done.returncode == 0, done.stderr
    loaded, reason, _, kind, _ = json.loads(done.stdout)
    assert (loaded, kind) == (False, "BuildMismatch")
    assert ">= 2.11" in reason and "2.10.1+cu126" in reason and "pip install" in reason


@pytest.mark.usefixtures("quick_torch")
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_record_is_an_error(unbuilt: Path, text: str) -> None:
    (unbuilt / PACKAGE.name / "_build.json").write_text(text)
    done = python("from opentrans_kernels import native; native.build_info()", unbuilt)
    assert "BuildMismatch" in done.stderr and native.REBUILD in done.stderr
    assert python(REPORT, unbuilt).returncode == 0, "load() must not raise for it"


def test_poison_fills_new_memory(poison) -> None:
    like = torch.zeros(3)
    for fresh in (torch.empty(3), like.new_empty(3), torch.empty_strided((3,), (2,))):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
