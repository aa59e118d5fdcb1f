"""What depends on the launch: precision, and batches in step."""

import pytest
import timm
import torch

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.trainer.recipe.config import Recipe
from etf_zoo.trainer.run.launching import Repeatable, in_step, make_accelerator
from etf_zoo.trainer.run.stepper import prepare


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


@pytest.mark.parametrize(("classes", "width"), [(9, None), (5000, 300)])
def test_processes_send_nothing_of_a_frame(classes, width):
    """All that DDP would broadcast of a fixed head is its scale: neither matrix nor sign bits nor rotation."""
    model = timm.create_model("test_resnet_etf", num_classes=classes, frame="kerdock", neck="mlp", neck_features=width)
    prepared, _ = prepare(Recipe(), make_accelerator("fp32"), model)
    kept = set(prepared._ddp_params_and_buffers_to_ignore)
    head = {name: b for name, b in prepared.named_buffers() if name.startswith("fc.") and ".neck." not in name}
    assert {"fc.signs", "fc.rotation", "fc.weight", "fc.logit_scale"} <= set(head)
    assert set(head) - kept == {"fc.logit_scale"}
    assert not any(name in kept for name, _ in prepared.named_parameters())
