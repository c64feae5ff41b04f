"""``accelerate`` and its ways back: ``restore`` and ``engine_of``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashomni.dispatch import registered
from flashomni.engine import Clock, Engine, Experts, Recipe
from flashomni.engine.geometry import Asked
from flashomni.engine.graphs import Graphs
from flashomni.engine.memory import Budget
from flashomni.engine.runtime import Runtime
from flashomni.engine.sharding import Sharding
from flashomni.engine.state.turns import why_no_turns
from flashomni.models import Adapter, adapters, find_adapter
from flashomni.models._chosen_attention import OfProcess, kept_backend, process_backend
from flashomni.models._memory import call_shapes
from flashomni.models._parallel import Theirs, find_ranks
from flashomni.models.generic import Blocks
from flashomni.parallel import Mesh

log = logging.getLogger("flashomni")
COMPONENTS = ("transformer", "transformer_2")  # of pipelines, in the order in which they run
Named = Recipe | str | Path


def accelerate(
    pipe: Any,
    recipe: Named | Mapping[str, Named] = "balanced",
    *,
    backend: str | None = None,
    blocks: Blocks | None = None,
    graphs: bool | str = "auto",
    memory: str | int | None = None,
    ulysses: int = 1,
    cfg: int = 1,
    **settings: Any,
) -> Engine:
    """Make a diffusers pipeline generate faster. ``engine.remove()`` undoes it exactly.

    ``ulysses`` ranks of torch.distributed share the sequence of one generation, each with the
    symbols of its heads and the caches of its rows; every rank calls the pipeline with the same
    arguments. A sequence that ranks share by diffusers' context parallelism (``enable_parallelism``
    with an ``ulysses_degree``, before or after) stays shared; other kinds are refused.

    Args:
        pipe: a pipeline with a ``transformer``, or a transformer itself, of diffusers or your own.
            Where a ``transformer_2`` runs some of the steps (Wan 2.2), both are accelerated, each
            over its own steps, and the engine is one of both. It is accelerated for every pipeline
            that calls it; in a loop of your own call ``engine.step(i, num_steps)`` before each call
            of it.
        recipe: a preset, a method's or policy's name, a path to a recipe's JSON or YAML, or a
            ``Recipe``. Of a pipeline with two transformers also one for each, by their names;
            one that is not named stays as it is.
        backend: take exactly this backend in every op; by default the best that accepts.
        blocks: what is known of the blocks of a transformer that no adapter knows; without it they
            are found. Given for one that an adapter knows, it does without the adapter.
        graphs: run steps as CUDA graphs from the third generation of one shape and length on (the
            second records them): ``True`` wherever that is possible, ``"auto"`` where they hold at
            most a sixteenth of the GPU's memory, ``False`` never. The report says how many there
            are, what they hold, and why there are none. The pictures are the same bits. Ranks that
            share a sequence record with ``True`` alone: call ``engine.remove()`` before
            ``destroy_process_group``, which waits for recordings that hold the group.
        memory: what the caches may take on the device: ``"4GB"``, bytes, or ``"auto"`` for half of
            what is free. Where the recipe would keep more, it is lowered, before the first step:
            dtype and place of histories, carry, forecast orders, at last the output alone is cached
            (:func:`flashomni.engine.memory.ladder`); log and report say to what, and the bytes.
        ulysses: ranks that share a sequence: all of them, after ``init_process_group``. Any number
            up to that of the heads.
        cfg: conditioning branches that run at once, on ``ulysses`` ranks each, where a pipeline
            calls its transformer for one after the other (true CFG of Wan and Qwen-Image).
        settings: settings of the recipe to replace, by name: ``interval=3``.

    Returns:
        The engine, which reports and can be removed; also a context manager.

    Raises:
        ValueError: the recipe, a setting, the backend or the model is unknown, or the pipeline is
            accelerated already.
        NotImplementedError: the model is in a state that cannot be accelerated; the message names
            it. Nothing is left on the pipeline in either case.
    """
    models = transformers_of(pipe)
    if not models:
        raise ValueError(
            f"pipe must be a diffusers pipeline with a transformer, or one of "
            f"{', '.join(adapters())}; got {type(pipe).__name__}"
        )
    recipes = _recipes(recipe, list(models), settings)
    names = sorted(each.name for each in registered("attention"))  # which every recipe needs
    if backend is not None and backend not in names:
        raise ValueError(f"backend must be one of {', '.join(names)}, got {backend!r}")
    if blocks is not None and not isinstance(blocks, Blocks):
        raise ValueError(f"blocks must be flashomni.Blocks(...), got {blocks!r}")
    if blocks is not None and len(recipes) > 1:
        raise ValueError(
            f"blocks are of one model, and the pipeline has {' and '.join(recipes)}: accelerate "
            "each of them by itself"
        )
    mesh = Mesh.of(ulysses, cfg)
    engines: dict[str, Engine] = {}
    clock: Clock | None = None
    try:
        for name, each in recipes.items():
            model = models[name]
            clock = Clock(model, None if isinstance(pipe, nn.Module) else pipe, clock)
            theirs = Theirs(model)
            try:
                engines[name] = _one(
                    pipe, name, model, each, backend, blocks, graphs, memory, clock, mesh, theirs
                )
            except BaseException:
                theirs.put_back()
                clock.remove()
                raise
    except BaseException:
        for engine in engines.values():
            engine.remove()
        raise
    if len(engines) == 1:
        return next(iter(engines.values()))
    both = Experts(engines)
    for name in engines:
        _hold(models[name], both)
    return both


def _one(
    pipe: Any,
    component: str,
    model: nn.Module,
    recipe: Recipe,
    backend: str | None,
    blocks: Blocks | None,
    graphs: bool | str,
    memory: str | int | None,
    clock: Clock,
    mesh: Mesh,
    theirs: Theirs,
) -> Engine:
    """Accelerate one transformer."""
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    if compiled or isinstance(model, torch._dynamo.OptimizedModule):
        raise NotImplementedError("the transformer is compiled: accelerate it first, then compile")
    if engine_of(model) is not None:
        raise ValueError("the pipeline is accelerated already: call engine.remove() first")
    from flashomni.models import _attach
    from flashomni.models._hooks import refuse_hooked
    from flashomni.models._offload import weights_to_come
    from flashomni.models.generic.tier import Generic

    found = _find(model, blocks)
    sites = found.sites(model)
    _attach.clear_remains(model, sites)

    find = partial(find_ranks, model, found, recipe, mesh.ulysses, theirs)
    sharding = Sharding(model, find, found.parallel, found.latents)
    of_process = OfProcess(model)

    def check() -> None:
        sharding.start()
        if memory is not None and (sharding.ranks or mesh.cfg):
            raise NotImplementedError(
                "memory is not supported on several ranks, each of which might keep to another "
                "recipe: choose the recipe's storage yourself"
            )
        refuse_hooked(model, sites)
        found.check(model)
        of_process.look()

    check()
    reasons = [] if mesh.cfg is None else why_no_turns(recipe)
    if reasons:
        raise NotImplementedError(f"cfg is not supported with {recipe.name}: {'; '.join(reasons)}")
    layers = [site.name for site in sites]
    if recipe.schedule.modulates and sites[0].modulated is None:
        raise NotImplementedError(
            f"schedule {recipe.schedule.name} looks at the modulated input of the first block, "
            f"which nothing gives for {type(model).__name__}; take first_block or easycache"
        )
    order = recipe.sparse.token_order
    if order != "raster" and not found.reorders:
        raise NotImplementedError(
            f"token_order {order!r} needs an adapter that knows what goes with each token of "
            f"{type(model).__name__}; take token_order 'raster'"
        )
    runtime = Runtime(model, recipe, layers, clock, backend, check, found.latents)
    runtime.sharding, runtime.cfg = sharding, mesh.cfg
    runtime.noted = of_process.notes
    if memory is not None:
        said = found.said if isinstance(found, Generic) else None
        has_text = None if said is None else said.text is not None
        foresee = partial(call_shapes, model, sites, has_text=has_text)
        coming = partial(weights_to_come, model)
        runtime.budget = Budget(recipe, memory, foresee, coming, type(model).__name__)
    if graphs != "auto" or torch.cuda.is_available():
        runtime.graphs = Graphs(graphs, model, _attach.is_ours, process_backend)
    shaped = next((each for each in recipe.policies if each.wants_shape()), recipe.policy)
    runtime.geometry = Asked(model, shaped, partial(found.geometry, model), order)
    take_off = _attach.attach(runtime, sites, found)

    def detach() -> None:
        take_off()
        theirs.put_back()

    engine = Engine(runtime, pipe, detach, component)
    _hold(model, engine)
    log.info(
        "%s accelerated with recipe %s: %d blocks, schedule %s, backend %s",
        type(model).__name__,
        recipe.name,
        len(sites),
        recipe.schedule.name,
        backend or "automatic",
    )
    return engine


def _find(model: nn.Module, blocks: Blocks | None) -> Adapter:
    """The adapter of a model, or what learns it.

    A model is learned where there is no adapter, where it is a variant that its adapter does not
    run, and where the attention that the user has chosen is to be kept: an adapter brings its own.
    """
    from flashomni.models.generic.tier import Generic

    if blocks is not None:
        return Generic(model, blocks)
    try:
        adapter = find_adapter(model)
    except ValueError as unknown:
        try:
            return Generic(model)
        except ValueError as nothing:
            raise ValueError(f"{unknown}; {nothing}") from None
    if kept_backend(model) is not None:
        return Generic(model)
    variant = adapter.variant(model)
    return Generic(model, why=variant) if variant else adapter


def engine_of(pipe: Any) -> Engine | None:
    """The engine on a pipeline or a transformer, or ``None``.

    Args:
        pipe: what :func:`accelerate` took, or another pipeline with the same transformer.
    """
    from flashomni.models import _attach

    for model in transformers_of(pipe).values():
        hook = _attach.call_hook(getattr(model, "_orig_mod", model))
        if hook is not None:
            return hook.engine
    return None


def restore(pipe: Any) -> bool:
    """Take the engine off a pipeline or a transformer, without the handle.

    Returns:
        Whether there was one.
    """
    engine = engine_of(pipe)
    if engine is not None:
        engine.remove()
    return engine is not None


def _hold(model: nn.Module, engine: Engine) -> None:
    """What is found on the model from now on."""
    from flashomni.models import _attach

    hook = _attach.call_hook(model)
    assert hook is not None
    hook.engine = engine


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by their names, in the order in which they run.

    Args:
        pipe: a pipeline, or a transformer itself.
    """
    if isinstance(pipe, nn.Module):
        return {COMPONENTS[0]: pipe}
    found: dict[str, nn.Module] = {}
    for name in COMPONENTS:
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module) and not any(model is other for other in found.values()):
            found[name] = model
    return found


def _recipes(
    recipe: Named | Mapping[str, Named], names: list[str], settings: dict[str, Any]
) -> dict[str, Recipe]:
    """The recipe of each transformer that is to be accelerated, by its name."""
    if not isinstance(recipe, Mapping):
        made = Recipe.of(recipe, **settings)
        return dict.fromkeys(names, made)
    wrong = [name for name in recipe if name not in names]
    if wrong or not recipe:
        raise ValueError(
            f"recipe must be one recipe, or recipes by the names {', '.join(names)}, got "
            f"{', '.join(map(repr, recipe)) or 'none'}"
        )
    return {name: Recipe.of(recipe[name], **settings) for name in names if name in recipe}
