"""``flashomni studio``: a page in the browser to try recipes on."""

from __future__ import annotations

import importlib.util
import os
from typing import Annotated

import typer

from flashomni.cli._common import (
    DeviceName,
    DtypeName,
    pick_device,
    pick_dtype,
    plain_errors,
    quiet,
    say,
    status,
)


def studio(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="tiny-image, tiny-video, tiny-wan, a diffusers folder, or a Hub id; of several, "
            "pages begin with the first and can load the others alone.",
            show_default="tiny-image",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="A name of `flashomni show recipe`, or a recipe's .json.")
    ] = "balanced",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="A free one from 7860 on if left out.", min=1, max=65535)
    ] = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Also through Gradio's tunnel, open to the internet; only models that are named "
            "here can be loaded then.",
        ),
    ] = False,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
) -> None:
    """Try recipes in the browser: dense beside accelerated, what was skipped, what it costs."""
    with plain_errors():
        if importlib.util.find_spec("gradio") is None:
            raise ValueError(
                "studio needs gradio, which is not installed: pip install 'flashomni[studio]'"
            )
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        from flashomni.engine import Recipe

        chosen, target = Recipe.of(recipe), pick_device(device)
        models = model or ["tiny-image"]
        only = models if share or len(models) > 1 else None
        with status(f"loading {models[0]}"):
            quiet()
            from flashomni.studio.app import serve
            from flashomni.studio.shelf import Shelf

            shelf = Shelf(target, pick_dtype(dtype, target), only=only)
            blocks, url = serve(shelf, models[0], host=host, port=port, share=share, recipe=chosen)
        say((models[0], "bold"), f" on {target}: {url}")
        if blocks.share_url:
            say(f"for anybody who has the link: {blocks.share_url}")
        if only:
            say(f"pages can load {', '.join(models)}, and nothing else")
        say("Ctrl+C ends it")
        blocks.block_thread()
