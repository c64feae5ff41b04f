"""What is compared, as users write it in one word: a recipe of ours, or a peer."""

from __future__ import annotations

from flashomni.engine import Recipe
from flashomni.lab.fidelity.peers import PEERS, Peer, make_peer


def parse(text: str) -> tuple[str, Recipe | Peer]:
    """A recipe or a peer, and what tables call it.

    Args:
        text: a peer (``diffusers.taylorseer:cache_interval=4``), or what ``Recipe.of`` takes.

    Raises:
        ValueError: it is neither.
        NotImplementedError: a peer that is not installed, or lacks the method.
    """
    return (text, make_peer(text)) if text.partition(":")[0] in PEERS else parse_recipe(text)


def parse_recipe(text: str) -> tuple[str, Recipe]:
    """A recipe, and what tables call it: what was typed, or the name in the file.

    Raises:
        ValueError: it is none.
    """
    recipe = Recipe.of(text)
    return (recipe.name if text.endswith((".json", ".yaml", ".yml")) else text), recipe
