"""The server without Ray: requests, errors, batches, routes, and the pipeline of a replica."""

import asyncio
import base64
import io
import json
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

import flashomni
from flashomni.engine import Recipe
from flashomni.lab import zoo
from flashomni.serve import Settings
from flashomni.serve.batching import Batcher
from flashomni.serve.desk import Desk, File
from flashomni.serve.errors import Failure, Refused, overloaded
from flashomni.serve.exactness import KEPT, Proof, decides_together
from flashomni.serve.media import encode
from flashomni.serve.orders import (
    MAX_BODY,
    Order,
    read_body,
    read_images,
    read_json,
    read_video,
    within_limit,
)
from flashomni.serve.worker import Stopped, Worker

SETTINGS = Settings(recipes=("fora", "taylorseer"), recipe="lossless", max_images=3, max_steps=20)
ORDER = Order("a red circle", 3, "fora", size=(64, 64), steps=4)
NEVER = threading.Event()


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


# Settings


def test_settings_are_read_from_words():
    """As `serve run` gives them: all values are text."""
    args = {"recipe": "fora", "recipes": "balanced:interval=3,order=1; lossless", "replicas": "2",
            "cpus": ".5", "exact": "false"}  # fmt: skip
    settings = Settings.of(args)
    assert settings.allowed == ("fora", "balanced:interval=3,order=1", "lossless")
    assert (settings.replicas, settings.cpus, settings.exact) == (2, 0.5, False)
    assert Settings.of({"recipes": ["fora"], "replicas": 2}).allowed == ("balanced", "fora")


def test_loras_are_folders(tmp_path):
    """By the names that requests may use."""
    settings = Settings.of({"loras": f"ink={tmp_path};oil={tmp_path}"})
    assert dict(settings.loras) == {"ink": str(tmp_path), "oil": str(tmp_path)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"replica": "2"}, "settings are model, recipe, .*; got 'replica'"),
        ({"replicas": "two"}, "replicas must be a whole number, got 'two'"),
        ({"replicas": "0"}, "replicas must be at least 1, got 0"),
        ({"replicas": 1.5}, "replicas must be a whole number, got 1.5"),
        ({"queue": "-1"}, "queue must be at least 0"),
        ({"cpus": "0"}, "cpus must be more than 0"),
        ({"exact": "perhaps"}, "exact must be true or false"),
        ({"recipe": "balancd"}, "recipe must be a preset"),
        ({"recipes": "fora;nope"}, "recipe must be a preset"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, got 'int8'"),
        ({"loras": "ink"}, "loras must be name=folder;name=folder, got 'ink'"),
        ({"loras": "ink=/no/such/folder"}, "loras: ink must be a folder"),
        ({"gpus_per_replica": "2", "ranks": "3"}, "ranks is for the CPU"),
        ({"gpus_per_replica": "2", "max_batch": "2"}, "max_batch must be 1"),
    ],
)
def test_wrong_settings_are_refused(args, message):
    """By name, with what is allowed."""
    with pytest.raises(ValueError, match=message):
        Settings.of(args)


# Requests


def test_a_request_in_openais_form():
    """Fields of OpenAI's client, and ours beside them."""
    body = {"prompt": "x", "model": "tiny-image", "n": 2, "size": "64x96", "quality": "auto",
            "style": None, "user": "u", "response_format": "b64_json", "seed": 7,
            "num_inference_steps": 9, "guidance_scale": 2, "recipe": "fora"}  # fmt: skip
    orders = read_images(read_json(json.dumps(body).encode()), SETTINGS)
    expected = Order("x", 7, "fora", size=(64, 96), steps=9, guidance=2.0)
    assert orders == (expected, replace(expected, seed=8))
    sizes = {"width": 64, "height": 96, "num_inference_steps": 9, "guidance_scale": 2.0}
    assert expected.call() == sizes


def test_what_is_left_out_is_the_models_own():
    """And the seed is drawn, another one each time."""
    first, second = (read_images({"prompt": "x", "size": "auto"}, SETTINGS)[0] for _ in range(2))
    assert first.call() == {} and first.recipe == "lossless" and first.seed != second.seed


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("prompt", None, "must be text"),
        ("prompt", "  ", "must be text"),
        ("prompt", ["a"], "must be text"),
        ("prompt", "\ud800", "half a surrogate"),
        ("negative_prompt", "no \udfff", "half a surrogate"),
        ("model", "dall-e-3", "must be tiny-image"),
        ("n", 0, "from 1 to 3"),
        ("n", 4, "from 1 to 3"),
        ("n", True, "from 1 to 3"),
        ("size", "wide", "1024x768"),
        ("size", "0x64", "1024x768"),
        ("size", "²x64", "1024x768"),
        ("size", "9000x9000", "at most 4194304 pixels"),
        ("seed", -1, "from 0 to 4294967295"),
        ("num_inference_steps", 21, "from 1 to 20"),
        ("num_inference_steps", 2.5, "from 1 to 20"),
        ("guidance_scale", float("nan"), "number from 0"),
        ("recipe", "balanced", "lossless, fora, taylorseer"),
        ("recipe", ["fora"], "lossless, fora, taylorseer"),
        ("lora", "ink", "this server has none"),
        ("lora_scale", 0.5, "left out where no lora"),
        ("negative_prompt", 3, "must be text"),
        ("response_format", "url", "must be b64_json"),
        ("output_format", "gif", "png, webp, jpeg"),
        ("quality", "hd", 'must be "auto"'),
        ("stream", True, "must be false"),
        ("style", "vivid", "must be left out"),
        ("prompts", "x", "fields are "),
    ],
)
def test_wrong_fields_are_refused_by_name(field, value, allowed):
    """In OpenAI's form: status 400, `param` the field, the message with what is allowed."""
    with pytest.raises(Refused, match=f"^{field} .*{allowed}") as caught:
        read_images({"prompt": "x", field: value}, SETTINGS)
    error = Failure.of(caught.value).to_dict()["error"]
    assert caught.value.status == 400 and error["param"] == field
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000])
def test_what_is_no_json_object_is_refused(body):
    """With 400, whatever it is."""
    with pytest.raises(Refused, match="the body must be"):
        read_json(body)


def test_forms_are_read_like_json():
    """OpenAI's clients send videos as forms; numbers are numbers there, and a prompt is text."""
    fields = {"prompt": "7", "seconds": "4", "seed": "3", "size": "64x64"}
    parts = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    body, kind = f"{parts}--x--\r\n".encode(), "multipart/form-data; boundary=x"
    assert read_body(body, kind) == {**fields, "seed": 3}
    assert read_video(read_body(body, kind), SETTINGS).prompt == "7"
    file = body.replace(b'"seed"', b'"input_reference"; filename="a.png"')
    with pytest.raises(Refused, match="input_reference must be left out") as caught:
        read_body(file, kind)
    assert caught.value.param == "input_reference"
    for wrong in (b"", b"--x--", b"prompt=x"):
        with pytest.raises(Refused, match="the body must be a form"):
            read_body(wrong, kind)
    with pytest.raises(Refused, match="at most 1048576 bytes") as caught:
        read_body(b" " * (MAX_BODY + 1))
    assert caught.value.status == 413


def test_a_video_in_openais_form():
    """Seconds are text there; frames are a multiple of four and one."""
    order = read_video({"prompt": "x", "seconds": "4", "size": "64x64"}, SETTINGS)
    assert order.video and order.frames == 49 and order.format == "webp"
    assert read_video({"prompt": "x", "num_frames": 9}, SETTINGS).frames == 9
    assert read_video({"prompt": "x"}, SETTINGS).frames is None
    for wrong in ({"seconds": "soon"}, {"seconds": 0}, {"seconds": 2, "num_frames": 9}):
        with pytest.raises(Refused, match="seconds must be"):
            read_video({"prompt": "x", **wrong}, SETTINGS)
    with pytest.raises(Refused, match="pixels in all, got 1024x1024 and 49 frames"):
        read_video({"prompt": "x", "seconds": "4", "size": "1024x1024"}, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "same"),
    [({"seed": 4}, True), ({"prompt": "other"}, True), ({"format": "webp"}, True),
     ({"size": (64, 96)}, False), ({"steps": 5}, False), ({"recipe": "lossless"}, False),
     ({"guidance": 2.0}, False), ({"lora": "ink"}, False), ({"negative": "no"}, False),
     ({"frames": 5}, False), ({"true_cfg": 2.0}, False)],
)  # fmt: skip
def test_orders_of_one_key_may_go_together(changes, same):
    """All but prompt, seed and file format must be equal."""
    assert (replace(ORDER, **changes).key == ORDER.key) is same


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ValueError("size must be ..."), 400, "invalid_request_error"),
        (NotImplementedError("not with ..."), 400, "invalid_request_error"),
        (RuntimeError("boom"), 500, "server_error"),
        (torch.OutOfMemoryError("full"), 500, "server_error"),
    ],
)
def test_errors_have_the_status_of_whose_fault_they_are(error, status, kind):
    """Ours that name an argument are 400."""
    failure = Failure.of(error)
    assert (failure.status, failure.kind) == (status, kind) and str(error) in failure.message


# Batches


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


class Runs:
    """A `run` of a Batcher that waits until it may go on, and remembers what it was given."""

    def __init__(self):
        self.batches, self.stopped = [], []
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, items, stop):
        self.batches.append(items)
        self.started.release()
        while not self.go.acquire(timeout=0.01):
            if stop.is_set():
                self.stopped.append(items)
                raise Stopped
        return [item.upper() for item in items]

    async def wait(self):
        await asyncio.to_thread(self.started.acquire)


def first_letter(item):
    return item[0]


def test_what_waits_goes_together_in_the_order_of_its_first():
    """Equal keys only, at most as many as the limit, and nobody is overtaken for ever."""

    async def main():
        runs = Runs()
        batcher = Batcher(runs, first_letter, lambda item: 2)
        first = asyncio.create_task(batcher.submit("a1"))
        await runs.wait()
        later = [asyncio.create_task(batcher.submit(x)) for x in ("b1", "a2", "b2", "b3", "a3")]
        await asyncio.sleep(0)
        runs.go.release(9)
        return runs.batches, await asyncio.gather(first, *later)

    batches, results = run(main())
    assert batches == [["a1"], ["b1", "b2"], ["a2", "a3"], ["b3"]]
    assert results == ["A1", "B1", "A2", "B2", "B3", "A3"]


def test_who_goes_is_taken_out():
    """Of the queue at once; a batch is stopped when all of it have gone, not before."""

    async def main():
        runs = Runs()
        batcher = Batcher(runs, first_letter, lambda item: 2)
        alone = asyncio.create_task(batcher.submit("a"))
        await runs.wait()
        two = [asyncio.create_task(batcher.submit(x)) for x in ("b1", "b2")]
        gone = asyncio.create_task(batcher.submit("c"))
        await asyncio.sleep(0)
        gone.cancel()
        alone.cancel()
        await runs.wait()
        two[0].cancel()
        await asyncio.sleep(0)
        runs.go.release()
        return runs, await asyncio.gather(two[1])

    runs, results = run(main())
    assert runs.batches == [["a"], ["b1", "b2"]] and runs.stopped == [["a"]]
    assert results == ["B2"]


def test_a_batch_that_fails_is_its_own():
    """Who waits for it hears of it; the next one runs."""

    async def main():
        def fails(items, stop):
            if items == ["bad"]:
                raise ValueError("size must be ...")
            return items

        batcher = Batcher(fails, first_letter)
        tasks = [batcher.submit(x) for x in ("bad", "good")]
        return await asyncio.gather(*tasks, return_exceptions=True)

    wrong, right = run(main())
    assert isinstance(wrong, ValueError) and right == "good"


@pytest.mark.parametrize(
    ("recipe", "together"),
    [("fora", False), ("taylorseer", False), ("lossless", False), ("topk", False),
     ("balanced", True), ("easycache", True), ("fora:delta_every=2", True)],
)  # fmt: skip
def test_recipes_that_decide_for_a_whole_batch(recipe, together):
    """By a mean over it: then a picture would depend on what somebody else asked for."""
    assert decides_together(Recipe.of(recipe), 28) is together


def test_a_size_that_differed_is_not_tried_again():
    """The next smaller one may be."""
    proof = Proof()
    assert proof.limit("key", 4) == 4 and proof.known("key", 4) is None
    proof.saw("key", 4, False)
    proof.saw("key", 3, True)
    assert proof.limit("key", 4) == 3 and proof.limit("other", 4) == 4
    proof.saw("key", 3, False)
    proof.saw("key", 2, False)
    assert proof.limit("key", 4) == 1
    for number in range(KEPT):
        proof.saw(number, 2, True)
    assert len(proof._same) == KEPT and proof.known("key", 4) is None


def test_a_body_is_read_no_further_than_it_may_be_long():
    """Who sends without end does not fill the memory of the front."""
    sent = []

    async def parts(count):
        for _ in range(count):
            sent.append(1)
            yield b" " * 2**18

    assert len(run(within_limit(parts(3)))) == 3 * 2**18
    sent.clear()
    with pytest.raises(Refused, match="at most 1048576 bytes"):
        read_body(run(within_limit(parts(1000))))
    assert len(sent) == 5


def test_sides_are_what_a_file_can_have():
    """Told before it is generated, not when it is encoded."""
    long = {"prompt": "x", "size": "16384x64"}
    assert read_images(long, SETTINGS)[0].size == (16384, 64)
    with pytest.raises(Refused, match=r"^size must have sides of at most 16383 as webp"):
        read_images({**long, "output_format": "webp"}, SETTINGS)
    with pytest.raises(Refused, match=r"^size must have sides of at most 16383 as webp"):
        read_video(long, SETTINGS)


# The pipeline


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


# Routes


class Replicas:
    """What a desk sends orders to."""

    def __init__(self, answer=None):
        self.orders, self.cancelled, self.answer = [], [], answer
        self.go = asyncio.Event()

    async def __call__(self, order):
        self.orders.append(order)
        if self.answer is not None:
            return self.answer(order)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(order)
            raise
        return made(order)


def made(order):
    return File(f"picture {order.seed}".encode(), {"recipe": order.recipe, "seconds": 2.0})


async def two():
    return 2


def desk(answer=made):
    replicas = Replicas(answer)
    return Desk(SETTINGS, replicas, two), replicas


async def post(desk, path="/v1/images/generations", **body):
    return await desk.answer("POST", path, json.dumps(body).encode())


def test_pictures_are_answered_in_openais_form():
    """One file a seed, in base64; beside it what it cost."""

    async def main():
        one, replicas = desk()
        reply = await post(one, prompt="x", n=2, seed=5)
        raw = await one.answer("POST", "/v1/images/generations", b'{"prompt": "x"}', "image/png")
        return reply, raw, replicas

    reply, raw, replicas = run(main())
    data = json.loads(reply.body)
    assert reply.status == 200
    files = [base64.b64decode(item["b64_json"]) for item in data["data"]]
    assert files == [b"picture 5", b"picture 6"]
    assert [each["seed"] for each in data["flashomni"]] == [5, 6]
    assert raw.type == "image/png" and raw.body == f"picture {replicas.orders[-1].seed}".encode()
    assert raw.headers["x-flashomni-recipe"] == "lossless"


def test_models_health_and_what_there_is_not():
    """Each as a client of OpenAI's expects it."""

    async def main():
        one, _ = desk()
        paths = ("/v1/models", "/v1/models/tiny-image", "/health", "/v1/engines", "/v1/videos_")
        return [await one.answer("GET", path, b"") for path in paths]

    models, model, health, *nothing = run(main())
    assert json.loads(models.body)["data"][0]["id"] == "tiny-image"
    assert json.loads(model.body)["recipes"] == ["lossless", "fora", "taylorseer"]
    assert json.loads(health.body)["replicas"] == 2 and health.status == 200
    for path, reply in zip(("engines", "videos_"), nothing, strict=True):
        message = json.loads(reply.body)["error"]["message"]
        assert reply.status == 404 and message == f"there is no GET /v1/{path} here"


def test_overload_is_503_with_retry_after():
    """The other pictures of the request are not made for nothing."""
    answers = iter([made, lambda order: overloaded(9, 7)])

    async def main():
        one, _ = desk(lambda order: next(answers)(order))
        return await post(one, prompt="x", n=2)

    reply = run(main())
    assert reply.status == 503 and reply.headers["Retry-After"] == "7"
    assert json.loads(reply.body)["error"]["code"] == "queue_full"


def test_videos_are_refused_like_pictures_where_too_many_wait():
    """As overload, with when to come again; programs tell it by its code."""

    async def main():
        one = Desk(replace(SETTINGS, queue=0), Replicas(), two)
        first = await post(one, "/v1/videos", prompt="x")
        second = await post(one, "/v1/videos", prompt="x")
        one.jobs.delete(json.loads(first.body)["id"])
        return second

    reply = run(main())
    error = json.loads(reply.body)["error"]
    assert reply.status == 503 and int(reply.headers["Retry-After"]) >= 1
    assert (error["code"], error["type"]) == ("queue_full", "overloaded_error")


def test_headers_are_ascii():
    """Whatever the engine failed with: a header that cannot be sent would lose the picture."""

    async def main():
        one, _ = desk(lambda order: File(b"picture", {"seconds": 1.0, "fault": "\u6f22 \u2026"}))
        return await one.answer("POST", "/v1/images/generations", b'{"prompt": "x"}', "image/png")

    assert run(main()).headers["x-flashomni-fault"] == "? ?"


def test_a_client_that_goes_takes_its_orders_along():
    """All pictures of the request."""

    async def main():
        one, replicas = desk(None)
        task = asyncio.create_task(post(one, prompt="x", n=3))
        while len(replicas.orders) < 3:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return replicas, one

    replicas, one = run(main())
    assert len(replicas.cancelled) == 3 and one.in_flight == 0


def test_a_video_is_a_job():
    """Asked for, looked at, fetched, deleted; one that is under way is stopped."""

    async def main():
        one, replicas = desk(None)
        replies = []

        async def ask(method, path):
            reply = await one.answer(method, path, b"")
            replies.append(reply.status)
            return reply

        first, second = [
            json.loads((await post(one, "/v1/videos", prompt="x", seed=1)).body) for _ in range(2)
        ]
        path = f"/v1/videos/{first['id']}"
        await asyncio.sleep(0)
        early = await ask("GET", f"{path}/content")
        await ask("DELETE", f"/v1/videos/{second['id']}")
        replicas.go.set()
        while json.loads((await one.answer("GET", path, b"")).body)["status"] != "completed":
            await asyncio.sleep(0)
        content = await ask("GET", f"{path}/content")
        listed = json.loads((await ask("GET", "/v1/videos")).body)["data"]
        await ask("DELETE", path)
        await ask("GET", path)
        return early, content, listed, replies, replicas, first

    early, content, listed, replies, replicas, first = run(main())
    assert json.loads(early.body)["error"]["message"].endswith("is in_progress")
    assert content.body == b"picture 1" and content.type == "image/webp"
    assert [job["id"] for job in listed] == [first["id"]] and len(replicas.cancelled) == 1
    assert replies == [409, 200, 200, 200, 200, 404]


def test_a_video_that_was_accepted_waits_for_replicas_that_are_full():
    """Its client was told that it comes, and has nothing else to try again."""
    answers = iter([lambda order: overloaded(9, 0)] * 3 + [made])

    async def main():
        one, replicas = desk(lambda order: next(answers)(order))
        path = f"/v1/videos/{json.loads((await post(one, '/v1/videos', prompt='x')).body)['id']}"
        seen = []
        while not seen or seen[-1] != "completed":
            await asyncio.sleep(0)
            seen.append(json.loads((await one.answer("GET", path, b"")).body)["status"])
        return seen, replicas

    seen, replicas = run(main())
    assert set(seen) == {"queued", "completed"} and len(replicas.orders) == 4


def test_a_video_that_fails_says_why():
    """In the job; the request for it was answered long ago."""

    async def main():
        one, _ = desk(lambda order: Failure(400, "size must be ...", "size"))
        job = json.loads((await post(one, "/v1/videos", prompt="x")).body)
        for _ in range(5):
            await asyncio.sleep(0)
        return json.loads((await one.answer("GET", f"/v1/videos/{job['id']}", b"")).body)

    job = run(main())
    assert job["status"] == "failed" and job["error"]["param"] == "size"


def test_files():
    """A picture keeps its pixels; a video is an animation."""
    frames = [Image.new("RGB", (16, 8), (i * 60, 0, 0)) for i in range(4)]
    for kind in ("png", "webp"):
        read = Image.open(io.BytesIO(encode(frames[:1], kind))).convert("RGB")
        assert read.tobytes() == frames[0].tobytes()
    assert Image.open(io.BytesIO(encode(frames[:1], "jpeg"))).size == (16, 8)
    assert Image.open(io.BytesIO(encode(frames, "webp"))).n_frames == 4
