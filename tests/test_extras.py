"""How optional packages are installed, as errors and pages say it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from common.system.extras import ROOT, install, packages, pip


def test_from_a_checkout_pip_takes_the_extra_from_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install("face") == f'{pip()} install -e ".[face]"'
    monkeypatch.chdir(tmp_path)
    assert install("face").endswith(f'install -e ".[face]" in {ROOT}')


def test_without_a_checkout_the_packages_are_named(tmp_path: Path) -> None:
    assert install("face", tmp_path) == f'{pip()} install "opencv-python-headless>=4.8" "onnxruntime>=1.17"'
    assert packages("xfuser") == ["xfuser==0.4.5"]


def test_pip_is_the_running_pythons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pip() == f"{sys.executable} -m pip"
    mine = Path(sys.executable).parent / "pip"
    monkeypatch.setattr("shutil.which", lambda name: str(mine))
    assert pip() == "pip"


def test_nothing_is_installed_by_a_name_that_no_index_has() -> None:
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "tests", "outputs"))]
    texts = [path for folder in folders for kind in ("*.py", "*.md") for path in folder.rglob(kind)]
    for path in [*texts, *ROOT.glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"install\s+['\"]?xdit-zoo", text), path
        named = re.findall(r"\binstall\(['\"](\w+)['\"]\)|install -e ['\"]?\.\[(\w+)\]", text)
        assert {a or b for a, b in named} <= extras, path
