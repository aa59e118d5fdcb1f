"""Draw the pictures of docs/frames.md: `python docs/pictures.py`, half a minute."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from etf_zoo.frames import Hierarchy, best_frame, hierarchy_frame, random_frame, simplex_etf, spherical_code

FOLDER = Path(__file__).parent / "pictures"
COLOR = "tab:blue"


def coherence(frame: torch.Tensor) -> float:
    """Largest cosine between two rows."""
    return (frame @ frame.T - 2 * torch.eye(len(frame))).max().item()


def reach(frame: torch.Tensor) -> torch.Tensor:
    """Best cosine of a nonnegative unit vector with each row `(K,)`: that of its positive part."""
    return frame.clamp_min(0).norm(dim=1)


def draw_frames() -> None:
    """Frames one can see: in the plane and in space."""
    figure = plt.figure(figsize=(9, 3))
    flat = figure.add_subplot(1, 3, 1, aspect="equal", title="simplex, K = 3, d = 2")
    for x, y in simplex_etf(3, 2, orientation="random").tolist():
        flat.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": COLOR})
    flat.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.8"))
    flat.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    flat.axis("off")
    for place, (name, frame) in enumerate(
        {
            "simplex, K = 4, d = 3": simplex_etf(4, 3, orientation="random"),
            "code, K = 12, d = 3": spherical_code(12, 3),
        }.items()
    ):
        space = figure.add_subplot(1, 3, 2 + place, projection="3d", title=name)
        for row in frame:
            space.plot(*([0.0, value] for value in row.tolist()), color=COLOR, marker="o", markersize=3)
        space.set_box_aspect((1, 1, 1))
        space.set_axis_off()
    save(figure, "frames")


def draw_orientation() -> None:
    """How near nonnegative features come to their prototype."""
    classes, dim = [2, 4, 8, 16, 32, 64, 128, 256], 512
    figure, axes = plt.subplots(figsize=(5, 3))
    for orientation in ("blocks", "random"):
        reached = [reach(simplex_etf(k, dim, orientation=orientation)).mean().item() for k in classes]
        axes.plot(classes, reached, marker="o", label=orientation)
    axes.set(xscale="log", xlabel="classes K, 512 features", ylabel="best cosine, features ≥ 0", ylim=(0.6, 1.02))
    axes.legend()
    save(figure, "orientation")


def draw_coherence() -> None:
    """Largest cosine of the frames that `auto` takes, beside random directions."""
    dim, classes = 16, [4, 8, 12, 17, 18, 24, 32, 33, 40, 64, 96]
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(classes, [coherence(best_frame(k, dim)) for k in classes], marker="o", label="auto")
    axes.plot(classes, [coherence(random_frame(k, dim, seed=0)) for k in classes], marker="o", label="random")
    for k in (dim + 1, 2 * dim):
        axes.axvline(k, color="0.8", zorder=0)
    axes.set(xlabel="classes K, 16 dimensions", ylabel="largest cosine")
    axes.legend()
    save(figure, "coherence")


def draw_hierarchy() -> None:
    """Cosines of a frame that follows a tree."""
    names = ["beagle", "terrier", "lion", "tiger", "oak", "birch", "rose", "tulip"]
    groups = {"dog": names[:2], "cat": names[2:4], "tree": names[4:6], "flower": names[6:]}
    parents = {child: parent for parent, children in groups.items() for child in children}
    tree = Hierarchy(parents | {"dog": "animal", "cat": "animal", "tree": "plant", "flower": "plant"}
                     | {"animal": "thing", "plant": "thing"})  # fmt: skip
    frame = hierarchy_frame(tree.distances(names), 16)
    figure, axes = plt.subplots(figsize=(4.5, 3.6))
    image = axes.imshow(frame @ frame.T, vmin=-1, vmax=1, cmap="RdBu")
    axes.set_xticks(range(8), names, rotation=90)
    axes.set_yticks(range(8), names)
    figure.colorbar(image, label="cosine")
    save(figure, "hierarchy")


def save(figure: plt.Figure, name: str) -> None:
    """Write a picture."""
    FOLDER.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_frames()
    draw_orientation()
    draw_coherence()
    draw_hierarchy()
