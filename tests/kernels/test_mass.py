"""key_mass against the definition, a query at a time."""

import math

import pytest
import torch

from saccade.core.call import Call
from saccade.kernels import mass
from saccade.kernels.mass import key_mass


@pytest.mark.parametrize("tile", [1, 200, 1 << 22])
@pytest.mark.parametrize("holes", [False, True])
def test_sums_the_weights_of_every_query(tile, holes, monkeypatch):
    monkeypatch.setattr(mass, "TILE", tile)
    B, H, G, N, M, D = 2, 4, 2, 7, 19, 5
    q, k = torch.randn(B, H, N, D).double(), torch.randn(B, G, M, D).double()
    call = Call.of(q, k, scale=0.7)
    if holes:
        k_pos = torch.stack([torch.randperm(60)[:M].sort().values for _ in range(B * G)]).view(B, G, M)
        k_pos[:, :, 3] = -1
        q_pos = torch.arange(30, 37).repeat(B, 1)
        q_pos[1, 2] = -1
        call = Call.of(q, k, scale=0.7, q_pos=q_pos, k_pos=k_pos)
    q_pos, k_pos = call.positions()
    want = torch.zeros(B, H, M).double()
    for b in range(B):
        for h in range(H):
            for i in range(N):
                p, at = (
                    int(q_pos[min(b, len(q_pos) - 1), i]),
                    k_pos[min(b, len(k_pos) - 1)][min(h // 2, k_pos.shape[1] - 1)],
                )
                seen = [j for j in range(M) if 0 <= at[j] <= p]
                weights = [math.exp(0.7 * float(q[b, h, i] @ k[b, h // 2, j])) for j in seen]
                for j, w in zip(seen, weights, strict=True):
                    want[b, h, j] += w / sum(weights)
    torch.testing.assert_close(key_mass(q, k, call), want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 3), (64, 64, 8), (70, 131, 20), (17, 150, 16)])
def test_the_kernel_gives_the_same(N, M, D, causal):
    kernels = pytest.importorskip("saccade.kernels.select.triton_key_mass", reason="Triton is not installed")
    q, k = torch.randn(2, N, 4, D).transpose(1, 2), 2 * torch.randn(2, M, 2, D).transpose(1, 2)
    call = Call.of(q, k, scale=0.7, causal=causal)
    want = key_mass(q.double(), k.double(), Call.of(q.double(), k.double(), scale=0.7, causal=causal))
    found = kernels.key_mass(q, k, call)
    torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=1e-5)
    assert abs(found.sum(-1) - N).max() < 1e-3
