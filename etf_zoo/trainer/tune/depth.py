"""Where in a backbone the classes show: probes on each stage's pooled output, and what the last features are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from etf_zoo.errors import EtfZooError
from etf_zoo.metrics import mean_energy_share, participation_ratio

from ..data.augment import colors_of
from ..data.batches import eval_batches
from ..data.subsets import Images
from .probes import fit_probe

__all__ = ["LAST", "probe_by_depth", "stage_features"]

LAST = "features"  # the penultimate features, what every other probe is fitted to


@torch.no_grad()
def stage_features(
    model: nn.Module, split: Images, *, size: int, batch_size: int = 256, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Each stage's output, averaged over the image, and the penultimate features, of a timm model in evaluation mode.

    Stages are timm's `feature_info`: of a convolutional network one for each size of its maps, of a ViT each block.

    Args:
        model: A timm model that has `forward_intermediates`.
        split: Images.
        size: In pixels.
        batch_size: Images at a time.
        device: Where to compute.

    Returns:
        Name of the stage -> `(N, width)` float32 on the CPU, from the image on; the last is `features`.

    Raises:
        EtfZooError: If the model gives no intermediate outputs, or an image cannot be read.
    """
    whole: Any = model.to(device).eval()
    if not hasattr(whole, "forward_intermediates") or not hasattr(whole, "feature_info"):
        raise EtfZooError(f"{type(model).__name__} gives no intermediate outputs: its depth cannot be probed.")
    names = [info["module"] for info in _info(whole.feature_info)]
    found: dict[str, list[Tensor]] = {name: [] for name in [*names, LAST]}
    batches = eval_batches(split, size=size, batch_size=batch_size, colors=colors_of(model), device=device)
    for images, _ in tqdm(batches, total=-(-len(split) // batch_size), desc="stages", mininterval=5, disable=None):
        hidden, maps = whole.forward_intermediates(images, output_fmt="NCHW")
        for name, stage in zip(names, maps, strict=True):
            found[name].append(stage.float().mean(dim=(2, 3)).cpu())
        found[LAST].append(whole.forward_head(hidden, pre_logits=True).flatten(1).float().cpu())
    stages = {name: torch.cat(parts) for name, parts in found.items()}
    if len(stages[LAST]) != len(split):
        raise EtfZooError(f"{len(split) - len(stages[LAST])} images of {split.source} cannot be read: remove them.")
    return stages


def _info(feature_info: Any) -> list[dict[str, Any]]:
    return feature_info if isinstance(feature_info, list) else list(feature_info.info)


def probe_by_depth(
    train: dict[str, Tensor],
    labels: Tensor,
    test: dict[str, Tensor],
    truth: Tensor,
    names: list[str],
    *,
    method: str = "linear_probe",
    seed: int = 0,
    strength: float = 0.0,
) -> list[dict[str, Any]]:
    """Fit a probe to each stage, and measure its features.

    Args:
        train: Stages of the training images, see `stage_features`.
        labels: `(N,)`.
        test: Stages of the test images.
        truth: Their labels.
        names: Of the classes.
        method: See `fit_probe`, as the next two.
        seed: See `fit_probe`.
        strength: See `fit_probe`.

    Returns:
        For each stage, from the image on: `stage`, `width`, `top1` on the test images, `chosen`, and of the training
        images' features `mean_energy_share` and `participation_ratio`.
    """
    rows = []
    for stage, features in train.items():
        probe = fit_probe(method, features, labels, names, seed=seed, strength=strength)
        right = torch.from_numpy(probe.predict(test[stage].numpy())) == truth
        rows.append(
            {
                "stage": stage,
                "width": features.shape[1],
                "top1": 100 * right.double().mean().item(),
                "chosen": probe.chosen,
                "mean_energy_share": mean_energy_share(features),
                "participation_ratio": participation_ratio(features),
            }
        )
    return rows
