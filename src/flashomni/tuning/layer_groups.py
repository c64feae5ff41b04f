"""Groups of layers: what each adds in the dense runs, and what an error there does to the output.

Of what a group adds only the Gram matrix over steps is kept, which evaluates every schedule and
forecast of the group. An error of a group reaches the output through the layers behind it: that is
measured at a few steps, where the group adds what it added a step before and the rest of the
network computes. What becomes of it from there to the final latents is known for the whole output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flashomni.models import find_adapter
from flashomni.tuning.cost import Costs
from flashomni.tuning.drive import Compute, Driver, OnLatents
from flashomni.tuning.layer_watch import Range, Watch, partition
from flashomni.tuning.record import Recording, record
from flashomni.tuning.state import State
from flashomni.util.words import in_bytes

NUMBERS = 1 << 18  # of what a group adds in a step: norms are right to a fifth of a percent


class LayerGroups:
    """The groups of one model.

    Args:
        driver: of the pipeline.
        state: where findings are kept.
        count: of groups that are wanted.
        num_steps: of a generation.
        calls: of the model in a step.
        room: bytes that recordings of what groups add may take on the host.

    Attributes:
        parts: ``(start, stop)`` of each; none where they cannot be told apart: the model has no
            adapter, too few layers, or something but the next block reads what a block returns.
        nbytes: that a recording of what they add takes at most on the host.

    Raises:
        ValueError: ``count`` is negative or 1, or ``room`` is too small.
    """

    def __init__(
        self, driver: Driver, state: State, count: int, num_steps: int, calls: int, room: int
    ) -> None:
        if count < 0 or count == 1:
            raise ValueError(f"groups must be 0 for none, or at least 2, got {count}")
        self._driver, self._state, self._num_steps, self._calls = driver, state, num_steps, calls
        self._sites = _sites(driver) if count else []
        parts = partition([site.name for site in self._sites], count) if self._sites else ()
        self.parts: tuple[Range, ...] = parts if len(parts) > 1 else ()
        cells = 4 * num_steps * max(len(self.parts), 1)
        self._numbers = min(room // cells, NUMBERS)
        if self.parts and self._numbers < 1024:
            raise ValueError(
                f"memory must leave {1024 * cells} bytes beside one recording for what "
                f"{len(self.parts)} groups of layers add, got {max(room, 0)}; or groups must be 0"
            )
        self.nbytes = self._numbers * cells if self.parts else 0

    @property
    def in_words(self) -> str:
        """What recording them takes, to be said before; empty where there are none."""
        if not self.parts:
            return ""
        where = ", ".join(f"{start}:{stop}" for start, stop in self.parts)
        return f"; what layers {where} add at most {in_bytes(self.nbytes)} more, on the host"

    def watch(self) -> Watch:
        """Sees a dense run."""
        device = torch.device(self._driver.pipe._execution_device)
        return Watch(self._sites, self.parts, device, self._numbers, self._calls)

    def _name(self, what: str) -> str:
        return f"groups {list(self.parts)} {what}"

    def lacks(self, number: int) -> bool:
        """Whether the dense run of a prompt has to be seen."""
        return bool(self.parts) and self._state.get(self._name(f"gram {number}")) is None

    @property
    def reached(self) -> bool:
        """Whether what errors do to the output has been measured."""
        return not self.parts or self._state.get(self._name("reach")) is not None

    def keep(self, number: int, watch: Watch, latents: Tensor) -> None:
        """Keep the Gram matrices of a run that was seen, over the square of its final latents."""
        power = float(latents.double().square().sum())
        found = []
        for added in watch.added:
            values = torch.stack(
                [torch.cat(added[step]).double() for step in range(self._num_steps)]
            )
            found.append((values @ values.T / power).tolist())
        self._state.put(self._name(f"gram {number}"), found)
        if number == 0:
            whole = max(watch.whole, 1e-9)
            self._state.put(self._name("shares"), [part / whole for part in watch.seconds])

    def record(
        self, number: int, prompt: str, seed: int, on_latents: OnLatents | None = None
    ) -> tuple[Recording, float]:
        """The dense run of a prompt, seen where it has to be, and seconds that seeing it took."""
        if not self.lacks(number):
            return record(self._driver, prompt, seed, on_latents), 0.0
        with self.watch() as watch:
            found = record(self._driver, prompt, seed, on_latents, watch.see)
        self.keep(number, watch, found.latents)
        return found, watch.spent

    def see(self, number: int, recording: Recording) -> None:
        """See a run that was recorded before: its steps are computed once more."""

        def answer(step: int, call: int, compute: Compute) -> Tensor:
            watch.see(step, call, compute)
            return recording.outputs[step][call].to(self._device)

        with self.watch() as watch:
            self._driver.run(recording.prompt, recording.seed, answer)
        self.keep(number, watch, recording.latents)

    @property
    def _device(self) -> torch.device:
        return torch.device(self._driver.pipe._execution_device)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each group, of the seconds of a computed step."""
        return tuple(self._state.get(self._name("shares")))

    def probe_calls(self, at: Sequence[int]) -> int:
        """Steps that :meth:`reach` computes."""
        return len({step - 1 for step in at}) + len(at) * len(self.parts)

    def reach(
        self, recording: Callable[[], Recording], effects: np.ndarray, at: Sequence[int]
    ) -> list[dict[int, float]]:
        """What a unit of what a group adds does to the outputs, in units of the final latents.

        Args:
            recording: gives that of the first prompt.
            effects: ``[T, rows]``, what a unit of each row of the output does to the latents.
            at: steps, from 1 on, where it is measured.

        Returns:
            By group, by step: the norm of what changes in the output, each row with its effect over
            their sum, over that of the error that was put in.
        """
        if not self.reached:
            self._state.put(self._name("reach"), self._measure(recording(), effects, at))
        return self._reach()

    def _reach(self) -> list[dict[int, float]]:
        kept = self._state.get(self._name("reach"))
        return [{int(step): value for step, value in each.items()} for each in kept]

    def _measure(
        self, recording: Recording, effects: np.ndarray, at: Sequence[int]
    ) -> list[dict[int, float]]:
        found: list[dict[int, list[Tensor]]] = [{step: [] for step in at} for _ in self.parts]

        def answer(step: int, call: int, compute: Compute) -> Tensor:
            kept = recording.outputs[step][call].to(self._device)
            if step in at:
                for part, mine in enumerate(found):
                    off = watch.reuse(part, call, compute).float() - kept.float()
                    mine[step].append(off.flatten(1))
            if step + 1 in at:
                watch.hold(call, compute)
            return kept

        with self.watch() as watch:
            self._driver.run(recording.prompt, recording.seed, answer)
        power = float(recording.latents.double().square().sum())
        grams = np.array(self._state.get(self._name("gram 0")))
        measured = list[dict[int, float]]()
        for gram, mine in zip(grams, found, strict=True):
            values = {}
            for step, rows in mine.items():
                share = torch.from_numpy(effects[step] / effects[step].sum())
                off = torch.cat(rows).cpu().double()
                out = float((share[:, None] * off).sum(0).norm()) / power**0.5
                error = _change(gram, step)
                values[step] = out / error**0.5 if error > 1e-300 else 0.0
            measured.append(values)
        return measured

    def alone(self, whole: Costs) -> tuple[float, ...]:
        """What a group alone that is a step old does to the output, over what all layers do.

        Geometric means over the steps where it was measured, on the first prompt. Where each is
        near 1, to compute a group more often than another wins nothing.

        Args:
            whole: costs of the output.
        """
        found = []
        for gram, mine in zip(self._state.get(self._name("gram 0")), self._reach(), strict=True):
            logs = [
                np.log(max(value, 1e-12) ** 2 * _change(np.array(gram), step))
                - np.log(_change(whole.grams[0], step))
                for step, value in mine.items()
            ]
            found.append(float(np.exp(np.mean(logs) / 2)))
        return tuple(found)

    def costs(
        self,
        whole: Costs,
        recording: Callable[[int], Recording],
        prompts: int,
        effects: np.ndarray,
        at: Sequence[int],
    ) -> list[Costs]:
        """What errors of each group cost, as :class:`Costs` says it of the output's.

        Args:
            whole: of the output.
            recording: gives the dense run of a prompt.
            prompts: how many there are.
            effects: ``[T, rows]``, what a unit of each row of the output does to the latents.
            at: steps where the way to the output is measured.
        """
        for number in range(prompts):
            if self.lacks(number):
                found = recording(number)
                if self.lacks(number):  # it was recorded when nobody looked
                    self.see(number, found)
        reach = self.reach(lambda: recording(0), effects, at)
        grams = [self._state.get(self._name(f"gram {number}")) for number in range(prompts)]
        costs = list[Costs]()
        for part, measured in enumerate(reach):
            steps = sorted(measured)
            logs = [np.log(max(measured[step], 1e-12)) for step in steps]
            curve = np.exp(np.interp(np.arange(self._num_steps), steps, logs))
            each = np.array([gram[part] for gram in grams])
            costs.append(Costs(each, effects.sum(1) * curve, whole.gains, whole.sigmas))
        return costs


def _change(gram: np.ndarray, step: int) -> float:
    """Squared norm of what changes from the step before."""
    before = step - 1
    change = gram[step, step] - 2 * gram[step, before] + gram[before, before]
    return max(float(change), 1e-300)


def _sites(driver: Driver) -> list:
    try:
        sites = find_adapter(driver.model).sites(driver.model)
    except (ValueError, NotImplementedError):
        return []  # whose layers nobody knows
    return list(sites) if all(site.chain for site in sites) else []
