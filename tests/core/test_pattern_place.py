"""Patterns without tensors of their own are worked out where the call's positions lie."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.pattern import Blocks, Full, Union, Window


@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        Window(2, 3),
        Union((Window(1, 2), Full())),
        Union((Window(1, 2), Blocks(torch.zeros(1, 1, 1, 1, dtype=torch.int32, device="meta"), 4, 4))),
    ],
)
def test_the_mask_lies_where_the_positions_are(pattern):
    # an evicted store on another device than the CPU: meta stands for a GPU here
    q, k = torch.zeros(1, 2, 3, 4, device="meta"), torch.zeros(1, 1, 7, 4, device="meta")
    places = dict(
        q_pos=torch.arange(20, 23, device="meta")[None], k_pos=torch.arange(16, 23, device="meta")[None, None]
    )
    found = pattern.mask(Call.of(q, k, **places))
    assert found.device.type == "meta" and found.shape == (1, 2, 3, 7)
