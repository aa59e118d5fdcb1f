"""Twins inside transformers: its wrapper of timm models, its Trainer, and peft's LoRA on both."""

import json

import pytest
import safetensors.torch
import timm
import torch

from etf_zoo import FrameClassifier, frame_heads
from etf_zoo.sharing.folder import save_folder

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore"),  # of theirs
]
Wrapper = transformers.TimmWrapperForImageClassification


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet_etf", num_classes=20)
    cfg = {"input_size": (3, 32, 32)}
    return save_folder(model, tmp_path_factory.mktemp("model"), pretrained_cfg=cfg, half=False)


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_folder_opens_as_it_is(folder):
    assert "num_classes" not in json.loads((folder / "config.json").read_text())["model_args"]
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    theirs = Wrapper.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images()).logits, ours(images()))


@pytest.mark.parametrize("num_labels", [3, 20])
def test_another_number_of_labels_gets_its_own_frame_and_scale(folder, num_labels, tmp_path):
    model = Wrapper.from_pretrained(folder, num_labels=num_labels, ignore_mismatched_sizes=True)
    head = model.timm_model.fc
    expected = FrameClassifier(96, num_labels)
    assert torch.equal(head.weight, expected.weight)
    assert head.logit_scale == expected.logit_scale
    model.save_pretrained(tmp_path)
    again = Wrapper.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("missing", ["fc.weight", "fc.logit_scale"])
def test_what_a_checkpoint_lacks_is_built(folder, missing, tmp_path):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["fc.logit_scale"].fill_(50)
    del weights[missing]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    head = Wrapper.from_pretrained(tmp_path).timm_model.fc
    expected = FrameClassifier(96, 20)
    assert torch.equal(head.weight, expected.weight)
    assert head.logit_scale == expected.logit_scale


class Data(torch.utils.data.Dataset):
    """Three classes that differ in their brightness."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        label = index % 3
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator) + 2 * label, "labels": label}


def train(model, folder):
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=12, learning_rate=5e-3, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Data())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(folder, tmp_path):
    model = Wrapper.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    frame = model.timm_model.fc.weight.clone()
    losses = train(model, tmp_path / "out")
    assert max(losses) < 20
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.timm_model.fc.weight, frame)
    model.save_pretrained(tmp_path / "saved")
    again = Wrapper.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(images()).logits, model.eval()(images()).logits)


def test_lora(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = Wrapper.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    config = peft.LoraConfig(r=4, target_modules=r".*layer.*conv\d", modules_to_save=["fc"])
    adapted = peft.get_peft_model(model, config)
    assert train(adapted, tmp_path / "out")[-1] < 1.2
    adapted.save_pretrained(tmp_path / "adapter")
    base = Wrapper.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    heads = [list(frame_heads(net).values()) for net in (again, adapted)]
    for ours, theirs in zip(*heads, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert ours.logit_scale == theirs.logit_scale
    for key, value in adapted.get_base_model().state_dict().items():  # statistics of norms are no part of an adapter
        if "running_" in key or "num_batches" in key:
            again.get_base_model().state_dict()[key].copy_(value)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images()).logits, adapted.eval()(images()).logits)


def test_embedded_folders_open():
    from etf_zoo.weights.native import cards_folder

    folder = cards_folder() / "mobilenetv3_small_100_etf.e27_tiny"
    ours = timm.create_model("mobilenetv3_small_100_etf", pretrained=True).eval()
    theirs = Wrapper.from_pretrained(folder, dtype=torch.float32)
    x = torch.randn(2, *ours.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x), atol=1e-4, rtol=1e-4)
