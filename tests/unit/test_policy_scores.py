"""The scores that policies choose by are those of attention: its scale, no padding, all digits."""

import pytest
import torch
from policy_cases import GRIDS, NAMES, SET, inputs, progress

from flashomni.policies import AttentionSite, make_policy
from flashomni.symbols import Grid
from flashomni.symbols.choice.op import pooled_map


def test_pooled_map_is_softmax_of_mean_scores():
    """Padding takes part in no mean and gets no mass; rows sum to 1; GQA repeats key heads."""
    grid = GRIDS["text last"]
    q, k = inputs(grid)
    got = pooled_map(q, k, grid)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
    for head, kv_head in ((1, 0), (3, 1)):
        means = [k[1, j * 128 : min((j + 1) * 128, 430), kv_head].mean(0) for j in range(4)]
        score = torch.stack([q[1, 128:256, head].mean(0) @ mean for mean in means]) * 16**-0.5
        torch.testing.assert_close(got[1, head, 1], score.softmax(0), atol=1e-5, rtol=1e-4)
    means = [k[1, j * 128 : min((j + 1) * 128, 430), 1].mean(0) for j in range(4)]
    score = torch.stack([q[1, 384:430, 3].mean(0) @ mean for mean in means]) * 16**-0.5
    torch.testing.assert_close(got[1, 3, 3], score.softmax(0), atol=1e-5, rtol=1e-4)
    for x in (q, k):
        x[1, 430:] = torch.nan  # whatever padding holds
    torch.testing.assert_close(pooled_map(q, k, grid), got)
    short = Grid(500, 500, (400, 500), kv_len=torch.tensor([500, 120], dtype=torch.int32))
    assert (pooled_map(q, k, short)[1, ..., 1:] == 0).all()


def test_centred_keys_keep_their_digits():
    """What all keys share changes no softmax, but fp32 has few digits left beside it."""
    grid = Grid(512, 512)
    q, k = inputs(grid, kv_heads=4)
    k += 3e4
    means = [x.double().unflatten(1, (4, 128)).mean(2).transpose(1, 2) for x in (q, k)]
    exact = (means[0] @ means[1].mT * 16**-0.5).softmax(-1)
    errors = [(pooled_map(q, k, grid, flag) - exact).abs().max() for flag in (True, False)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, SET.get(name, {})) for name in NAMES), ("flashomni", {"resolution": 16})],
    ids=str,
)
def test_policies_score_as_attention_does(name, settings):
    """A scale twice as large chooses what queries twice as large choose."""
    grid = GRIDS["text first"]
    q, k = inputs(grid)
    policy, scale = make_policy(name, **settings), 2 * q.shape[-1] ** -0.5
    got = policy(AttentionSite.alone(q, k, grid, progress(), softmax_scale=scale))
    want = policy(AttentionSite.alone(2 * q, k, grid, progress()))
    assert torch.equal(got.q_bits, want.q_bits) and torch.equal(got.kv_bits, want.kv_bits)


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_are_padding_have_no_say(name):
    """Whatever they hold, the same is chosen."""
    grid = GRIDS["text last"]
    q, k = inputs(grid)
    loud = k.clone()
    loud[1, 430:] = 50.0
    policy = make_policy(name, **SET.get(name, {}))
    got, want = (policy(AttentionSite.alone(q, x, grid, progress())) for x in (loud, k))
    assert torch.equal(got.q_bits, want.q_bits) and torch.equal(got.kv_bits, want.kv_bits)
