"""What is true of dense: it is softmax attention."""

import pytest
import torch

from saccade.core.call import Call
from saccade.methods.controls.dense import Dense


@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 7), (65, 65), (1, 129), (17, 200)])
def test_equals_torch(N, M):
    torch.manual_seed(N)
    q, k, v = torch.randn(2, 4, N, 8), torch.randn(2, 2, M, 8), torch.randn(2, 2, M, 8)
    call = Call.of(q, k)
    seen = torch.ones(N, M, dtype=torch.bool).tril(M - N)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(Dense().attend(q, k, v, call).o, want, atol=1e-5, rtol=1e-5)
    assert Dense().select(q, k, call).density(call) == 1.0
    assert Dense().estimate(call) == 0.0


def test_stands_anywhere():
    assert Dense().phases == ("prefill", "decode")
    assert Dense() == Dense()
