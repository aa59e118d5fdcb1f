"""How a script ends."""

import errno
import os
import random
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from etf_zoo.trainer.recipe.config import Recipe
from etf_zoo.trainer.run.launcher import launch
from etf_zoo.trainer.run.script import run_script


def test_own_errors_end_a_script_with_one_line():
    with pytest.raises(SystemExit, match=re.escape("error: epochs takes a whole number at least 1, got 0.")):
        run_script(lambda: Recipe(epochs=0))


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ValueError, match="Sample larger"):
        run_script(lambda: random.sample([1], 2))
    with pytest.raises(KeyError):
        run_script(lambda: {}["x"])
    with pytest.raises(BrokenPipeError):
        run_script(lambda: failing(BrokenPipeError(errno.EPIPE, "Broken pipe")))


def failing(error, cause=None):
    raise error from cause


def test_what_the_system_refuses_is_no_defect(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*/file/run: Not a directory. Give --output .* can write to.$"):
        run_script(lambda: (tmp_path / "file" / "run").mkdir())
    with pytest.raises(SystemExit, match=r"error: /a/b: No space left on device. Make room, then go on with --resume"):
        run_script(lambda: failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")))


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub\n(more)"), None, r"No network.*reach 'a/b' on the Hub\)"),
        (LocalEntryNotFoundError("no file"), ConnectionRefusedError(111, "refused"), "No network"),
        (RuntimeError("no weights"), LocalEntryNotFoundError("x"), r"No network, .*\(no weights\)"),
        (RuntimeError("offline"), OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_missing_network_is_one_line(error, cause, message):
    with pytest.raises(SystemExit, match=message) as ended:
        run_script(lambda: failing(error, cause))
    assert "\n" not in str(ended.value)


def test_a_full_gpu_gets_advice():
    with pytest.raises(SystemExit, match="--accumulate 2"):
        run_script(lambda: failing(torch.OutOfMemoryError("CUDA out of memory")))


def test_ctrl_c_ends_with_one_line_and_130(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: failing(KeyboardInterrupt()))
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--resume" in said


def test_a_launcher_adds_nothing_to_an_error(tmp_path, capfd):
    """Of two processes, which both fail, and of one."""
    script = tmp_path / "fails.py"
    script.write_text(
        "from etf_zoo.errors import EtfZooError\nfrom etf_zoo.trainer.run.script import run_script\n"
        "def main():\n    raise EtfZooError('No. Say please.')\nrun_script(main)\n"
    )
    for launch_file in ("cpu_processes", "cpu"):
        config = str(Path(__file__).parents[3] / "training" / "launch" / f"{launch_file}.yaml")
        assert launch(["--config_file", config, str(script)]) == 1
        assert capfd.readouterr().err == "error: No. Say please.\n"
