"""What is kept comes back: in another dtype, or by way of pinned host memory."""

import pytest
import torch

from conftest import SPARSE, run
from flashomni.engine.state.storage import Kept, Lane, Storage


@pytest.mark.parametrize(
    "dtype, error", [("compute", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11), ("float8", 2**-4)]
)
def test_a_tensor_comes_back_in_its_dtype(dtype, error):
    """Relative error of each entry within the rounding of the dtype it is kept in."""
    value = torch.randn(3, 50, 64).abs() + 0.5
    value[0] *= 1e-3  # float8 alone has no range for this next to that
    value[1] *= 1e3
    value[2, 7] = 0
    kept = Kept(Storage(dtype))
    kept.put(value)
    back = kept.get()
    assert back.dtype == value.dtype and back.shape == value.shape
    assert ((back - value).abs() <= error * value.abs().amax(-1, keepdim=True)).all()
    assert torch.equal(back, value) == (error == 0)


@pytest.mark.slow
def test_float8_takes_a_quarter_of_float32(no_grad, tiny):
    """Of the memory, scales included; and the pictures stay close."""
    model, inputs = tiny
    wide, full = run(model, inputs, SPARSE)
    narrow, small = run(model, inputs, SPARSE.replace(history_dtype="float8"))
    assert small.cache_bytes < 0.4 * full.cache_bytes  # rows here are short: 48 numbers, one scale
    torch.testing.assert_close(narrow, wide, atol=0.1, rtol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestHost:
    """Pinned host memory."""

    def test_many_tensors_at_once_come_back_as_they_were(self):
        """More in flight than device memory is held for; each computed over right after."""
        lane = Lane(torch.device("cuda"))
        values, kept = [], []
        for number in range(24):
            value = torch.full((1 << 20,), float(number), device="cuda")
            values.append(value.clone())
            kept.append(Kept(Storage("compute", lane)))
            kept[-1].put(value)
            del value
            torch.full((1 << 20,), -1.0, device="cuda")  # takes the memory if it is free
        lane.flush()
        for tensor, value in zip(kept, values, strict=True):
            tensor.prefetch()
            torch.testing.assert_close(tensor.get(), value, atol=0, rtol=0)
        again = kept[3].get()  # not prefetched, and a second time
        assert torch.equal(again, values[3])
        assert all(t.is_pinned() for tensor in kept for t in tensor.tensors())

    @pytest.mark.parametrize("dtype", ["compute", "float8"])
    def test_a_generation_is_the_same_bits(self, no_grad, tiny, dtype):
        """Where histories lie does not change a picture; the device keeps next to nothing."""
        model, inputs = tiny
        model = model.to("cuda")
        inputs = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        recipe = SPARSE.replace(history_dtype=dtype)
        here, on_device = run(model, inputs, recipe)
        there, on_host = run(model, inputs, recipe.replace(history_device="host"))
        assert torch.equal(here, there)
        assert on_host.cache_bytes_host > 0
        assert on_host.cache_bytes < 0.5 * on_device.cache_bytes
