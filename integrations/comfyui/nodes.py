"""The three nodes: Accelerate, Report, Tune."""

from __future__ import annotations

from typing import Any, ClassVar

from flashomni import Recipe
from flashomni.engine import presets
from flashomni.engine.recipe import methods
from flashomni.models.generic.hosted import why_not

from .picture import LEGEND, draw
from .sampling import Accelerated, accelerated, take_off
from .tune import sampler_of, table, tune

CATEGORY = "FlashOmni"
DEFAULT_TRIED = "quality\nbalanced\nfast\nfora:interval=2\nfora:interval=3\ntaylorseer:interval=4"


def recipes() -> list[str]:
    """Recipes that run here, presets first."""
    return [name for name in (*presets(), *methods()) if not why_not(Recipe.of(name))]


def recipe_of(name: str, overrides: str = "", recipe_file: str = "") -> Recipe:
    """The recipe that a node's inputs name.

    Raises:
        ValueError: in words of the node.
    """
    settings = ",".join(
        part.strip() for part in overrides.replace("\n", ",").split(",") if part.strip()
    )
    if recipe_file.strip():
        if settings:
            raise ValueError(
                "FlashOmni: overrides are of a named recipe; with recipe_file leave them empty and "
                "change the file"
            )
        name = recipe_file.strip()
    try:
        return Recipe.of(f"{name}:{settings}" if settings else name)
    except (ValueError, NotImplementedError) as error:
        what = "recipe_file" if recipe_file.strip() else "overrides" if settings else "recipe"
        raise ValueError(f"FlashOmni: input {what}: {error}") from error


class FlashOmniAccelerate:
    """A model that computes less: put it between the loader (or LoRA) and the sampler."""

    CATEGORY, FUNCTION = CATEGORY, "accelerate"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Caches and skips what hardly matters while the model is sampled."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "recipe": (recipes(), {"default": "balanced"}),
                "overrides": (
                    "STRING",
                    {"default": "", "tooltip": "settings of the recipe: interval=3, order=1"},
                ),
            },
            "optional": {
                "recipe_file": (
                    "STRING",
                    {"default": "", "tooltip": "a recipe's .json or .yaml, instead of recipe"},
                ),
            },
        }

    def accelerate(
        self, model: Any, recipe: str, overrides: str = "", recipe_file: str = ""
    ) -> tuple[Any]:
        made = recipe_of(recipe, overrides, recipe_file)
        try:
            return (Accelerated(made).put_on(model),)
        except ValueError as error:
            raise ValueError(f"FlashOmni Accelerate: {error}") from error


class FlashOmniReport:
    """What the last sampling of an accelerated model computed, behind the sampler."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "report", True
    RETURN_TYPES = ("LATENT", "IMAGE", "STRING")
    RETURN_NAMES = ("latent", "density_map", "text")
    DESCRIPTION = "A picture of what was computed by block and step, and figures."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tip = "from the sampler, so that the report comes after it; handed on"
        return {"required": {"model": ("MODEL",), "latent": ("LATENT", {"tooltip": tip})}}

    def report(self, model: Any, latent: Any) -> dict[str, Any]:
        ours = accelerated(model)
        if ours is None:
            raise ValueError(
                "FlashOmni Report: model is not accelerated; connect the output of "
                "FlashOmni Accelerate, the one that the sampler gets"
            )
        if ours.report is None:
            raise ValueError(
                "FlashOmni Report: no sampling has run with this model; connect the sampler's "
                "latent, and to both the same accelerated model"
            )
        text = f"{ours.report}\n{LEGEND}"
        return {"ui": {"text": [text]}, "result": (latent, draw(ours.report), text)}


class FlashOmniTune:
    """Tries recipes on your prompt and noise, and hands on the model with the best of them."""

    CATEGORY, FUNCTION = CATEGORY, "tune"
    RETURN_TYPES = ("MODEL", "STRING", "STRING")
    RETURN_NAMES = ("model", "recipe", "text")
    DESCRIPTION = "Samples once without and once with each recipe; takes the one that skips most."
    INPUTS: ClassVar[tuple[str, ...]] = ("noise", "guider", "sampler", "sigmas")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **{name: (name.upper(),) for name in cls.INPUTS},
                "latent_image": ("LATENT",),
                "max_error": (
                    "FLOAT",
                    {"default": 0.1, "min": 0.0, "max": 2.0, "step": 0.01,
                     "tooltip": "relative L2 distance of the latents from the dense ones"},
                ),
                "recipes": ("STRING", {"default": DEFAULT_TRIED, "multiline": True}),
            }
        }  # fmt: skip

    def tune(
        self, noise: Any, guider: Any, sampler: Any, sigmas: Any, latent_image: dict,
        max_error: float, recipes: str,
    ) -> tuple[Any, str, str]:  # fmt: skip
        specs = [line.strip() for line in recipes.splitlines() if line.strip()]
        if not specs:
            raise ValueError(
                "FlashOmni Tune: recipes is empty; write one a line, as fora:interval=2"
            )
        sample = sampler_of(noise, guider, sampler, sigmas, latent_image)
        try:
            best, tried = tune(specs, sample, max_error)
        except ValueError as error:
            raise ValueError(f"FlashOmni Tune: {error}") from error
        model = guider.model_patcher.clone()
        take_off(model)
        if best is not None:
            model = Accelerated(Recipe.of(best.spec)).put_on(model)
        return model, "" if best is None else best.spec, table(best, tried, max_error)


NODES = (FlashOmniAccelerate, FlashOmniReport, FlashOmniTune)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {
    node.__name__: node.__name__.replace("FlashOmni", "FlashOmni ") for node in NODES
}
