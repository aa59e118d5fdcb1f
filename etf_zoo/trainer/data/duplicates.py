"""Images that are there twice: byte for byte, or to the eye, by a perceptual hash and a thumbnail.

The hash is the difference hash (dHash): of a gray picture of 9 x 8 pixels, whether each is brighter than the next. Two
images look the same if their hashes differ in few bits and their thumbnails, compared as vectors, nearly agree.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from etf_zoo.images import UnreadableImageError, read_image, to_rgb

from .decode import decoders, end_with_parent
from .places import cache_root
from .sources import Chosen, Rows

__all__ = ["Prints", "connected", "difference_hash", "group_rows", "joined", "prints", "same_looks", "shared_images"]

MOST = 30_000  # images that are compared with one another; of more, a look at all pairs takes too long
BITS = 6  # hashes of images that look the same differ in at most so many of 64
ALIKE = 0.98  # and their thumbnails have at least this correlation
FLAT = 3.0  # gray levels: below this spread a thumbnail has no pattern to compare
THUMB = 16  # pixels


@dataclass(frozen=True)
class Prints:
    """What tells images apart.

    Attributes:
        exact: `(N,)` uint64, from all bytes of a file, or all pixels of a decoded image.
        hashes: `(N,)` uint64 difference hashes.
        thumbs: `(N, 16, 16, 3)` uint8.
        readable: `(N,)`, false where there is no image, whose other entries say nothing.
    """

    exact: np.ndarray
    hashes: np.ndarray
    thumbs: np.ndarray
    readable: np.ndarray

    def __len__(self) -> int:
        return len(self.exact)


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each pixel of a small gray picture is brighter than its right neighbor."""
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (gray[:, 1:] < gray[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _print(image: Image.Image, content: bytes) -> tuple[int, int, np.ndarray]:
    exact = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    thumb = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BILINEAR))
    return exact, difference_hash(image), thumb


class _Printed(Dataset):
    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        try:
            data = self.rows.encoded(row)
            return _print(_small(data), data)
        except UnreadableImageError as error:
            return str(error)


def _small(data: bytes) -> Image.Image:
    """An image at a fraction of its size where its format allows to decode it so, which is many times as fast."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG" and image.mode in ("L", "RGB"):
                image.draft(image.mode, (4 * THUMB, 4 * THUMB))
                return to_rgb(image)
    except Exception:
        pass  # what is wrong is said by the next line
    return read_image(data)


def prints(split: Chosen) -> Prints:
    """What tells the images of a split apart; unreadable ones are noted. Of encoded ones it is kept in $ETF_ZOO_CACHE.

    Raises:
        EtfZooError: If too many cannot be read; all of them are named.
    """
    if not isinstance(split, Rows):
        found = [
            _print(Image.fromarray(np.ascontiguousarray(p)), p.tobytes()) for p in map(split.picture, range(len(split)))
        ]
        return _packed(found)
    file = cache_root() / "prints" / f"{split.digest[:24]}.npz"
    if file.is_file():
        try:
            with open(file, "rb") as opened, np.load(opened) as kept:
                return Prints(**{name: kept[name] for name in ("exact", "hashes", "thumbs", "readable")})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            file.unlink(missing_ok=True)  # damaged; it is made anew
    loader = DataLoader(
        _Printed(split),
        batch_size=None,
        num_workers=decoders(min(8, len(split) // 256)),
        collate_fn=_as_it_is,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    found = list(tqdm(loader, desc=f"Looking at {split.name}", unit="image", delay=5, mininterval=5))
    for row, one in enumerate(found):
        if isinstance(one, str):
            split.corrupt.add(split.where(row), one)
    split.corrupt.check()
    packed = _packed(found)
    if packed.readable.all():  # else the next start has to name those that are not
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".writing-", delete=False) as new:
            np.savez(new, **vars(packed))
        os.replace(new.name, file)  # another process sees all of it or nothing
    return packed


def _as_it_is(item: Any) -> Any:
    return item


def _packed(found: list[Any]) -> Prints:
    readable = np.array([not isinstance(one, str) for one in found], dtype=bool)
    exact, hashes = np.zeros(len(found), np.uint64), np.zeros(len(found), np.uint64)
    thumbs = np.zeros((len(found), THUMB, THUMB, 3), np.uint8)
    for row in np.flatnonzero(readable):
        exact[row], hashes[row], thumbs[row] = found[row]
    return Prints(exact, hashes, thumbs, readable)


def same_looks(a: Prints, b: Prints | None = None) -> np.ndarray:
    """Pairs of images that look the same, `(M, 2)`: of one set, each pair once, or of two.

    Args:
        a: The first set, whose numbers stand in the first column.
        b: The second; the first by default.
    """
    other = a if b is None else b
    left, right = _vectors(a.thumbs), _vectors(other.thumbs)
    pairs = []
    for start in range(0, len(a), 512):
        far = np.bitwise_count(a.hashes[start : start + 512, None] ^ other.hashes[None])
        i, j = np.nonzero(far <= BITS)
        i += start
        keep = a.readable[i] & other.readable[j] & ((i < j) if b is None else True)
        i, j = i[keep], j[keep]
        pairs.append(np.stack([i, j], 1)[_alike(left, right, i, j)])
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), int)


def _vectors(thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centered unit vectors of thumbnails, their means `(N, 3)`, and their spreads in gray levels."""
    flat = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    centered = flat - flat.mean(1, keepdims=True)
    spread = centered.std(1)
    return centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-6), thumbs.mean((1, 2)), spread


def _alike(left: Any, right: Any, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    cosine = np.einsum("nd,nd->n", left[0][i], right[0][j])
    # without a pattern only the color is left to compare, and it has to be the same
    is_flat = np.maximum(left[2][i], right[2][j]) < FLAT
    same_color = np.abs(left[1][i] - right[1][j]).max(1, initial=0) < 1
    return np.where(is_flat, same_color, cosine >= ALIKE)


def connected(pairs: np.ndarray, count: int) -> np.ndarray:
    """Numbers of groups `(count,)`: images that a chain of pairs connects have the same.

    Args:
        pairs: `(M, 2)` numbers of images.
        count: How many images there are.

    Example:
        >>> connected(np.array([[0, 2], [2, 3]]), 5).tolist()
        [0, 1, 0, 0, 2]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def joined(*groupings: np.ndarray) -> np.ndarray:
    """Groups `(N,)` that keep together what any of several groupings `(N,)` does.

    Example:
        >>> joined(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])).tolist()
        [0, 0, 0, 1]
    """
    pairs = []
    for groups in groupings:
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        pairs.append(np.stack([first[group], np.arange(len(groups))], 1))
    return connected(np.concatenate(pairs), len(groupings[0]))


def shared_images(a: Chosen, b: Chosen) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images `(M, 2)`, one of each split: the same byte for byte, and others that look the same.

    Nothing is compared among more than 30,000.
    """
    if max(len(a), len(b)) > MOST:
        return np.zeros((0, 2), int), np.zeros((0, 2), int)
    left, right = prints(a), prints(b)
    pairs = same_looks(left, right)
    is_copy = left.exact[pairs[:, 0]] == right.exact[pairs[:, 1]]
    return pairs[is_copy], pairs[~is_copy]


def group_rows(split: Chosen) -> np.ndarray:
    """Numbers of groups of images that look the same, `(N,)`; each image is its own among more than 30,000."""
    if len(split) > MOST:
        return np.arange(len(split))
    return connected(same_looks(prints(split)), len(split))
