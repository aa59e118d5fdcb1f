"""A twin inside a LightningModule: training, its checkpoint, and what loads it."""

import pytest
import timm
import torch
from torch.nn import functional as F

import etf_zoo  # noqa: F401  registers the twins

lightning = pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore"),  # of theirs
]


class Classifier(lightning.LightningModule):
    def __init__(self, num_classes=3):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model("test_resnet_etf", num_classes=num_classes)

    def training_step(self, batch, _):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def test_trains_and_comes_back_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(24) % 3
    images = torch.randn(24, 3, 32, 32) + 2 * labels[:, None, None, None]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=12)
    module = Classifier()
    frame = module.model.fc.weight.clone()
    trainer = lightning.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.callback_metrics["loss"] < 0.5
    assert torch.equal(module.model.fc.weight, frame)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(again.eval().model(images), module.eval().model(images))
