"""A recorder that works anywhere: it repeats torch's ops on the addresses of the first run.

What a CUDA graph would get wrong goes wrong here too: numbers of the host are those of the
recording, tensors are found where they were then, nothing happens before the first replay, and a
replay writes over what later recordings of its pool have made.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashomni.engine.capture import Uncapturable, Watch


class Log(TorchDispatchMode):
    """Notes every op; remembers what was in tensors of others before they were written to."""

    def __init__(self):
        super().__init__()
        self.ops, self.made, self.saved = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func._schema.is_mutable:
            for tensor in given:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.made and storage._cdata not in self.saved:
                    self.saved[storage._cdata] = storage, storage.clone()
        out = func(*args, **kwargs)
        known = {x.untyped_storage()._cdata for x in given}
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        new = [x for x in results if x.untyped_storage()._cdata not in known]
        self.made |= {x.untyped_storage()._cdata for x in new}
        self.ops.append((func, args, kwargs, results, bool(new)))
        return out


class Tape:
    """A recorded call."""

    nbytes = 1000

    def __init__(self, ops, held, pool):
        self._ops, self._held, self._pool = ops, held, pool

    def spoil(self):
        """Others have written to the memory of what it made."""
        for _, _, _, results, is_new in self._ops:
            for tensor in results if is_new else ():
                tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()

    def replay(self):
        for later in self._pool.behind(self):  # may lie where this one keeps what it drops again
            later.spoil()
        works = []
        for func, args, kwargs, results, is_new in self._ops:
            if func.namespace != "c10d":  # exchanges with other processes begin all at once
                while works:
                    works.pop().wait()
            leaves = tree_leaves(func(*args, **kwargs))
            works += [x for x in leaves if isinstance(x, torch.ScriptObject)]
            out = [x for x in leaves if isinstance(x, torch.Tensor)]
            if is_new:
                for old, value in zip(results, out, strict=True):
                    old.copy_(value)


class Pool:
    """Given up with the last recording in it, as that of CUDA graphs is."""

    def __init__(self):
        self.used, self._tapes = False, []

    @property
    def tapes(self):
        """Those that somebody still has, in the order in which they were recorded."""
        self._tapes = [tape for tape in self._tapes if tape() is not None]
        return [tape() for tape in self._tapes]

    def add(self, tape):
        self._tapes.append(weakref.ref(tape))

    def behind(self, tape):
        """Those that were recorded later."""
        tapes = self.tapes
        return tapes[tapes.index(tape) + 1 :]


class TapeRecorder:
    """Records tapes."""

    def __init__(self):
        self.count = self.pools = 0

    def why_not(self):
        return None

    def make_pool(self):
        self.pools += 1
        return Pool()

    def record(self, run, pool):
        assert pool.tapes or not pool.used, "the pool is gone"
        pool.used = True
        log, watch = Log(), Watch(torch.device("cpu"))
        try:
            with watch, log:
                out = run()
        except Exception as error:
            raise error if isinstance(error, Uncapturable) else Uncapturable(repr(error)) from error
        finally:
            for storage, content in log.saved.values():
                storage.copy_(content)
        self.count += 1
        tape = Tape(log.ops, list(watch.held.values()), pool)
        tape.spoil()  # nothing has been computed before the first replay
        pool.add(tape)
        return out, tape
