"""Benchmarks: what they time computes what it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_what_is_timed_on_a_gpu_is_the_loss_of_the_library():
    """The compiled way and Triton's kernel, interpreted on the CPU, give the library's loss and gradient."""
    pytest.importorskip("triton")
    command = [sys.executable, "training/benchmarks/kerdock_gpu.py", "--check"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["library", "compiled", "triton"]
