"""The server's settings, and what requests may ask for: no Ray, no pipeline."""

import json
from dataclasses import replace

import pytest
import torch
from serve_parts import ORDER, SETTINGS, run

from flashomni.serve import Settings
from flashomni.serve.errors import Failure, Refused
from flashomni.serve.orders import (
    MAX_BODY,
    Order,
    read_body,
    read_images,
    read_json,
    read_video,
    within_limit,
)


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
