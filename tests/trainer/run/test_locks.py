"""Locks between processes."""

import subprocess
import sys

import pytest

from etf_zoo.trainer.run.locks import acquire

HOLDER = """
import sys, pathlib
from etf_zoo.trainer.run.locks import acquire
with acquire(pathlib.Path(sys.argv[1])) as alone:
    print(alone, flush=True)
    sys.stdin.read()
"""


def test_one_process_has_a_lock_until_it_ends(tmp_path):
    file = tmp_path / "new" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b"True"
    with acquire(file) as alone:
        assert not alone
    holder.kill()
    holder.communicate()
    with acquire(file, wait=True) as alone:
        assert alone
        with acquire(file) as again:
            assert not again


def test_a_link_is_refused_and_its_target_kept(tmp_path):
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(OSError, match=r"It is a link: delete it"), acquire(tmp_path / ".lock"):
        pass
    assert target.read_text() == "kept"
    with (
        pytest.raises(OSError, match=r"Cannot lock .*Choose a folder that you can write to"),
        acquire(target / ".lock"),
    ):
        pass
