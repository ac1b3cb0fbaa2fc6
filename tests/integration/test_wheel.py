"""The built wheel, in a new virtual environment outside the checkout and without torch, checks and renders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the executables of a venv that holds the wheel and what it depends on, nothing else."""
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    venv.create(place / "venv", with_pip=True)
    (wheel,) = place.glob("*.whl")
    install = [
        str(place / "venv/bin/python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        str(ROOT / "envs/constraints.txt"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return place / "venv/bin"


def run(installed: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "LORA_JOBS_HOME": str(directory / "runs")}
    command = [str(installed / "lora-jobs"), *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_torch_is_not_there(installed: Path) -> None:
    done = subprocess.run(
        [str(installed / "python"), "-c", "import torch"], capture_output=True, text=True, check=False
    )
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_check_answers(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "check", str(ROOT / "jobs/gemma2_9b_svg.yaml"), "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0 if answer["fits"] else 3, "")
    assert answer["parameters"]["base"] == 9_241_705_984
    assert answer["gpu"]["name"] == "A100-64"


def test_render_writes_the_script_and_the_deepspeed_json(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "render", str(ROOT / "jobs/gemma2_9b_svg.yaml"), "-o", "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/script.sbatch").read_text() == done.stdout
    assert json.loads((tmp_path / "out/deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    assert "#SBATCH --partition=boost_usr_prod" in done.stdout
    assert not (tmp_path / "runs").exists()
