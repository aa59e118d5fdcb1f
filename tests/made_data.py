"""Small data sets, made up: images whose mean says which they are."""

import io

import numpy as np
from PIL import Image


def picture(number, size=(30, 20)):
    """A noisy image about as bright as its number."""
    noise = np.random.default_rng(number).integers(0, 9, (size[1], size[0], 3))
    return Image.fromarray((2 * number + noise).astype(np.uint8))


def png(number, size=(30, 20)):
    file = io.BytesIO()
    picture(number, size).save(file, "png")
    return file.getvalue()


def numbers(images):
    """Which pictures these are, from pixels `(N, ..., 3)` or `(N, 3, ...)` in 0..255."""
    return [round((float(np.asarray(image, dtype=float).mean()) - 4) / 2) for image in images]


def write_parquet(folder, splits, names=None, shards=1, broken=(), size=(30, 20)):
    """`data/SPLIT-*.parquet` as `datasets` writes them; splits: {name: labels}, pictures numbered from 0 in each."""
    import datasets

    (folder / "data").mkdir(parents=True)
    label = datasets.ClassLabel(names=names) if names else None
    for split, labels in splits.items():
        images = [{"bytes": b"no image" if i in broken else png(i, size), "path": None} for i in range(len(labels))]
        kind = label or datasets.Value("string" if isinstance(labels[0], str) else "int64")
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        for i in range(shards):
            part = rows.shard(shards, i, contiguous=True)
            part.to_parquet(folder / "data" / f"{split}-{i:05d}-of-{shards:05d}.parquet")
    return folder


def write_folder(folder, splits):
    """`SPLIT/CLASS/N.png`; splits: {name: {class: numbers}}."""
    for split, classes in splits.items():
        for name, members in classes.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in members:
                picture(number).save(folder / split / name / f"{number:03d}.png")
    return folder
