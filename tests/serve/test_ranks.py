"""A replica of two processes, on the CPU: the picture of one, and a rank that is killed."""

import inspect
import os
import signal

import pytest

import flashomni

pytest.importorskip("ray", reason="Ray is not installed: `make serve-test` has an environment")

from server import Server, pixels

pytestmark = [
    pytest.mark.serve,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "ulysses" not in inspect.signature(flashomni.accelerate).parameters,
        reason="accelerate has no ulysses= yet, so Settings refuse several ranks",
    ),
]
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
