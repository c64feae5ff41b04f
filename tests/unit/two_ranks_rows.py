"""What two processes find where rows and heads alone are exchanged; see `two_ranks.py`."""

import itertools

import torch
import torch.distributed as dist

from flashomni.parallel import Layout, Shard
from flashomni.parallel.ranks import Ranks

STREAMS = {"one": (17,), "short": (1, 40), "empty": (0, 5), "three": (3, 17, 2)}
HEADS = (2, 5)
LIES = ("apart", "heads first", "in a joined projection")
CASES = [f"{s}, {h} heads, {lies}" for s, h, lies in itertools.product(STREAMS, HEADS, LIES)]


def laid(parts, lies):
    """Tensors ``[B, R, H, D]`` with the same values, which lie in memory in another way."""
    if lies == "heads first":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
    if lies == "in a joined projection":
        joined = torch.cat([x.flatten(2) for x in parts], -1).chunk(len(parts), -1)
        return [x.unflatten(2, parts[0].shape[2:]) for x in joined]
    return parts


def there_and_back(ranks, case):
    """Whether q, k and v arrive, waited for in another order; and O of two of them behind."""
    streams, heads, lies = case.split(", ")
    layout, num_heads = Layout.split(STREAMS[streams], ranks.size), int(heads.split()[0])
    shard = Shard(ranks, layout, STREAMS)
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 2, layout.seqlen, num_heads, 4, generator=draw)
    places = [slice(*place) for _, place in layout.pieces(ranks.rank)]
    mine = [torch.cat([x[:, place] for place in places], 1) for x in whole]
    sent = [shard.send_heads(x) for x in laid(mine, lies)]
    came = [each.wait() for each in reversed(sent)][::-1]
    own = shard.heads(num_heads)
    there = all(map(torch.equal, came, whole[:, :, :, own.start : own.stop]))
    back = [shard.send_rows(x, num_heads) for x in laid(came, lies)]
    return there and all(map(torch.equal, [each.wait() for each in reversed(back)][::-1], mine))


def found():
    ranks = Ranks(dist.group.WORLD)
    return {case: there_and_back(ranks, case) for case in CASES}
