"""`make venv` with a Python that will not do."""

import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).resolve().parents[3] / "tools/venv.sh"


def venv_with(python: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHON": python, "PATH": "/usr/bin:/bin"}
    return subprocess.run(["sh", SCRIPT], check=False, env=environment, capture_output=True, text=True)


def test_an_old_python_gets_one_clear_line(tmp_path: pathlib.Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\n')
    old.chmod(0o755)
    result = venv_with(str(old))
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"make venv: Python 3.11 or newer is needed, {old} is Python 3.9.2; choose with: make venv PYTHON=python3.12"
    ]


def test_so_does_a_missing_one() -> None:
    result = venv_with("no-such-python")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "no-such-python is no program" in result.stderr
