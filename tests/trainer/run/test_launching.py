"""What depends on the launch: how a script ends, and batches in step."""

import random
import re

import pytest
import torch

from etf_zoo.trainer.recipe.config import Recipe
from etf_zoo.trainer.run.launching import Repeatable, in_step, make_accelerator, run_script


def test_own_errors_end_a_script_with_one_line():
    with pytest.raises(SystemExit, match=re.escape("error: epochs takes a whole number at least 1, got 0.")):
        run_script(lambda: Recipe(epochs=0))


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ValueError, match="Sample larger"):
        run_script(lambda: random.sample([1], 2))
    with pytest.raises(KeyError):
        run_script(lambda: {}["x"])


def test_what_the_system_refuses_is_no_defect(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*Not a directory"):
        run_script(lambda: (tmp_path / "file" / "run").mkdir())


def test_a_full_gpu_gets_advice():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit, match="--accumulate 2"):
        run_script(full)


def test_one_precision_after_another():
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        accelerator = make_accelerator(precision)
        with accelerator.autocast():
            product = torch.ones(2, 2, device=accelerator.device) @ torch.ones(2, 2, device=accelerator.device)
        assert product.dtype == dtype
        assert make_accelerator().mixed_precision == accelerator.mixed_precision


class Processes:
    """This process and another that has more batches."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, others):
        self.others = others

    def reduce(self, tensor, reduction):
        self.others -= 1
        return tensor + float(self.others >= 0)


def test_attention_leaves_cudnn_alone():
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_accelerator("fp32")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_batches_in_step():
    own = [(torch.ones(2, 3, 4, 4), torch.tensor([1, 2]))]
    batches = list(in_step(lambda: own, (0, 3, 4, 4), Processes(3)))
    assert [len(labels) for _, labels in batches] == [2, 0, 0]
    assert batches[2][0].shape == (0, 3, 4, 4)
    again = Repeatable(lambda: own)
    assert len(list(again)) == len(list(again)) == 1
