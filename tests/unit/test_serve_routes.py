"""The server's routes without Ray: OpenAI's forms, overload, clients that go, videos as jobs."""

import asyncio
import base64
import io
import json
from dataclasses import replace

from PIL import Image
from serve_parts import SETTINGS, run

from flashomni.lab.media import encode
from flashomni.serve.desk import Desk, File
from flashomni.serve.errors import Failure, overloaded


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
