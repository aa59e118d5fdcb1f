"""Where a recipe's model is."""

import pytest
import timm

from etf_zoo.trainer.run.model import find_model
from etf_zoo.weights.native import native_tags


@pytest.mark.parametrize("architecture", sorted({name.partition(".")[0] for name in native_tags()}))
def test_a_name_without_a_tag_is_what_timm_makes_of_it(architecture):
    made = timm.create_model(architecture, pretrained=True).pretrained_cfg
    found = find_model(architecture, pretrained=True)
    assert found.input_size == made["input_size"][-1]
    assert found.identity == find_model(f"{architecture}.{made['tag']}").identity
