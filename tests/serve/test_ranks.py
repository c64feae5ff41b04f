"""A replica of two processes, on the CPU: the picture of one, and a rank that is killed."""

import os
import signal

import pytest

pytest.importorskip("ray", reason="Ray is not installed: `make serve-test` has an environment")

from server import PROMPT, Server, pixels

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
FOR_EVER = 10_000  # steps


@pytest.fixture(scope="module")
def server():
    with Server(replicas=1, ranks=2, recipe="balanced", recipes=["lossless"],
                max_steps=FOR_EVER) as server:  # fmt: skip
        yield server


def picture(server, **body):
    status, reply = server.post(num_inference_steps=12, **body)
    assert status == 200, reply
    return pixels(reply)


def alone(recipe):
    """The picture that one process makes."""
    import torch

    import flashomni
    from flashomni.lab import zoo

    torch.set_num_threads(1)
    loaded = zoo.load("tiny-image")
    loaded.pipe.set_progress_bar_config(disable=True)
    call = {**loaded.call, "width": 64, "height": 64, "num_inference_steps": 12}
    with flashomni.accelerate(loaded.pipe, recipe):
        noise = torch.Generator("cpu").manual_seed(1)
        return loaded.pipe(PROMPT, **call, generator=noise).images[0].tobytes()


@pytest.mark.parametrize("recipe", ["balanced", "lossless"])
def test_two_ranks_make_the_picture_of_one(server, recipe):
    """To a level of 255, where a sum is another in its last bits."""
    pairs = zip(picture(server, recipe=recipe), alone(recipe), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1


def test_two_ranks_make_one_picture(server):
    """The same each time, as the seed says; recipes follow one another on both."""
    first = picture(server)
    assert picture(server, recipe="lossless") != first
    assert picture(server) == first and picture(server, seed=2) != first


def test_what_one_rank_refuses_all_refuse(server):
    """And go on together."""
    status, reply = server.post(size="17x17")
    assert status == 400 and reply["error"]["param"] == "size"
    assert picture(server)


def test_both_ranks_stop_behind_the_same_step(server):
    """The client has gone; they answer the next one."""
    client = server.start(num_inference_steps=FOR_EVER)
    server.wait_for(lambda: server.get("/health")[1]["in_flight"] == 1)
    client.close()
    assert picture(server)


def test_a_rank_that_is_killed_takes_its_group_along(server):
    """A new group makes the same picture."""
    before = picture(server)
    (rank,) = server.processes("Rank")
    (old,) = server.processes("Generator")
    os.kill(rank, signal.SIGKILL)

    def is_back():
        return [p for p in server.processes("Generator") if p != old]

    server.wait_for(is_back)

    def answered():
        status, reply = server.post(num_inference_steps=12)
        return reply if status == 200 else None

    reply = server.wait_for(answered)
    assert pixels(reply) == before and reply["flashomni"][0]["replica"] != old
