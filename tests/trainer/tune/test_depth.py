"""Probes by depth."""

import numpy as np
import pytest
import timm
import torch

from etf_zoo.errors import EtfZooError
from etf_zoo.metrics import mean_energy_share, participation_ratio
from etf_zoo.trainer.data.batches import Split
from etf_zoo.trainer.tune.depth import LAST, probe_by_depth, stage_features
from etf_zoo.trainer.tune.probes import backbone_features, fit_probe


def split(rows=24):
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 3
    images = rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    images[:, :, :, 0] = np.minimum(255, images[:, :, :, 0] // 4 + 80 * labels[:, None, None])
    return Split(images, labels, list("abc"), "made up")


@pytest.mark.parametrize("name", ["test_resnet_etf", "test_vit_etf"])
def test_stages_are_pooled_outputs_of_the_modules(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **({"img_size": 32} if "vit" in name else {})).eval()
    images = split()
    stages = stage_features(model, images, size=32, batch_size=7)
    torch.testing.assert_close(stages[LAST], backbone_features(model, images, size=32))
    seen = {}
    for stage in stages:
        if stage != LAST:
            model.get_submodule(stage).register_forward_hook(lambda _, __, out, stage=stage: seen.update({stage: out}))
    backbone_features(model, images, size=32)
    assert len(seen) > 1
    for stage, out in seen.items():
        if out.ndim == 3:  # tokens, the class token and registers before those of the image
            out = out[:, model.num_prefix_tokens :].transpose(1, 2)[..., None]
        assert stages[stage].shape == (24, out.shape[1])
        torch.testing.assert_close(stages[stage], out.mean((2, 3)), atol=1e-5, rtol=1e-4)


def test_each_stage_is_probed_and_measured():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    images, labels = split(), torch.arange(24) % 3
    stages = stage_features(model, images, size=32)
    rows = probe_by_depth(stages, labels, stages, labels, list("abc"), strength=1.0)
    assert [row["stage"] for row in rows] == list(stages)
    for row in rows:
        features = stages[row["stage"]]
        probe = fit_probe("linear_probe", features, labels, list("abc"), strength=1.0)
        assert row["top1"] == pytest.approx(100 * (probe.predict(features.numpy()) == labels.numpy()).mean())
        assert row["mean_energy_share"] == mean_energy_share(features)
        assert row["participation_ratio"] == participation_ratio(features)
        assert row["width"] == features.shape[1]


def test_a_model_without_stages_is_refused():
    with pytest.raises(EtfZooError, match="gives no intermediate outputs"):
        stage_features(torch.nn.Linear(2, 3), split(), size=32)
