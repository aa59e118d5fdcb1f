"""Nested states as safetensors."""

import math
import pickle
import random

import numpy as np
import pytest
import torch

from etf_zoo.trainer.run.state_file import read_state, write_state


class Calls:
    """A pickle of it runs code."""

    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


def test_states_come_back_as_they_were(tmp_path):
    shared = torch.randn(3)
    state = {
        "numbers": [1, 2.5, -0.0, math.inf, 1e-300, 0.1 + 0.2, True, None, "text"],
        3: (shared, shared, torch.tensor(7), torch.zeros(0, 2)),
        "generators": [random.getstate(), torch.get_rng_state()],
        "half": torch.randn(4).bfloat16(),
        "nested": {"": {0: {}}, "list": [[], ()]},
    }
    write_state(state, tmp_path / "state")
    back = read_state(tmp_path / "state")

    def same(one, other):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        elif isinstance(one, dict):
            assert list(one) == list(other)
            [same(one[key], other[key]) for key in one]
        elif isinstance(one, list | tuple):
            assert len(one) == len(other)
            [same(*pair) for pair in zip(one, other, strict=True)]
        else:
            assert repr(one) == repr(other)

    same(state, back)


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 1, 3, 3), (4, 6, 1, 1), (1, 1, 1, 1)])
def test_memory_order_is_kept(tmp_path, shape):
    plain = torch.randn(shape)
    state = [plain, plain.contiguous(memory_format=torch.channels_last), torch.randn(3, 4).T]
    write_state(state, tmp_path / "state")
    for before, after in zip(state, read_state(tmp_path / "state"), strict=True):
        assert torch.equal(before, after)
        assert before.stride() == after.stride()


@pytest.mark.parametrize("content", [Calls(), {"weights": torch.ones(2)}, "text"])
def test_a_pickle_is_refused_and_runs_nothing(tmp_path, content):
    for write in (lambda file: torch.save(content, file), lambda file: file.write_bytes(pickle.dumps(content))):
        write(tmp_path / "state")
        with pytest.raises(ValueError, match="is no state that etf-zoo wrote"):
            read_state(tmp_path / "state")


def test_what_is_no_state(tmp_path):
    for value in (np.ones(2), {"a": object()}, {(1, 2): 3}):
        with pytest.raises(TypeError):
            write_state(value, tmp_path / "state")
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(ValueError, match="is no state"):
        read_state(tmp_path / "state")
    with pytest.raises(ValueError, match="is no state"):
        read_state(tmp_path / "none")
