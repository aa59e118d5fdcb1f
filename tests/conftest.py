"""Shared by all tests: no network, few threads, one tiny model folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as there is a worker for each core
os.environ["ETF_ZOO_MEASURE"] = "0"  # no result depends on the clock

import pytest
import timm
import torch

import etf_zoo  # noqa: F401  registers the twins
from etf_zoo.sharing.folder import save_folder
from tests.loopback_hub import LoopbackHub

TINY = "mobilenetv3_small_050_etf"

_register, _kept = torch.jit._builtins._register_builtin, []


def _keep(function, name):
    """TorchScript knows the functions of `torch.ops` by their addresses, and those that a compiler drops as well.

    What is made at such an address later, a layer's list of paddings, "cannot be used as a value". So none is dropped.
    """
    _kept.append(function)
    _register(function, name)


torch.jit._builtins._register_builtin = _keep


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=5, orientation="blocks").eval()


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A saved model of five classes."""
    return save_folder(
        tiny_model,
        tmp_path / "model",
        pretrained_cfg={"input_size": (3, 32, 32), "license": "apache-2.0", "tag": "test"},
        label_names=list("abcde"),
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A loopback Hub that huggingface_hub talks to, without a token and with an empty cache in `tmp_path / "home"`."""
    with LoopbackHub() as server:
        server.use(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def no_waiting(monkeypatch):
    """No wait between tries takes any time; a list of the seconds asked for."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits
