"""A real server on the CPU: two replicas, load, clients that go, a replica that is killed.

`make serve-test` runs it in an environment with Ray; without Ray it is skipped.
"""

import itertools
import os
import re
import shlex
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("ray", reason="Ray is not installed: `make serve-test` has an environment")

from server import PROMPT, ROOT, Server, pixels, resident

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
QUEUE, IN_FLIGHT, REPLICAS = 4, 2, 2
FOR_EVER = 10_000  # steps: minutes, so that such a request is over only when it is stopped


@pytest.fixture(scope="module")
def server():
    with Server(replicas=REPLICAS, queue=QUEUE, in_flight=IN_FLIGHT, recipes=["fora", "taylorseer"],
                max_steps=FOR_EVER) as server:  # fmt: skip
        yield server


def on_both(server, **body):
    """Replies by replica, asked until both have answered."""
    found = {}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for status, reply in pool.map(lambda _: server.post(**body), range(4)):
                assert status == 200, reply
                found.setdefault(reply["flashomni"][0]["replica"], []).append(reply)
            if len(found) == REPLICAS:
                return found
    raise AssertionError(f"only {len(found)} of {REPLICAS} replicas have answered")


def test_the_curl_line_of_the_page_gives_a_picture(server, tmp_path):
    """As it stands there, but for the port; of the model's own size and steps."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^curl .*$", page.replace("\\\n", " "), re.MULTILINE)
    line = line.replace("localhost:8000", f"127.0.0.1:{server.port}")
    subprocess.run(shlex.split(line), cwd=tmp_path, check=True, timeout=300)
    from PIL import Image

    assert Image.open(tmp_path / "picture.png").size == (256, 256)


@pytest.mark.parametrize("recipe", ["balanced", "fora"])
def test_same_seed_same_pixels_on_every_replica(server, recipe):
    """And other seeds have others; a request of several pictures has those of each alone."""
    found = on_both(server, recipe=recipe, num_inference_steps=12)
    same = {pixels(reply) for replies in found.values() for reply in replies}
    assert len(same) == 1
    status, several = server.post(recipe=recipe, num_inference_steps=12, n=2, seed=0)
    assert status == 200 and pixels(several, 1) in same and pixels(several, 0) not in same


def test_a_wrong_request_is_refused_by_name(server):
    """By the front, and by the pipeline, which knows more."""
    for body, field in (({"recipe": "lossless"}, "recipe"), ({"size": "17x17"}, "size")):
        status, reply = server.post(**body)
        assert status == 400 and reply["error"]["param"] == field
    assert server.ask("GET", "/v1/nothing")[0] == 404


def test_health_is_answered_while_all_replicas_generate(server):
    """And says that they do."""
    clients = [server.start(num_inference_steps=FOR_EVER) for _ in range(REPLICAS)]
    server.wait_for(lambda: server.get("/health")[1]["in_flight"] == REPLICAS)
    assert server.get("/health")[1]["replicas"] == REPLICAS
    for client in clients:
        client.close()
    server.wait_for(lambda: server.get("/health")[1]["in_flight"] == 0)


def test_clients_that_go_free_their_replicas(server):
    """As many requests as they hold, none of which would end; then each replica answers others."""
    count = REPLICAS * IN_FLIGHT
    clients = [server.start(num_inference_steps=FOR_EVER) for _ in range(count)]
    server.wait_for(lambda: server.get("/health")[1]["in_flight"] == count)
    for client in clients:
        client.close()
    assert len(on_both(server)) == REPLICAS


def test_overload_is_answered_503_and_passes(server):
    """What is accepted is made; who is refused is told when to come again."""
    expected = pixels(server.post()[1])
    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(lambda _: server.post(num_inference_steps=2), range(24)))
    refused = [reply for status, reply in replies if status == 503]
    made = [reply for status, reply in replies if status == 200]
    assert len(refused) + len(made) == 24 and refused and len(made) >= REPLICAS * IN_FLIGHT
    assert all(int(reply["retry_after"]) >= 1 for reply in refused)
    assert {reply["error"]["code"] for reply in refused} == {"queue_full"}
    assert {pixels(reply) for reply in made} == {expected}
    assert len(on_both(server)) == REPLICAS


def test_a_video_of_a_model_of_pictures_is_a_job_that_fails(server):
    """With the reason."""
    import json

    status, _, body = server.ask("POST", "/v1/videos", {"prompt": PROMPT})
    path = f"/v1/videos/{json.loads(body)['id']}"
    job = server.wait_for(lambda: (j := server.get(path)[1])["status"] == "failed" and j)
    assert status == 200 and "/v1/images/generations" in job["error"]["message"]
    assert server.ask("DELETE", path)[0] == 200 and server.get(path)[0] == 404


def test_five_hundred_requests_leave_memory_as_it_was(server):
    """Of the front and of each replica: the last 300 add less than 3 %, of what a process holds."""
    processes = server.processes("Generator") + server.processes("Front")
    assert len(processes) == REPLICAS + 1
    seeds = itertools.count()

    def load(count):
        with ThreadPoolExecutor(4) as pool:
            recipes = itertools.cycle(["balanced", "balanced", "balanced", "fora"])
            bodies = [{"seed": next(seeds), "recipe": next(recipes)} for _ in range(count)]
            done = pool.map(lambda b: server.post(num_inference_steps=1, **b)[0], bodies)
            assert set(done) == {200}
        return [resident(process) for process in processes]

    warm = load(200)
    after = load(300)
    print("MiB before and after:", [(a >> 20, b >> 20) for a, b in zip(warm, after, strict=True)])
    for a, b in zip(warm, after, strict=True):
        assert b - a < 0.03 * a, (warm, after)


def test_metrics_say_what_was_skipped(server):
    """Ray exports ours; they come with seconds of delay."""
    server.post(recipe="fora", num_inference_steps=12)

    def skipped():
        found = server.metrics()
        return found if found.get("pictures_total", 0) > 100 else None

    found = server.wait_for(skipped)
    assert 0 < found["flops_executed_total"] < found["flops_dense_total"]
    assert found["cancelled_total"] >= REPLICAS and found["seconds_count"] > 100
    assert found.get("engine_faults_total", 0) == 0


def test_a_replica_that_is_killed_loses_only_what_it_held(server):
    """Which another one makes again: nothing is lost. A new one takes its place."""
    seeds = range(6)
    before = {seed: pixels(server.post(seed=seed, num_inference_steps=8)[1]) for seed in seeds}
    old = set(server.processes("Generator"))
    assert len(old) == REPLICAS
    with ThreadPoolExecutor(6) as pool:
        tasks = [pool.submit(server.post, seed=seed, num_inference_steps=8) for seed in seeds]
        server.wait_for(lambda: server.get("/health")[1]["in_flight"] == len(seeds))
        victim = min(old)
        os.kill(victim, signal.SIGKILL)
        replies = [task.result() for task in tasks]
    assert [status for status, _ in replies] == [200] * len(seeds)
    for seed, (_, reply) in zip(seeds, replies, strict=True):
        assert pixels(reply) == before[seed]
    new = server.wait_for(lambda: len(now := set(server.processes("Generator"))) == 2 and now)
    assert victim not in new

    def is_back():
        return {r["flashomni"][0]["replica"] for _, r in [server.post() for _ in range(4)]} - old

    assert server.wait_for(is_back) <= new
