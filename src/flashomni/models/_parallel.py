"""What diffusers was told about parallelism, and whether an accelerated model can do it."""

from __future__ import annotations

from torch import nn

from flashomni.engine import Recipe
from flashomni.engine.sharding import config_of, why_not
from flashomni.models import Adapter
from flashomni.models._relies import PROCESSOR
from flashomni.parallel import Ranks


def find_ranks(model: nn.Module, adapter: Adapter, recipe: Recipe) -> tuple[Ranks, bool] | None:
    """The ranks that share a model's sequence, and whether its lengths may be uneven.

    Returns:
        ``None`` for a model on one card.

    Raises:
        NotImplementedError: a kind of parallelism, a model or a recipe for which there is none.
    """
    config, name = config_of(model), type(model).__name__
    context = getattr(config, "context_parallel_config", None)
    for each in adapter.relies_on(model):
        theirs = getattr(each.module, "_parallel_config", None)
        if each.why == PROCESSOR and theirs is not None and theirs is not config:
            raise NotImplementedError(
                f"{each.name}: context parallelism of this attention alone is not supported; call "
                "transformer.enable_parallelism"
            )
    if config is None:
        return None
    if context is None:
        raise NotImplementedError(
            f"{name}: tensor parallelism is not supported, context parallelism with an "
            "ulysses_degree is"
        )
    reasons = []
    if context.ring_degree > 1:
        kind = "ring attention" if context.ulysses_degree == 1 else "ring with Ulysses (unified)"
        reasons.append(f"{kind} is not, an ulysses_degree alone is")
    if "parallel" not in vars(type(adapter)):  # what a relative can says nothing of this one
        reasons.append(f"not for {name}: call accelerate without it")
    heads = getattr(model.config, "num_attention_heads", 0)
    if heads % context.ulysses_degree:
        reasons.append(
            f"{heads} heads cannot be shared out evenly among {context.ulysses_degree} ranks"
        )
    reasons += [f"not with recipe {recipe.name}: {reason}" for reason in why_not(recipe)]
    if reasons:
        raise NotImplementedError(f"context parallelism is not supported: {'; '.join(reasons)}")
    return Ranks(context._ulysses_mesh.get_group()), bool(context.ulysses_anything)
