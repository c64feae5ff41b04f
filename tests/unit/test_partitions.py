"""Producer and consumers of the Hopper attention kernels agree, whatever the symbols and lengths.

Their own code runs on the CPU (``partitions``): nobody waits for ever, nobody arrives once too
often, and each tile meets the visits, the masks and the summaries that the definition gives it.
"""

from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from partitions import (
    NOTHING,
    Barrier,
    Desc,
    Machine,
    Pointer,
    Ring,
    Slot,
    Stuck,
    plain,
    stand_ins,
)

from flashomni.kernels.attention._hopper import consumer as attention_consumer
from flashomni.kernels.attention._hopper import producer as attention_producer
from flashomni.kernels.attention._hopper.messages import DEPTH, WORDS
from flashomni.kernels.attention.sm90 import LISTED
from flashomni.kernels.refresh._hopper import consumer as refresh_consumer
from flashomni.kernels.refresh._hopper import producer as refresh_producer

TILE_M = 128
WARPGROUPS = "consumer 0", "consumer 1"


@dataclass
class Case:
    """A call, as one of several programs sees it."""

    seed: int
    kernel: str
    summaries: int = 4
    tile_n: int = 128
    per_block: int = 1
    anchored: bool = True
    sparse: bool = True

    def __post_init__(self):
        self.random = random = np.random.default_rng(self.seed)
        self.batch, self.group = 2, int(random.integers(1, 3))
        self.heads = 2 * self.group
        self.tiles_m = int(random.integers(1, 8))
        self.num_tiles = self.batch * self.heads * self.tiles_m
        self.block_n = self.tile_n * self.per_block
        self.blocks = int(random.integers(1, 70))
        self.seqlen_kv = self.blocks * self.block_n - int(random.integers(0, self.block_n))
        lacks = random.integers(0, 2 * self.block_n, self.batch)
        self.kv_len = np.maximum(self.seqlen_kv - lacks, 0).astype(np.int32)
        if random.random() < 0.3:
            self.kv_len[0] = random.choice([0, 1, self.tile_n, self.seqlen_kv // 2])
        # Rows of every kind: random, none, all, and runs of live blocks as long as summary tiles.
        density = random.choice([0.0, 0.1, 0.5, 0.95, 1.0], (self.batch, self.heads, self.tiles_m))
        self.mask = random.random((*density.shape, self.blocks)) < density[..., None]
        length = min(32, self.tile_n // max(4, self.summaries))
        runs = random.random((*density.shape, self.blocks // length + 1)) < 0.5
        runs = np.repeat(runs, length, -1)[..., : self.blocks]
        self.mask |= runs & (density == 0.5)[..., None]
        self.computed = random.random(density.shape) < 0.8
        row_words = -(-self.blocks // 32)
        bits = np.zeros((*density.shape, row_words * 32), bool)
        bits[..., : self.blocks] = self.mask
        bits[..., self.blocks :] = random.random(row_words * 32 - self.blocks) < 0.5  # of nobody
        self.words = np.packbits(bits, -1, bitorder="little").view(np.int32)
        q_bits = np.zeros((self.batch, self.heads, -(-self.tiles_m // 8) * 8), bool)
        q_bits[..., : self.tiles_m] = self.computed
        self.q_bytes = np.packbits(q_bits, -1, bitorder="little")
        self.bad = {name: random.random(999) < 0.2 for name in WARPGROUPS}

    def tiles(self):
        """Those of the first of two programs, in order; attention takes all of them from a list."""
        if self.kernel == "attention" and self.sparse:
            return list(range(self.num_tiles))
        return list(range(0, self.num_tiles, 2))

    def where(self, tile):
        head = tile // self.tiles_m % self.heads
        return tile // self.tiles_m // self.heads, head, tile % self.tiles_m

    def visits(self, tile):
        """Key tiles that are live, that are not; blocks of them; summaries by tile; ends."""
        batch, head, m = self.where(tile)
        valid = int(min(self.kv_len[batch], self.seqlen_kv))
        tiles, blocks = -(-valid // self.tile_n), -(-valid // self.block_n)
        mask = self.mask[batch, head, m] if self.sparse else np.ones(self.blocks, bool)
        live = [n for n in reversed(range(tiles)) if mask[n // self.per_block]]
        rest = [n for n in reversed(range(tiles)) if not mask[n // self.per_block]]
        summaries = {}
        if rest and self.summaries:  # tiles of live blocks alone are left out where that is easy
            every = self.kernel == "refresh" or self.tile_n // self.summaries > 32
            of_all = range(-(-blocks * self.summaries // self.tile_n))
            summaries = {t: [] for t in of_all if every}
        for block in range(blocks if self.summaries else 0):
            for i in range(self.summaries * block, self.summaries * (block + 1)):
                if not mask[block]:
                    summaries.setdefault(i // self.tile_n, []).append(i % self.tile_n)
        return live, rest, summaries, valid - (tiles - 1) * self.tile_n, tiles

    def expected(self, tile):
        """Key tiles, value tiles, valid keys and stored outputs of a tile."""
        batch, head, m = self.where(tile)
        live, rest, summaries, of_last, tiles = self.visits(tile)
        is_refresh = self.kernel == "refresh"
        if not is_refresh and (
            (self.sparse and not self.computed[batch, head, m])
            or (tiles == 0 if self.summaries else not live)
        ):
            return None
        ends = [of_last if part and part[0] == tiles - 1 else self.tile_n for part in (live, rest)]
        if not live:
            live, ends[0] = [0], 0
        kv_head = head // self.group
        blocks, means = [("k", n, None) for n in live], []
        for t, columns in sorted(summaries.items()):
            means.append(("mean k", t, tuple(columns)))
        keys = blocks + means + [("k", n, None) for n in rest if is_refresh]
        valid = ends[: 1 + bool(rest)] if is_refresh else ends[:1]
        stores = ["o", "d"] if is_refresh else ["o"]
        return (
            [(name, batch, kv_head, n * self.tile_n, 0, columns) for name, n, columns in keys],
            [(name.replace("k", "v"), batch, kv_head, n * self.tile_n, 0) for name, n, _ in keys],
            valid,
            [(name, batch, head, m * TILE_M) for name in stores],
            ("q", batch, head, m * TILE_M, 0),
        )


def run(case, seed, others):
    """What each partition logs; ``others`` are functions that stand for some of its own."""
    machine = Machine(seed)
    machine.program, machine.programs = 0, 1 if case.kernel == "attention" and case.sparse else 2
    calls = dict.fromkeys(WARPGROUPS, -1)

    def is_bad(name):
        calls[name] += 1
        return int(case.bad[name][calls[name]])

    names = stand_ins(machine, is_bad) | others
    q_stages = 2 if case.seed % 2 else 1
    stages = {"Q": q_stages, "K": 2 + case.seed % 3, "V": 2 + case.seed % 3}
    barriers = [
        Ring(n, lambda name=name, count=count: Barrier(name, count))
        for what, n in (*stages.items(), ("inbox", DEPTH.value))
        for name, count in ((f"{what} full", 1), (f"{what} empty", 2))
    ]
    q_smem, k_ring, v_ring, bias_ring = (Ring(stages[what]) for what in "QKVK")
    inbox = Ring(DEPTH.value * WORDS.value)
    q, k, v, mean_k, mean_v = (
        Desc(name, TILE_M if name == "q" else case.tile_n, 128)
        for name in ("q", "k", "v", "mean k", "mean v")
    )
    o, d = Desc("o", 64, 128), Desc("d", 64, 128)
    sizes = (case.num_tiles, case.tiles_m, case.heads, case.group, case.seqlen_kv)
    stride = case.words.strides
    kv_symbols = (Pointer(case.words.ravel()), *(s // 4 for s in stride[:3]), case.words.shape[-1])
    redo = Pointer(np.full(case.num_tiles, 10**6, np.int64))
    kv_len = Pointer(case.kv_len)
    summary = bias = None
    if case.summaries:
        log_n = Pointer(np.ones((case.batch, case.blocks * case.summaries)).ravel())
        summary = (mean_k, mean_v, log_n, case.blocks * case.summaries, bias_ring)
        bias = bias_ring
    shape = (case.tile_n, 128, 128, *stages.values())
    if case.kernel == "refresh":
        consume = plain(refresh_consumer.consumer, names)
        produce = plain(refresh_producer.producer, names)
        consumers = [
            (o, d, q_smem, k_ring, v_ring, bias, Slot(), barriers, inbox, NOTHING, 1.0,
             *shape, case.anchored, i) for i in (0, 1)
        ]  # fmt: skip
        producer = (
            q, k, v, q_smem, k_ring, v_ring, barriers, inbox, kv_symbols, sizes, summary, kv_len,
            redo, case.per_block, 32, *stages.values(), True, case.summaries, case.anchored,
        )  # fmt: skip
    else:
        consume = plain(attention_consumer.consumer, names)
        produce = plain(attention_producer.producer, names)
        consumers = [
            (o, q_smem, k_ring, v_ring, bias, Slot(), barriers, inbox, 1.0, None, (0, 0, 0), 10**6,
             *shape, True, False, case.anchored, i) for i in (0, 1)
        ]  # fmt: skip
        tiles = case.num_tiles
        order = np.concatenate([[1], np.arange(tiles)])
        bits = case.q_bytes.strides[:2]
        symbols = (Pointer(case.q_bytes.ravel()), kv_symbols[0], *bits, *kv_symbols[1:])
        producer = (
            q, k, v, q_smem, k_ring, v_ring, barriers, inbox, symbols, sizes, summary, kv_len,
            Pointer(order), redo, None, case.per_block, 32, *stages.values(), case.sparse, True,
            True, LISTED, case.summaries, case.anchored,
        )  # fmt: skip
    parts = {"producer": lambda: produce(*producer)}
    parts |= {
        name: lambda args=args: consume(*args)
        for name, args in zip(WARPGROUPS, consumers, strict=True)
    }
    logs = machine.run(parts)
    for ring in barriers:
        for barrier in ring.slots:
            assert (barrier.missing, barrier.bytes) == (barrier.count, 0), barrier.name
    return logs


def check(case, **others):
    logs = run(case, case.seed, others)
    done = [tile for tile in case.tiles() if case.expected(tile) is not None]
    if case.anchored:
        bad, calls = [], 0
        for _ in done:
            more = 1 + (case.kernel == "refresh")  # it looks at both outputs
            bad.append(any(case.bad[name][calls : calls + more].any() for name in WARPGROUPS))
            calls += more
        done += [tile for tile, again in zip(done, bad, strict=True) if again][::-1]
    keys, values, valid, stores = [], [], [], []
    for tile in done:
        k, v, ends, outs, q = case.expected(tile)
        keys += [(*entry, q) for entry in k]
        values += v
        valid += ends
        stores += outs
    for warpgroup, name in enumerate(WARPGROUPS):
        got = []
        for entry in logs[name]:
            if entry[0] in ("k", "mean k"):
                got.append((*entry[:5], None, entry[5]))
            elif entry[0] == "biased":
                got[-1] = (*got[-1][:5], entry[1], got[-1][6])
        assert got == keys
        assert [entry for entry in logs[name] if entry[0] in ("v", "mean v")] == values
        assert [entry[1] for entry in logs[name] if entry[0] == "valid"] == valid
        assert [entry[1:] for entry in logs[name] if entry[0] == "store"] == [
            (out, batch, head, row + 64 * warpgroup, 0) for out, batch, head, row in stores
        ]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["attention", "refresh"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"summaries": 0}, {"summaries": 1}, {"summaries": 16}, {"summaries": 64},
     {"tile_n": 64, "summaries": 4}, {"per_block": 2, "summaries": 8}, {"anchored": False}],
    ids=str,
)  # fmt: skip
def test_they_agree(kernel, shape):
    for seed in range(3):
        check(Case(seed, kernel, **shape))


@pytest.mark.slow
def test_they_agree_without_symbols():
    for seed in range(3):
        check(Case(seed, "attention", summaries=0, sparse=False))


def test_one_that_counts_otherwise_is_found():
    """A producer that loads tiles of summaries which it has not announced."""
    with pytest.raises((Stuck, AssertionError)):
        for seed in range(3):
            check(Case(seed, "attention"), is_summarised=lambda *_: True)
