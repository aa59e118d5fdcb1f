"""The examples in docstrings say what happens. Those that need a network are marked there to be skipped."""

import copy
import doctest
import importlib
import pkgutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import etf_zoo
from etf_zoo.frames import simplex_etf
from etf_zoo.layers.classifier import FrameClassifier
from etf_zoo.weights.native import cards_folder

PACKAGES = ("etf_zoo.models", "etf_zoo.layers", "etf_zoo.weights")
MODULES = [
    f"{package}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
] + ["etf_zoo.sharing.plain", "etf_zoo.errors"]
# what a reader has imported, or has at hand
NAMES = {
    "copy": copy,
    "Path": Path,
    "timm": timm,
    "torch": torch,
    "nn": nn,
    "etf_zoo": etf_zoo,
    "simplex_etf": simplex_etf,
    "FrameClassifier": FrameClassifier,
    "frame_heads": etf_zoo.frame_heads,
    "cards_folder": cards_folder,
}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(etf_zoo.__file__).parents[1])
    module = importlib.import_module(name)
    names = {**NAMES, "model": timm.create_model("test_resnet_etf", num_classes=5), "folder": tmp_path}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = doctest.testmod(module, extraglobs=names)
    assert results.failed == 0
