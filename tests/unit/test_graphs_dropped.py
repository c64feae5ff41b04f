"""Recordings that have to go before something else can."""

import types

import torch
from recorder import TapeRecorder

from flashomni.engine import graphs
from flashomni.engine.recordings import Entry, Slot


def test_what_ranks_recorded_is_dropped_before_the_program_ends():
    """NCCL waits for recordings that hold a group: nobody who still knows a call may keep one."""
    kept = graphs.Graphs(True, torch.nn.Linear(2, 2).eval())
    kept._recorder_for = lambda device: TapeRecorder()
    kept.start(torch.device("cpu"))
    assert kept._at_exit is None
    ranks = types.SimpleNamespace(group=object(), counts=(0, 0, 0, 0))
    kept.start(torch.device("cpu"), ranks=ranks)
    entry, slot = Entry(graph=types.SimpleNamespace(nbytes=1)), Slot("sort", object)
    slot.entries["call"] = entry
    kept._slots.append(slot)
    assert kept._at_exit.atexit
    kept._at_exit()
    assert entry.graph is None and not kept._slots
    entry.graph, slot.entries["call"] = types.SimpleNamespace(nbytes=1), entry
    kept._slots.append(slot)
    kept.start(torch.device("cpu"), ranks=types.SimpleNamespace(group=object(), counts=(0,) * 4))
    assert entry.graph is None and not kept._slots, "those of another group"
