"""Steps that are left out as Bayesian quadrature: what calibration finds, from a prior instead.

Euler's method on a flow changes the latents by ``d_t v_t``, where ``d_t = sigma_{t+1} - sigma_t``
and v is the model's output: a generation is an integral of v over sigma, and a forecast that is off
by e_t makes an error ``d_t e_t`` in it. Weights that forecast each v_t best (Hermite, Taylor) are
not those that integrate best: when a step has been computed, it is known better what went wrong in
the gap before it, and the next gap can make it good, as the corrector of a multistep method does,
at no cost in time.

A calibration measures what this takes (``flashomni.tuning.cost``): inner products of outputs, and
how much of an error the network adds to when it sees it. Both are alike enough from model to model
for a prior, which is all that is used here:

* The output is a smooth function of the logarithm of the signal-to-noise ratio,
  ``l = log((1 - sigma + c) / (sigma + c))``, in which a denoiser finds out about the picture at an
  even pace: a Gaussian process with a Matern kernel of smoothness 3/2 (a spline between anchors),
  of one variance and length everywhere (Rasmussen and Williams, 2006, section 4.2). The step index,
  which polynomials go by, is not even in what happens: with a shift much happens in the first steps
  and the last.
* An error that the network sees at sigma is amplified by about ``GAIN sigma ** 2``: early errors
  change the picture, late ones stay what they are. Errors before a computed step k therefore count
  ``GAIN^2 (sigma_k^4 - sigma_next^4)``, and 1 at the end. The sum over all that comes behind a gap
  is ``1 + GAIN^2 sigma^4`` at the first computed step behind it.

The expected square of all that is a quadratic form of all weights of a generation (Bayesian
quadrature: O'Hagan, 1991), and its least one small linear system, solved once for each list of
steps and noise levels, on the host (``_joint.py``). Whatever scale outputs have drops out. On the
two small models a LENGTH of 4 to 8 and a GAIN from 3 up are within half a dB of one another.

Where nothing is known of the noise, or steps are decided late, or an anchor is missing, or there
are more than ``MOST`` steps, the weights are those of ``hermite``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from flashomni.engine.forecasts import Known, forecast
from flashomni.engine.forecasts._joint import anchors_of, joint_weights
from flashomni.engine.forecasts.hermite import weights as hermite

LENGTH = 4.0  # of the kernel, in units of l
END = 0.02  # c: no output is further than that from pure noise, or from none
GAIN = 10.0
NUGGET = 1e-6  # of what no kernel explains
RIDGE = 1e-2
MOST = 250  # steps; the system takes a second from 900 on


@forecast("quadrature", looks_ahead=True)
def weights(times: Sequence[int], t: int, known: Known | None = None) -> list[float]:
    """The weights of that step among all of the generation, or Hermite's."""
    if known is not None and known.computed and _is_flow(known.sigmas, known.num_steps):
        found = _all(known.sigmas, known.computed, known.order).get(t)
        if found is not None and found[0] == tuple(times):
            return list(found[1])
    return hermite(times, t, known)


def _is_flow(sigmas: Sequence[float], num_steps: int) -> bool:
    """Whether these are the noise levels of all steps of a flow, and of the end, and not too many.

    A scheduler may round a sigma of 1 up.
    """
    if len(sigmas) != num_steps + 1 or num_steps > MOST:
        return False
    falls = all(one > other for one, other in pairwise(sigmas))
    return falls and sigmas[0] < 1.0 + END and sigmas[-1] >= 0.0


@functools.lru_cache(maxsize=64)
def _all(
    sigmas: tuple[float, ...], computed: tuple[int, ...], order: int
) -> dict[int, tuple[tuple[int, ...], list[float]]]:
    """Anchors and their weights of every step that is left out."""
    levels = np.array(sigmas)
    num_steps = len(levels) - 1
    anchors = {s: a for s, a in anchors_of(computed, order, num_steps).items() if a}
    seen_at = np.array([min((k for k in computed if k > s), default=-1) for s in range(num_steps)])
    later = 1.0 + (GAIN * levels[seen_at] ** 2) ** 2
    found = joint_weights(_gram(levels[:-1]), -np.diff(levels), later, anchors, RIDGE)
    return {step: (at, found[step, list(at)].tolist()) for step, at in anchors.items()}


def _gram(sigmas: np.ndarray) -> np.ndarray:
    """Expected inner products of the outputs at these noise levels: ``[T, T]``."""
    place = np.log((1.0 - sigmas + END) / (sigmas + END))
    distance = np.sqrt(3.0) * np.abs(place[:, None] - place) / LENGTH
    return (1.0 + distance) * np.exp(-distance) + NUGGET * np.eye(len(sigmas))
