"""Requests in OpenAI's form, read and checked; a field that means nothing here is refused."""

from __future__ import annotations

import email
import email.policy
import json
import secrets
from collections.abc import AsyncIterable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flashomni.serve.errors import Refused
from flashomni.serve.settings import Settings
from flashomni.util.words import one_line

SEEDS = 2**32
MAX_BODY = 2**20  # bytes: a prompt and some numbers
TEXTS = {"prompt", "negative_prompt", "model", "size", "seconds", "recipe", "lora", "user"}
EXTRA = {
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "negative_prompt",
    "recipe",
    "lora",
    "lora_scale",
}
IMAGE = EXTRA | {"prompt", "model", "n", "size", "response_format", "output_format", "user"}
VIDEO = EXTRA | {"prompt", "model", "size", "seconds", "num_frames", "user"}
# What OpenAI's clients may send, and the one value that is what happens here anyway.
ONLY = {
    "background": "auto",
    "moderation": "auto",
    "quality": "auto",
    "style": None,
    "stream": False,
    "partial_images": 0,
    "output_compression": 100,
}
FORMATS = ("png", "webp", "jpeg")
LONGEST = {"webp": 16383, "jpeg": 65500}  # pixels of a side that a file can have


@dataclass(frozen=True)
class Order:
    """One picture or video to make; what is ``None`` is the model's default.

    Args:
        prompt: what it shows.
        seed: of the noise; the same seed gives the same pixels.
        recipe: name of an allowed recipe.
        size: width and height, pixels.
        steps: of denoising.
        guidance: ``guidance_scale`` of the pipeline.
        true_cfg: ``true_cfg_scale`` of the pipeline.
        negative: ``negative_prompt`` of the pipeline.
        lora: name of an allowed LoRA.
        lora_scale: its weight.
        video: whether it is a video.
        frames: of it.
        format: of the file: ``png``, ``webp`` or ``jpeg``.
    """

    prompt: str
    seed: int
    recipe: str
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    negative: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    video: bool = False
    frames: int | None = None
    format: str = "png"

    @property
    def key(self) -> Hashable:
        """Orders of one key may be generated as one batch."""
        state = (self.recipe, self.lora, self.lora_scale)
        return (*state, *self.call().items(), self.negative is not None)

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline, without prompts and generator."""
        width, height = self.size or (None, None)
        values = {
            "width": width,
            "height": height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "true_cfg_scale": self.true_cfg,
            "num_frames": self.frames,
        }
        return {name: value for name, value in values.items() if value is not None}


def read_body(body: bytes, kind: str = "") -> Mapping[str, Any]:
    """The fields of a request.

    Args:
        body: JSON, whatever ``kind`` says, or a form.
        kind: its content type; OpenAI's clients send videos as ``multipart/form-data``.

    Raises:
        Refused: it is neither, or too long.
    """
    if len(body) > MAX_BODY:
        raise Refused(f"the body must have at most {MAX_BODY} bytes", status=413)
    return _read_form(body, kind) if kind.startswith("multipart/form-data") else read_json(body)


def _read_form(body: bytes, kind: str) -> Mapping[str, Any]:
    head = b"Content-Type: " + kind.encode("latin-1", "replace") + b"\r\n\r\n"
    form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    data: dict[str, Any] = {}
    for part in form.iter_parts() if form.is_multipart() else ():
        name = str(part.get_param("name", "", "content-disposition"))
        if part.get_filename() is not None:
            raise Refused(f"{one_line(name, 60)} must be left out: no file is taken", name)
        payload = part.get_payload(decode=True)
        text = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""
        data[name] = text if name in TEXTS else _value(text)
    if not data:
        raise Refused("the body must be a form with fields, or JSON")
    return data


def _value(text: str) -> Any:
    """A number of a form, or the text that it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def within_limit(parts: AsyncIterable[bytes]) -> bytes:
    """A body as it comes; of one that is too long, no more than shows that."""
    body = b""
    async for part in parts:
        body += part
        if len(body) > MAX_BODY:
            break
    return body


def read_json(body: bytes) -> Mapping[str, Any]:
    """The body of a request.

    Raises:
        Refused: it is no JSON object.
    """
    try:
        data = json.loads(body)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Refused(f"the body must be JSON: {one_line(error, 200)}") from error
    if not isinstance(data, dict):
        raise Refused(f"the body must be a JSON object, got {type(data).__name__}")
    return data


def read_images(data: Mapping[str, Any], settings: Settings) -> tuple[Order, ...]:
    """A body of ``/v1/images/generations``: an order a picture, seeds counting up from the first.

    Raises:
        Refused: a field is unknown or its value not allowed; it is named.
    """
    _refuse_unknown(data, IMAGE)
    order = _order(data, settings)
    n = _whole(data, "n", 1, settings.max_images) or 1
    _one_of(data, "response_format", ("b64_json",))
    order = replace(order, format=_one_of(data, "output_format", FORMATS) or "png")
    _limit_pixels(order, settings)
    seeds = [(order.seed + i) % SEEDS for i in range(n)]
    return tuple(replace(order, seed=seed) for seed in seeds)


def read_video(data: Mapping[str, Any], settings: Settings) -> Order:
    """A body of ``/v1/videos``.

    Raises:
        Refused: a field is unknown or its value not allowed; it is named.
    """
    _refuse_unknown(data, VIDEO)
    order = _order(data, settings)
    frames = _whole(data, "num_frames", 1, 10_000)
    seconds = data.get("seconds")
    if seconds is not None:
        if frames is not None:
            raise Refused("seconds must be left out where num_frames is given", "seconds")
        # OpenAI's clients send it as text.
        text = {"seconds": int(seconds)} if str(seconds).isdecimal() else data
        frames = (_whole(text, "seconds", 1, 600) or 1) * settings.fps
        frames = frames // 4 * 4 + 1  # what VAEs that squeeze time by 4 can give
    order = replace(order, video=True, frames=frames, format="webp")
    _limit_pixels(order, settings)
    return order


def _order(data: Mapping[str, Any], settings: Settings) -> Order:
    prompt = data.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise Refused(f"prompt must be text, got {_shown(prompt)}", "prompt")
    _one_of(data, "model", (settings.model,))
    negative = data.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise Refused(f"negative_prompt must be text, got {_shown(negative)}", "negative_prompt")
    for name, text in (("prompt", prompt), ("negative_prompt", negative or "")):
        if any("\ud800" <= mark <= "\udfff" for mark in text):  # JSON can say it, no tokenizer can
            raise Refused(f"{name} must be text, got half a surrogate in {_shown(text)}", name)
    lora = _one_of(data, "lora", tuple(settings.loras))
    scale = _number(data, "lora_scale", -4.0, 4.0)
    if scale is not None and lora is None:
        raise Refused("lora_scale must be left out where no lora is named", "lora_scale")
    seed = _whole(data, "seed", 0, SEEDS - 1)
    order = Order(
        prompt=prompt,
        seed=secrets.randbelow(SEEDS) if seed is None else seed,
        recipe=_one_of(data, "recipe", settings.allowed) or settings.recipe,
        size=_size(data),
        steps=_whole(data, "num_inference_steps", 1, settings.max_steps),
        guidance=_number(data, "guidance_scale", 0.0, 100.0),
        true_cfg=_number(data, "true_cfg_scale", 0.0, 100.0),
        negative=negative,
        lora=lora,
        lora_scale=1.0 if scale is None else scale,
    )
    return order


def _limit_pixels(order: Order, settings: Settings) -> None:
    if order.size is None:
        return
    width, height = order.size
    if width * height * (order.frames or 1) > settings.max_pixels:
        frames = f" and {order.frames} frames" if order.frames else ""
        raise Refused(
            f"size must have at most {settings.max_pixels} pixels in all, got "
            f"{width}x{height}{frames}",
            "size",
        )
    longest = LONGEST.get(order.format)
    if longest is not None and max(order.size) > longest:
        raise Refused(
            f"size must have sides of at most {longest} as {order.format}, got {width}x{height}",
            "size",
        )


def _refuse_unknown(data: Mapping[str, Any], known: set[str]) -> None:
    for name, value in data.items():
        if name in known or value is None or (name in ONLY and value == ONLY[name]):
            continue
        if name in ONLY:
            only = json.dumps(ONLY[name]) if ONLY[name] is not None else "left out"
            raise Refused(f"{name} must be {only}, got {_shown(value)}", name)
        raise Refused(
            f"{one_line(name, 60)} is not known here; fields are {', '.join(sorted(known))}",
            one_line(name, 60),
        )


def _size(data: Mapping[str, Any]) -> tuple[int, int] | None:
    text = data.get("size")
    if text is None or text == "auto":
        return None
    width, x, height = text.partition("x") if isinstance(text, str) else ("", "", "")
    if not (x and _digits(width) and _digits(height) and int(width) and int(height)):
        raise Refused(f'size must be "auto" or like "1024x768", got {_shown(text)}', "size")
    return int(width), int(height)


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5


def _whole(data: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refused(
            f"{name} must be a whole number from {least} to {most}, got {_shown(value)}", name
        )
    return value


def _number(data: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise Refused(f"{name} must be a number from {least} to {most}, got {_shown(value)}", name)
    return float(value)


def _one_of(data: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str | None:
    value = data.get(name)
    if value is None or value in allowed:
        return value
    what = ", ".join(allowed) if allowed else "left out: this server has none"
    raise Refused(f"{name} must be {what}, got {_shown(value)}", name)


def _shown(value: Any) -> str:
    return one_line(repr(value), 80)
