"""Steps that repeat as CUDA graphs: which calls are recorded, and what a replay must put right.

A step of a small model, or of small pictures, costs the host more than the device: thousands of
Python steps for a few hundred launches. A recorded call is one launch. What it did beside, the
bookkeeping of caches and records, is kept as it was behind the recording and put back.

A recording holds addresses and numbers, so it stands for one call alone: the step of the schedule,
the branch, shapes and options of the inputs, which layers S_q caches whole, and *what was called
before since the caches were empty*. The last is a chain: each key names the recording whose caches
it reads, and only a call whose caches are at fixed addresses is recorded. Memory that a recording
uses in passing is used again by later ones, which no chain runs before it. Plain full steps have
memory of their own: they run again behind any other, and would write over what that has left. A
branch that starts afresh in the midst of a generation, because a call has raised, may come to a
chain that is older than what it has replayed: such calls run without their recording.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine.arguments import cloned, filled, refuse_inputs, shape_of
from flashomni.engine.capture import CudaRecorder, Recorder, Uncapturable
from flashomni.engine.recordable import look_at, modes
from flashomni.engine.recordings import Entry, Slot, drop, put_back, state_of
from flashomni.engine.schedules import StepKind
from flashomni.engine.state.branch import START
from flashomni.engine.state.mirror import mirror
from flashomni.parallel import Ranks

MODES = (True, False, "auto")
MAX_GRAPHS = 256  # of one model
MAX_SLOTS = 8
SHARE = 16  # "auto" holds at most this part of the device's memory
LARGE = 4e12  # FLOPs of a block that keep any device busy until the host has launched the next


class Graphs:
    """Runs the calls of one model, as graphs where that is possible.

    Args:
        mode: ``True`` wherever possible, ``"auto"`` where it holds little memory, ``False`` never.
        model: the transformer.
        ours: whether a stand-in for a forward, or a hook, is the engine's own.
        around: what else changes what a call does, beside torch's own modes.
    """

    def __init__(
        self,
        mode: bool | str,
        model: nn.Module,
        ours: Callable[[Any], bool] = lambda _: False,
        around: Callable[[], Hashable] = lambda: None,
    ) -> None:
        if not any(mode is known for known in (True, False)) and mode != "auto":
            raise ValueError(f'graphs must be True, False or "auto", got {mode!r}')
        self.mode, self._model, self._ours, self._around = mode, model, ours, around
        self.recorder: Recorder | None = None
        self.replays = self._recorded = 0
        self._device: torch.device | None = None
        self._ranks: Ranks | None = None
        self._at_exit: weakref.finalize | None = None  # NCCL does not end before its recordings
        self._slots: list[Slot] = []
        self._state: Hashable = None
        self._why: dict[str, None] = {}
        self._too_large: set[Hashable] = set()
        self._off = ""  # why the generation that runs has none

    def clear(self) -> None:
        """Forget all recordings."""
        drop(self._slots)
        self._state = None
        self._why.clear()
        self._too_large.clear()

    def notes(self) -> list[str]:
        """What the report should say."""
        if not self.mode or (self.mode == "auto" and self.recorder is None):
            return []
        count = sum(slot.count for slot in self._slots)
        held = sum(slot.nbytes for slot in self._slots) / 2**20
        why = [f"no CUDA graphs: {reason}" for reason in self._why]
        said = [f"{count} steps are CUDA graphs, which hold {held:.1f} MiB"] if count else []
        return said + why

    def start(self, device: torch.device, refused: str = "", ranks: Ranks | None = None) -> None:
        """A generation starts: is the model what it was, and can its calls be recorded?

        Args:
            device: where it computes.
            refused: why not, where the caller knows.
            ranks: that share the sequence; an exchange is recorded like anything else, and each
                process may replay or compute a call as it likes: they are the same exchanges.
        """
        if (ranks and ranks.group) is not (self._ranks and self._ranks.group):
            self.clear()
        if ranks is not None and self._at_exit is None:
            self._at_exit = weakref.finalize(self, drop, self._slots)
        self._ranks = ranks
        if not self.mode:
            return
        if device != self._device:
            self.clear()
            self._device, self.recorder = device, self._recorder_for(device)
        reason, state = look_at(self._model, self._ours)
        if state != self._state:
            drop(self._slots)
            self._state = state
        self._off = refused or reason
        if self.recorder is None:
            self._off = f"the model computes on {device.type}"
        if self._off:
            self._why[self._off] = None

    def _recorder_for(self, device: torch.device) -> Recorder | None:
        return CudaRecorder(device) if device.type == "cuda" else None

    def run(self, call: Any, args: tuple, kwargs: dict, forward: Callable[..., Any]) -> Any:
        """``forward(*args, **kwargs)``, a call of the model that is under way.

        Args:
            call: where it stands, and its state.
            args: of the call, like ``kwargs``.
            forward: computes it.
        """
        recorder, branch = self.recorder, call.branch
        if not self.mode or self._off or recorder is None:
            return forward(*args, **kwargs)
        leaves: list[Tensor] = []
        shape = shape_of((args, kwargs), leaves)
        reason = recorder.why_not() or refuse_inputs(shape, leaves, self._device)
        if reason:
            self._why[reason] = None
            branch.at = None
            return forward(*args, **kwargs)
        sort = (shape, *call.sort, *modes(), self._around())
        if sort in self._too_large:
            return forward(*args, **kwargs)
        slot = self._slot(branch, sort)
        before, branch.at = branch.at, None  # unknown, if the call raises
        if before is None:  # the caches may be anything
            return forward(*args, **kwargs)
        changes = call.changes
        key = (before, call.key)
        entry = slot.entries.setdefault(key, Entry(returns=call.key is StepKind.FULL))
        if (
            entry.graph is None
            and entry.uses
            and not entry.refused
            and self._may(slot, before, entry)
        ):
            self._record(entry, slot, before, call, (args, kwargs), leaves, forward)
        if entry.number < branch.newest and entry.graph is not None and not entry.returns:
            return forward(*args, **kwargs)  # or what its generation has left is written over
        resets = branch.resets
        if entry.graph is None:
            entry.uses += 1
            output = forward(*args, **kwargs)
            entry.numbers, entry.keeps = call.numbers(), branch.nbytes()[0] if changes else 0
            layers = call.record.layers
            entry.flops = max((sum(op[1] for op in layer.ops) for layer in layers), default=0)
            if isinstance(before, Entry) and before.state is not None and not changes:
                put_back(branch, before.state)  # nothing that was made on the way stays
        else:
            output = self._replay(entry, call, leaves)
        branch.at = (entry if changes else before) if branch.resets == resets else None
        return output

    def _slot(self, branch: Any, sort: Hashable) -> Slot:
        slot = branch.slot
        if slot is not None and slot.key == sort and slot in self._slots:
            return slot
        slot = next((each for each in self._slots if each.key == sort and each.free), None)
        if slot is None:
            assert self.recorder is not None
            idle = [each for each in self._slots if each.free]
            old = idle[: max(len(self._slots) + 1 - MAX_SLOTS, 0)]
            for each in old:
                self._slots.remove(each)
            drop(old)
            slot = Slot(sort, self.recorder.make_pool)
            self._slots.append(slot)
        else:
            self._slots.remove(slot)
            self._slots.append(slot)  # the one that was used last is dropped last
        if branch.slot is not None:
            branch.at = None  # in the midst of a generation: the caches are another's
        slot.give(branch)
        return slot

    def _may(self, slot: Slot, before: Any, entry: Entry) -> bool:
        """Whether a call may be recorded now: its caches lie where they will always lie."""
        if before is not START and before.graph is None:
            return False
        if sum(each.count for each in self._slots) >= MAX_GRAPHS:
            self._why[f"more than {MAX_GRAPHS} would be needed"] = None
            return False
        if self.mode == "auto" and entry.flops > LARGE:
            return self._give_up(slot, "one block keeps the device busy longer than the host")
        if self.mode == "auto" and self._device is not None and self._device.type == "cuda":
            limit = torch.cuda.get_device_properties(self._device).total_memory // SHARE
            if sum(each.expected for each in self._slots) > limit:
                return self._give_up(slot, f"they would hold more than {limit / 2**30:.1f} GiB")
        return True

    def _give_up(self, slot: Slot, why: str) -> bool:
        """Calls of this sort are not recorded any more, and what was is dropped."""
        self._why[why] = None
        self._too_large.add(slot.key)
        self._slots.remove(slot)
        drop([slot])
        return False

    def _record(
        self,
        entry: Entry,
        slot: Slot,
        before: Any,
        call: Any,
        given: tuple[tuple, dict],
        leaves: list[Tensor],
        forward: Callable[..., Any],
    ) -> None:
        branch, recorder = call.branch, self.recorder
        assert recorder is not None
        entry.inputs = [torch.empty_like(leaf).copy_(leaf) for leaf in leaves]
        args, kwargs = filled(given, iter(entry.inputs))
        fresh = before is START or before.state is None
        was = mirror(state_of(branch)) if fresh else before.state
        put_back(branch, was)
        call.prepare(entry.numbers)
        counts: tuple[int, ...] = self._ranks.counts if self._ranks is not None else ()
        try:
            pool = slot.pool_of(entry)
            entry.output, entry.graph = recorder.record(lambda: forward(*args, **kwargs), pool)
        except Uncapturable as error:
            entry.refused, entry.inputs = str(error), []
            self._why[entry.refused] = None
            call.rewind()
            put_back(branch, was)
            return
        finally:
            if self._ranks is not None:
                after, self._ranks.counts = self._ranks.counts, counts
                entry.sent = tuple(b - a for a, b in zip(counts, after, strict=True))
        self._recorded += 1
        entry.number, entry.numbers, entry.held = self._recorded, call.numbers(), call.given()
        entry.levels = call.levels() if any(entry.numbers) else ()
        entry.layers = list(call.record.layers)
        entry.state = mirror(state_of(branch)) if call.changes else None
        call.rewind()
        put_back(branch, was)

    def _replay(self, entry: Entry, call: Any, leaves: list[Tensor]) -> Any:
        """Do a recorded call, and what it did to the bookkeeping."""
        assert entry.graph is not None
        for static, leaf in zip(entry.inputs, leaves, strict=True):
            static.copy_(leaf, non_blocking=True)
        if any(entry.numbers) and call.levels() != entry.levels:
            call.renew(entry.numbers)
            entry.levels = call.levels()
        entry.graph.replay()
        self.replays += 1
        call.branch.newest = max(call.branch.newest, entry.number)
        if self._ranks is not None:
            counted = zip(self._ranks.counts, entry.sent, strict=True)
            self._ranks.counts = tuple(a + b for a, b in counted)
        call.record.layers.extend(entry.layers)
        call.settled = True
        if entry.state is not None:
            put_back(call.branch, entry.state, measured=True)
        return cloned(entry.output)
