"""Every twin, on the meta device: the head finds its place and the model runs. Some minutes, so marked slow."""

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

from etf_zoo import convert_classifier, frame_heads
from etf_zoo.models.tags import classifies

CLASSES = 7


def problem(name):
    """What is wrong with a twin, None if nothing is."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = timm.create_model(name, num_classes=CLASSES).eval()
            out = model(torch.empty(2, *model.pretrained_cfg["input_size"]))
    except Exception as error:
        return repr(error)
    heads = frame_heads(model)
    if not heads or any(not head.weight.is_meta or head.num_classes != CLASSES for head in heads.values()):
        return f"heads {heads}"
    return None if out.shape == (2, CLASSES) else f"output of shape {tuple(out.shape)}"


@pytest.mark.slow
def test_all_twins_on_the_meta_device():
    problems = {name: problem(name) for name in timm.list_models("*_etf")}
    assert len(problems) > 1300
    assert not {name: what for name, what in problems.items() if what}


def conversion_problem(name):
    """What is wrong with a conversion of timm's own model, None if nothing is."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = convert_classifier(timm.create_model(name, num_classes=CLASSES).eval())
            head = next(iter(frame_heads(model).values()))
            shape = (2, head.in_features, 1, 1) if head.channels_first else (2, head.in_features)
            out = head(torch.empty(shape))
            model.reset_classifier(CLASSES + 1)
    except Exception as error:
        return repr(error)
    if out.flatten(1).shape != (2, CLASSES):
        return f"output of shape {tuple(out.shape)}"
    necks = [head for head in frame_heads(model).values() if head.neck is not None or head.num_classes == CLASSES]
    return f"after a reset {necks}" if necks or not frame_heads(model) else None


@pytest.mark.slow
def test_all_classifying_architectures_convert_on_the_meta_device():
    cfgs = [get_pretrained_cfg(name) for name in timm.list_pretrained(exclude_filters="*_etf*")]
    problems = {name: conversion_problem(name) for name in sorted({c.architecture for c in cfgs if classifies(c)})}
    assert len(problems) > 700
    assert not {name: what for name, what in problems.items() if what}
