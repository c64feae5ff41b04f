"""Whether tensors share elements, from addresses and strides alone: no memory is read."""

from __future__ import annotations

from torch import Tensor

MAX_STEPS = 2000  # of the search for a shared element; beyond it, tensors count as overlapping

Dims = list[tuple[int, int]]


def overlaps_itself(x: Tensor) -> bool:
    """Whether two indices may mean one element. Views made by slicing and permuting never do."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, n) for n, stride in _dims(x)):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether an element of ``x`` lies on one of ``y``; interleaved views of one tensor do not.

    Where the search for one grows long the answer is yes.
    """
    if not x.numel() or not y.numel() or x.device != y.device or x.device.type == "meta":
        return False
    start_x, start_y = x.data_ptr(), y.data_ptr()
    if start_x == start_y:
        return start_x != 0
    stop_x, stop_y = (start + _reach(t) for start, t in ((start_x, x), (start_y, y)))
    if stop_x <= start_y or stop_y <= start_x:
        return False
    # Bytes: sum_i a_i x_i + i = gap + sum_j b_j y_j + j. With y turned around all signs are plus.
    dims, target = [(x.element_size(), 1), (y.element_size(), 1)], start_y - start_x
    for size, stride in _dims(x):
        dims.append((size, stride * x.element_size()))
    for size, stride in _dims(y):
        dims.append((size, stride * y.element_size()))
        target += (size - 1) * stride * y.element_size()
    target += y.element_size() - 1
    merged: dict[int, int] = {}
    for size, stride in dims:
        if stride:
            merged[stride] = merged.get(stride, 0) + size - 1
    steps = [MAX_STEPS]
    return _reachable([(n + 1, s) for s, n in sorted(merged.items(), reverse=True)], target, steps)


def _reachable(dims: Dims, target: int, steps: list[int]) -> bool:
    """Whether ``target = sum stride * i`` for some ``0 <= i < size`` of each dim, largest first."""
    if target < 0:
        return False
    if not dims:
        return target == 0
    steps[0] -= 1
    if steps[0] < 0:
        return True
    (size, stride), rest = dims[0], dims[1:]
    left = sum(s * (n - 1) for n, s in rest)
    most = min(size - 1, target // stride)
    least = max(0, -((left - target) // stride))  # what the smaller dims cannot make up for
    return any(_reachable(rest, target - i * stride, steps) for i in range(most, least - 1, -1))


def _dims(x: Tensor) -> Dims:
    return [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n != 1]


def _reach(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return (sum((n - 1) * s for n, s in _dims(x)) + 1) * x.element_size()
