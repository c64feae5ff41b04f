"""A replica's pipeline without Ray: the pixels of each order, faults, LoRAs, what is refused."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from serve_parts import NEVER, ORDER, SETTINGS

import flashomni
from flashomni.lab import zoo
from flashomni.models import adapters
from flashomni.serve.errors import Refused
from flashomni.serve.worker import Stopped, Worker


def small():
    """A pipeline as small as they get, with random weights."""
    return zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)


@pytest.fixture(scope="module")
def loaded():
    return small()


@pytest.fixture
def worker(loaded):
    """On one pipeline for all tests of the file; each has an engine of its own."""
    made = Worker(replace(SETTINGS, max_batch=2), loaded)
    yield made
    flashomni.restore(loaded.pipe)


def bare(loaded, order):
    """What the pipeline makes by itself."""
    call = {**loaded.call, **order.call()}
    noise = torch.Generator("cpu").manual_seed(order.seed)
    return loaded.pipe(order.prompt, **call, generator=noise).images[0]


def test_a_worker_makes_what_the_pipeline_makes(worker, loaded):
    """Its very pixels, and another recipe for another order; the report goes along."""
    (made,) = worker.generate([ORDER], NEVER)
    assert made.recipe == "fora" and made.flops_executed <= made.flops_dense and not made.fault
    (exact,) = worker.generate([replace(ORDER, recipe="lossless")], NEVER)
    (again,) = worker.generate([ORDER], NEVER)
    assert torch.equal(made.pixels, again.pixels)
    for recipe, pixels in (("fora", made.pixels), ("lossless", exact.pixels)):
        flashomni.restore(loaded.pipe)
        with flashomni.accelerate(loaded.pipe, recipe):
            expected = bare(loaded, ORDER)
        assert Image.fromarray(pixels[0].numpy()).tobytes() == expected.tobytes()


def test_a_batch_has_the_pixels_of_each_alone(worker):
    """Whether or not this machine's matrix products are the same in a batch: it looks."""
    orders = [ORDER, replace(ORDER, prompt="a star", seed=9)]
    alone = [worker.generate([order], NEVER)[0] for order in orders]
    for _ in range(2):
        together = worker.generate(orders, NEVER)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.pixels, b.pixels)
    known = worker.proof.known(ORDER.key, 2)
    assert known is not None and worker.limit(ORDER) == (2 if known else 1)
    assert worker.limit(replace(ORDER, steps=5)) == 2


def test_a_fault_of_the_engine_is_made_dense(worker, loaded, monkeypatch, caplog):
    """For that request, which says so; the next one has the engine again."""
    worker.generate([replace(ORDER, steps=1)], NEVER)

    def boom(*args, **kwargs):
        raise RuntimeError("a kernel is broken")

    monkeypatch.setattr(worker._engine._runtime, "block", boom)
    (made,) = worker.generate([ORDER], NEVER)
    assert made.recipe == "dense" and "a kernel is broken" in made.fault
    assert "taken off for one request: Traceback" in caplog.text
    assert Image.fromarray(made.pixels[0].numpy()).tobytes() == bare(loaded, ORDER).tobytes()
    (after,) = worker.generate([ORDER], NEVER)
    assert after.recipe == "fora" and not after.fault


def test_a_fault_in_a_batch_leaves_each_the_pixels_it_has_alone(worker, monkeypatch, caplog):
    """Not a dense batch, of which nobody has shown that it has them; without ``exact`` it does."""
    orders = [ORDER, replace(ORDER, prompt="a star", seed=9)]
    alone = [worker.generate([order], NEVER)[0] for order in orders]
    worker.proof.saw(ORDER.key, 2, True)
    sizes, call = [], worker._call

    def broken(orders, stop):
        sizes.append(len(orders))
        if len(orders) > 1 and worker._engine is not None:
            raise RuntimeError("a kernel is broken")
        return call(orders, stop)

    monkeypatch.setattr(worker, "_call", broken)
    made = worker.generate(orders, NEVER)
    assert sizes == [2, 1, 1] and "is made one by one: Traceback" in caplog.text
    assert [each.recipe for each in made] == ["fora", "fora"]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(alone, made, strict=True))
    monkeypatch.setattr(worker, "settings", replace(worker.settings, exact=False))
    dense = worker.generate(orders, NEVER)
    assert sizes[3:] == [2, 2] and {each.recipe for each in dense} == {"dense"}
    assert all("a kernel is broken" in each.fault for each in dense)


def test_what_the_pipeline_refuses_is_no_fault_of_the_engine(worker, loaded, monkeypatch):
    """Its own message goes to the user."""
    message = "`prompt_embeds` must be ..."

    def refuse(*args, **kwargs):
        raise ValueError(message)

    monkeypatch.setattr(loaded.pipe, "check_inputs", refuse)
    with pytest.raises(ValueError, match=message):
        worker.generate([ORDER], NEVER)


def test_a_worker_stops_between_steps(worker, loaded, monkeypatch):
    """And makes the next order right."""
    stop, calls = threading.Event(), []
    (whole,) = worker.generate([ORDER], NEVER)
    hook = loaded.pipe.transformer.register_forward_pre_hook(
        lambda *_: (calls.append(1), stop.set() if len(calls) == 2 else None)[1]
    )
    with pytest.raises(Stopped):
        worker.generate([ORDER], stop)
    hook.remove()
    assert len(calls) == 2
    (after,) = worker.generate([ORDER], NEVER)
    assert torch.equal(after.pixels, whole.pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (66, 64)}, "size must be multiples of 4, got 66x64"),
        ({"negative": "no"}, "negative_prompt needs a true_cfg_scale of more than 1, got 1.0"),
        ({"frames": 5}, "seconds must be left out: FluxPipeline takes no num_frames"),
        ({"video": True}, "FluxPipeline is asked at /v1/images/generations"),
    ],
)
def test_a_worker_refuses_what_its_pipeline_would_ignore(worker, changes, message):
    """By the name of the field."""
    worker.check(ORDER)
    with pytest.raises(Refused, match=message):
        worker.check(replace(ORDER, **changes))


@pytest.mark.slow
def test_a_lora_is_of_its_orders_alone(tmp_path, monkeypatch):
    """The next order without one has the model's own bits."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    loaded = small()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    loaded.pipe.transformer.add_adapter(config)
    layers = get_peft_model_state_dict(loaded.pipe.transformer)
    type(loaded.pipe).save_lora_weights(tmp_path, transformer_lora_layers=layers)
    loaded = small()
    settings = replace(SETTINGS, loras={"ink": str(tmp_path)}, recipe="fora", recipes=())
    worker = Worker(settings, loaded)
    worker.warm_up()
    orders = [ORDER, *(replace(ORDER, lora="ink", lora_scale=x) for x in (1.0, 0.5, 1.0)), ORDER]
    plain, full, half, again, after = (
        worker.generate([order], NEVER)[0].pixels for order in orders
    )
    assert torch.equal(plain, after) and torch.equal(full, again)
    assert not torch.equal(plain, full) and not torch.equal(full, half)

    load = loaded.pipe.load_lora_weights

    def half_way(*args, **kwargs):
        load(*args, **kwargs)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(loaded.pipe, "load_lora_weights", half_way)
    with pytest.raises(torch.OutOfMemoryError):
        worker.generate([orders[1]], NEVER)
    assert torch.equal(worker.generate([ORDER], NEVER)[0].pixels, plain)
    monkeypatch.undo()
    assert torch.equal(worker.generate([orders[1]], NEVER)[0].pixels, full)


def test_what_an_order_leaves_out_counts_as_pixels():
    """Frames of the model's own size, a size at its own frames; its own are always allowed."""
    loaded = zoo.random_pipeline("tiny-video", heads=2, head_dim=32)
    own = {**loaded.call, "height": 128, "width": 128, "num_frames": 61}
    worker = Worker(replace(SETTINGS, max_pixels=128 * 128), replace(loaded, call=own))
    video = replace(ORDER, size=None, video=True, format="webp")
    worker.check(video)
    worker.check(replace(video, frames=61))
    with pytest.raises(Refused, match=r"^seconds must give at most 999424 .* got 1064960"):
        worker.check(replace(video, frames=65))
    with pytest.raises(Refused, match=r"^size must give at most 999424 pixels in all, got 3997696"):
        worker.check(replace(video, size=(256, 256)))


def test_a_size_that_only_the_transformer_knows_counts():
    """CogVideoX has sides and frames in its transformer's configuration; so has its order."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    transformer, _ = adapters()["CogVideoXTransformer3DModel"].tiny()
    pipe = CogVideoXPipeline(None, None, None, transformer, CogVideoXDDIMScheduler())
    worker = Worker(replace(SETTINGS, max_pixels=1), zoo.Loaded(pipe))
    config = transformer.config
    own = [8 * config.sample_width, 8 * config.sample_height, config.sample_frames]
    assert [worker._own(name) for name in ("width", "height", "num_frames")] == own
    video = replace(ORDER, size=None, video=True, format="webp")
    worker.check(replace(video, frames=own[2]))
    with pytest.raises(Refused, match=f"^seconds must give at most {math.prod(own)} pixels"):
        worker.check(replace(video, frames=own[2] + 4))


def test_a_batch_that_cannot_be_made_costs_no_picture(worker, monkeypatch):
    """They were made one by one before; the size is not tried again."""
    call = worker._call

    def alone(orders, stop):
        if len(orders) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return call(orders, stop)

    monkeypatch.setattr(worker, "_call", alone)
    made = worker.generate([ORDER, replace(ORDER, seed=9)], NEVER)
    assert [each.batch for each in made] == [1, 1] and worker.limit(ORDER) == 1
