"""Fine-tune a backbone behind a fixed frame in a loop of one's own: `python examples/finetune_loop.py`."""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import etf_zoo


def load_images(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits as images `(N, 3, size, size)` in 0..1, shuffled, and their labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None].expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images[order], torch.from_numpy(digits.target)[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mobilenetv3_small_100_etf", help="a twin, or any timm name")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1200, help="training images; the rest is for testing")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = load_images(64)

    model = timm.create_model(args.model, pretrained=True, num_classes=10)
    if not etf_zoo.frame_heads(model):  # a plain timm model
        model = etf_zoo.attach_frame(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # the frame is a buffer: no parameter, no decay

    for epoch in range(args.epochs):
        model.train()
        for batch in torch.randperm(args.images).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            right = [(model(x).argmax(1) == y) for x, y in zip(images.split(256), labels.split(256), strict=True)]
        top1 = 100 * torch.cat(right)[args.images :].float().mean()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test top-1 {top1:.2f} %")


if __name__ == "__main__":
    main()
