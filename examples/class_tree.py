"""A frame that follows a tree of classes: `python examples/class_tree.py`."""

import timm
import torch

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.frames import Hierarchy
from etf_zoo.losses import HierarchyCosineLoss
from etf_zoo.metrics import MistakeSeverity

NAMES = ["beagle", "terrier", "tabby", "oak", "birch"]
TREE = Hierarchy(
    {
        "beagle": "dog",
        "terrier": "dog",
        "tabby": "cat",
        "oak": "tree",
        "birch": "tree",
        "dog": "animal",
        "cat": "animal",
        "animal": "living",
        "tree": "living",
    }
)


def main() -> None:
    distances = TREE.distances(NAMES)  # heights of lowest common ancestors
    model = timm.create_model("resnet18_etf", num_classes=len(NAMES), frame="hierarchy", hierarchy=distances)
    head = model.get_classifier()
    print("cosines between the classes:")
    for name, row in zip(NAMES, head.weight @ head.weight.T, strict=True):
        print(f"  {name:<8}" + "".join(f"{value:7.2f}" for value in row.tolist()))

    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % len(NAMES)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    loss = HierarchyCosineLoss(logit_scale=head.logit_scale.item())(head.embed(features), labels, head.weight)
    loss.backward()
    print(f"loss {loss.item():.3f}")

    severity = MistakeSeverity(distances)
    severity.update(head(features).detach(), labels)
    print(f"mean height of a mistake: {severity.compute()['severity']:.2f}")


if __name__ == "__main__":
    main()
