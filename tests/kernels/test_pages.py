"""Bounds of pages for one query over a store whose size stands still: the kernel against a loop, and page by page."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton, which has no wheel for this platform")

from saccade.kernels.triton_pages import page_scores

INF = float("inf")


@pytest.mark.parametrize(
    ("B", "H", "G", "M", "L", "block", "D", "spare", "now"),
    [(2, 4, 2, 300, 130, 8, 16, 0, 0), (1, 4, 1, 95, 95, 7, 12, 5, 3), (1, 2, 2, 640, 1, 16, 32, 2, 0)],
)
def test_matches_loop(B, H, G, M, L, block, D, spare, now):
    q, k = torch.randn(B, H, 1, D), torch.randn(B, G, M + 11, D)[:, :, :M]
    k[:, :, L:] = float("nan")
    pages, own = -(-M // block), (L - 1) // block
    rows = torch.full((B, G, pages + 3, 2 * D), float("nan"))
    for page in range(own):
        part = k[:, :, page * block : (page + 1) * block]
        rows[:, :, page] = torch.cat((part.amin(2), part.amax(2)), -1)
    got = page_scores(q, k, rows, block, torch.tensor([L]), pages, spare, torch.tensor([now]), INF)
    assert got.shape == (B, H, 1, pages + spare)
    for b in range(B):
        for h in range(H):
            x = q[b, h, 0].double()
            for page in range(pages):
                if page >= own:
                    want = INF if page == own else -INF
                else:
                    part = k[b, h // (H // G), page * block : (page + 1) * block].double()
                    want = float(torch.maximum(x * part.amin(0), x * part.amax(0)).sum())
                assert float(got[b, h, 0, page]) == pytest.approx(want, rel=1e-5, abs=1e-5)
            assert got[b, h, 0, pages:].tolist() == [INF] * now + [-INF] * (spare - now)
    # the newest page's bounds are those of what it holds
    part = k[:, :, own * block : L]
    assert torch.equal(rows[:, :, own], torch.cat((part.amin(2), part.amax(2)), -1))
    assert rows[:, :, own + 1 :].isnan().all()
