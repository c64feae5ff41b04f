"""The partitions of a Hopper kernel, run on the CPU: their own code, with stand-ins for Gluon.

Producer and consumers are threads that take turns, drawn at random wherever one of them touches a
barrier. Numbers that decide how the code goes on (words of symbols, messages, counts) are real, and
so are barriers with their phases; what only computes is ``Nothing``. So what is found out is who
waits for what for ever, and which tiles meet in which order.
"""

import random
import threading
from types import FunctionType, SimpleNamespace

import numpy as np
from triton.experimental.gluon import language as gl
from triton.runtime import JITFunction


class Nothing:
    """Whatever is done with it, it stays what it is."""

    def same(self, *_, **__):
        return self

    __call__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = same
    __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __or__ = __ror__ = __and__ = same
    __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = same

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self):
        return iter((self, self))

    __eq__ = same
    __hash__ = None


NOTHING = Nothing()


class Columns(Nothing):
    """The columns of scores: what they are compared with is how many keys are valid."""

    def __init__(self, machine):
        self.machine = machine

    def __lt__(self, valid):
        self.machine.log("valid", int(valid))
        return NOTHING


class Words(np.ndarray):
    """A tensor of numbers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype):
        return self.astype(dtype)


def words(x):
    return np.asarray(x).view(Words)


class Pointer:
    def __init__(self, memory, at=0):
        self.memory, self.at = memory, at

    def __add__(self, offset):
        return Pointer(self.memory, self.at + offset)

    def __sub__(self, offset):
        return self + -offset


class Desc:
    """A TMA descriptor of ``[.., rows, columns]`` blocks."""

    dtype = np.float32

    def __init__(self, name, rows, columns):
        self.name = name
        self.block_type = SimpleNamespace(shape=(1, 1, rows, columns), nbytes=2 * rows * columns)


class Slot:
    """Shared memory of one tile, seen as anything."""

    content = None

    def reshape(self, *_, **__):
        return self

    permute = slice = reshape

    @property
    def shape(self):
        return (1, 1, 128, 128)

    def store(self, x):
        self.content = x

    def load(self, *_):
        return self.content if isinstance(self.content, np.ndarray) else NOTHING


class Ring:
    def __init__(self, stages, kind=Slot):
        self.slots = [kind() for _ in range(stages)]

    def index(self, i):
        return self.slots[i]


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    def __init__(self, name, count):
        self.name, self.count = name, count
        self.phase, self.missing, self.bytes = 0, count, 0

    def arrive(self, arrivals, nbytes):
        assert arrivals <= self.missing, f"too many arrive at {self.name}"
        self.missing -= arrivals
        self.bytes += nbytes
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Stuck(Exception):
    """Every partition waits, or has come to its end."""


class Machine:
    """One multiprocessor: the threads that use it, one at a time, and what they log."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.logs, self.turns, self.awaits, self.error = {}, {}, {}, None

    def log(self, *entry):
        self.logs[threading.current_thread().name].append(entry)

    def run(self, parts):
        """Run named functions side by side to their ends; what each has logged."""

        def guarded(name, part):
            self.turns[name].acquire()
            try:
                if self.error is None:
                    part()
            except BaseException as error:
                self.error = self.error or error
            del self.awaits[name]
            self._next()

        threads = []
        for name, part in parts.items():
            self.logs[name], self.turns[name], self.awaits[name] = [], threading.Semaphore(0), None
            threads.append(threading.Thread(target=guarded, args=(name, part), name=name))
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        return self.logs

    def _next(self):
        """Whose turn it is; all of them find the error where nobody can go on."""
        if not self.awaits:
            return
        ready = [name for name in sorted(self.awaits) if self._is_ready(name)]
        if not ready:
            waits = [f"{name} for {wait[0].name}" for name, wait in self.awaits.items()]
            self.error = Stuck(", ".join(waits))
            ready = sorted(self.awaits)
        self.turns[self.random.choice(ready)].release()

    def _is_ready(self, name):
        wait = self.awaits[name]
        return self.error is not None or wait is None or wait[0].phase % 2 != wait[1]

    def turn(self, barrier=None, parity=None):
        """Let another one go on; until the phase of ``parity`` of ``barrier`` is over."""
        name = threading.current_thread().name
        self.awaits[name] = None if barrier is None else (barrier, parity)
        self._next()
        self.turns[name].acquire()
        if self.error is not None:
            raise self.error
        self.awaits[name] = None


def _is_real(*args):
    return not any(isinstance(x, Nothing | Slot) for x in args)


class Gluon:
    """What stands for ``gl``: numpy on numbers, nothing on the rest."""

    int32, int64, float32, bfloat16 = np.int32, np.int64, np.float32, np.float16

    def __init__(self, machine):
        self.machine = machine

    def __getattr__(self, name):
        return NOTHING

    def to_tensor(self, x):
        return x

    def program_id(self, _):
        return self.machine.program

    def num_programs(self, _):
        return self.machine.programs

    def static_range(self, *args):
        return range(*args)

    def arange(self, start, stop, layout=None):
        return (
            words(np.arange(start, stop, dtype=np.int32))
            if _is_real(stop)
            else Columns(self.machine)
        )

    def full(self, shape, value, dtype, layout=None):
        return words(np.full(shape, value, dtype)) if _is_real(value, *shape) else NOTHING

    def full_like(self, x, value):
        return words(np.full_like(x, value)) if _is_real(x) else NOTHING

    def where(self, condition, x, y):
        return words(np.where(condition, x, y)) if _is_real(condition, x, y) else NOTHING

    def minimum(self, x, y):
        return np.minimum(x, y) if _is_real(x, y) else NOTHING

    def maximum(self, x, y):
        return np.maximum(x, y) if _is_real(x, y) else NOTHING

    def sum(self, x, axis):
        return np.int32(np.sum(np.asarray(x))) if _is_real(x) else NOTHING

    def max(self, x, axis):
        return np.int32(np.max(np.asarray(x))) if _is_real(x) else NOTHING

    def load(self, pointer, mask=True, other=0):
        if not isinstance(pointer, Pointer):
            return NOTHING
        at = np.where(mask, pointer.at, 0)
        assert np.all((at >= 0) & (at < len(pointer.memory)))
        return words(np.where(mask, pointer.memory[at], other).astype(pointer.memory.dtype))

    def store(self, pointer, x, mask=True):
        if isinstance(pointer, Pointer):
            pointer.memory[pointer.at] = x

    def atomic_add(self, pointer, x, sem=None):
        self.machine.turn()
        before = int(pointer.memory[pointer.at])
        pointer.memory[pointer.at] += x
        return before


class Mbarrier:
    def __init__(self, machine):
        self.machine = machine

    def wait(self, barrier, parity):
        self.machine.turn(barrier, int(parity))

    def expect(self, barrier, nbytes):
        barrier.arrive(1, nbytes)
        self.machine.turn()

    def arrive(self, barrier, count):
        barrier.arrive(count, 0)
        self.machine.turn()


def clz(word):
    return np.int32(32 - (int(word) & 0xFFFFFFFF).bit_length())


def popc(x):
    return words(np.bitwise_count(np.asarray(x).view(np.uint32)).astype(np.int32))


def stand_ins(machine, is_bad):
    """Name in a module -> what it is here."""

    def tma_load(desc, coordinates, barrier, slot):
        slot.content = (desc.name, *(int(x) for x in coordinates))
        barrier.arrive(0, -desc.block_type.nbytes)

    def tma_store(desc, coordinates, _slot):
        machine.log("store", desc.name, *(int(x) for x in coordinates))

    def multiply(a, b, acc, **_):
        machine.log(*b.content, *(() if isinstance(a, Nothing) else (a.content,)))
        return acc

    def biased(s, _scale, bias):
        machine.log("biased", tuple(int(i) for i in np.isfinite(bias).nonzero()[0]))
        return s

    return {
        "gl": Gluon(machine), "mbarrier": Mbarrier(machine), "tma": NOTHING,
        "tma_load": tma_load, "tma_store": tma_store, "thread_barrier": lambda: None,
        "libdevice": SimpleNamespace(clz=clz, popc=popc), "warpgroup_mma": multiply,
        "warpgroup_mma_wait": lambda _left, deps: deps[0], "fence_async_shared": lambda: None,
        "biased": biased, "is_bad": lambda *_: is_bad(threading.current_thread().name),
    }  # fmt: skip


def plain(jitted, names, made=None):
    """The Python function of a Gluon one, with stand-ins by name, also in what it calls."""
    made = {} if made is None else made
    if jitted not in made:
        space = dict(jitted.fn.__globals__)
        made[jitted] = function = FunctionType(
            jitted.fn.__code__, space, jitted.fn.__name__, jitted.fn.__defaults__
        )
        function.__kwdefaults__ = jitted.fn.__kwdefaults__
        for name in jitted.fn.__code__.co_names:
            value = space.get(name)
            if name in names:
                space[name] = names[name]
            elif isinstance(value, JITFunction):
                space[name] = plain(value, names, made)
            elif isinstance(value, gl.constexpr):
                space[name] = value.value
    return made[jitted]
