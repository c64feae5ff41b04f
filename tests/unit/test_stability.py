"""docs/stability.md is a promise: each name that it lists has at least what it had."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from guide import examples

import flashomni
from flashomni import dispatch
from flashomni.engine import recipe, symbols_file
from flashomni.engine.forecasts import FORECASTS
from flashomni.engine.schedules import SCHEDULES
from flashomni.lab.fidelity.peers import PEERS
from flashomni.models import ADAPTERS
from flashomni.policies import POLICIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
# Parameters of functions and fields of dataclasses. More may come behind them; what is here stays.
STABLE = {
    "flashomni.Blocks": "lists text text_from chain",
    "flashomni.Engine.remove": "",
    "flashomni.Engine.report": "",
    "flashomni.Engine.reset": "",
    "flashomni.Engine.save_symbols": "path",
    "flashomni.Engine.step": "step num_steps branch generation",
    "flashomni.Grid": "seqlen_q seqlen_kv text block_m block_n kv_len shape order spans",
    "flashomni.Recipe.from_dict": "data",
    "flashomni.Recipe.load": "path",
    "flashomni.Recipe.of": "recipe",
    "flashomni.Recipe.replace": "",
    "flashomni.Recipe.save": "path",
    "flashomni.Recipe.to_dict": "",
    "flashomni.Summary": "model recipe steps layers seconds_by_kind flops_dense flops_executed "
    "flops_skipped cache_bytes cache_bytes_host notes tier groups generation",
    "flashomni.Symbols": "q_bits kv_bits grid",
    "flashomni.Symbols.dense": "grid batch num_heads device",
    "flashomni.Symbols.kv_mask": "",
    "flashomni.Symbols.pack": "q_mask kv_mask grid",
    "flashomni.Symbols.q_mask": "",
    "flashomni.accelerate": "pipe recipe backend blocks graphs memory ulysses cfg",
    "flashomni.dispatch.register": "op name rank refuses available serves device prefers",
    "flashomni.engine.LayerRun.attend": "q k v out_projection softmax_scale guide gate",
    "flashomni.engine.LayerRun.begin": "seqlen text kv_len",
    "flashomni.engine.LayerRun.count": "op modules rows",
    "flashomni.engine.LayerRun.project": "x linear out norm rope rope_layout",
    "flashomni.engine.LayerRun.project_o": "o linear row_offset always",
    "flashomni.engine.LayerRun.project_q": "x linear out norm rope row_offset rope_layout",
    "flashomni.engine.LayerRun.shared": "make",
    "flashomni.engine.forecasts.Known": "num_steps",
    "flashomni.engine.forecasts.forecast": "name",
    "flashomni.engine.schedules.Plan": "kinds records",
    "flashomni.engine.schedules.Plan.of": "computed num_steps order",
    "flashomni.engine.schedules.Schedule.decide": "layer signals",
    "flashomni.engine.schedules.Schedule.kind": "step num_steps signals",
    "flashomni.engine.schedules.Schedule.learn": "output signals",
    "flashomni.engine.schedules.Schedule.plan": "num_steps order",
    "flashomni.engine.schedules.Schedule.watch": "layer signals",
    "flashomni.engine.schedules.Signals": "step num_steps computed inputs",
    "flashomni.engine.schedules.StepKind": "",
    "flashomni.engine.schedules.schedule": "name",
    "flashomni.engine_of": "pipe",
    "flashomni.gemm_o_update": "terms weight bias symbols",
    "flashomni.lab.fidelity.peers.Peer.attached": "pipe num_steps",
    "flashomni.lab.fidelity.peers.Peer.prepare": "pipe num_steps run",
    "flashomni.lab.fidelity.peers.peer": "name",
    "flashomni.models.Adapter.check": "model",
    "flashomni.models.Adapter.geometry": "model arguments",
    "flashomni.models.Adapter.relies_on": "model",
    "flashomni.models.Adapter.sites": "model",
    "flashomni.models.Adapter.tiny": "",
    "flashomni.models.Adapter.variant": "model",
    "flashomni.models.Reliance": "name module classes why",
    "flashomni.models.Site": "name block run streams returns chain vision by_token modulated "
    "derived sequence stage",
    "flashomni.models.adapter": "transformer",
    "flashomni.policies.AttentionSite": "q k v grid layer num_layers heads step num_steps progress "
    "branch softmax_scale guide backend",
    "flashomni.policies.AttentionSite.alone": "q k grid progress",
    "flashomni.policies.Policy.__call__": "site",
    "flashomni.policies.Policy.known_fraction": "grid",
    "flashomni.policies.Policy.wants_shape": "",
    "flashomni.policies.check_bool": "name value",
    "flashomni.policies.check_int": "name value low high",
    "flashomni.policies.check_range": "name value low high",
    "flashomni.policies.make_policy": "name",
    "flashomni.policies.policy": "name",
    "flashomni.restore": "pipe",
    "flashomni.sparse_attention": "q k v symbols out softmax_scale kv_len lse",
    "flashomni.sparse_gemm_o": "o weight bias symbols bias_terms coefficients always row_offset "
    "out backend",
    "flashomni.sparse_gemm_q": "x weight bias symbols row_offset norm_weight norm_eps rope",
}
BY_KEYWORD = {"flashomni.sparse_attention": {"forecast", "backend"}}
GROUPS = {
    "flashomni.policies": POLICIES,
    "flashomni.schedules": SCHEDULES,
    "flashomni.forecasts": FORECASTS,
    "flashomni.adapters": ADAPTERS,
    "flashomni.peers": PEERS,
}


def find(path):
    """The object of a dotted path."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def names_of(thing):
    """Parameters of a function, fields of a dataclass, without ``self``, ``*`` and ``**``."""
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing) if field.init]
    if isinstance(thing, type):
        return list(getattr(thing, "_fields", ()))  # of a named tuple
    kinds = inspect.signature(thing).parameters.items()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, one in kinds if one.kind not in several and name != "self"]


def imports(code):
    """``module.name`` of all that a piece of code imports of the library."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashomni"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", STABLE)
def test_a_stable_name_has_at_least_what_it_had(path):
    """The same parameters or fields in the same order; whatever came behind has a default."""
    thing, was = find(path), STABLE[path].split()
    names = names_of(thing)
    assert names[: len(was)] == was, "see docs/stability.md: deprecate it first"
    if callable(thing) and not isinstance(thing, type):
        for name in names[len(was) :]:
            parameter = inspect.signature(thing).parameters[name]
            assert parameter.default is not parameter.empty, f"{name} breaks who does without it"
        assert BY_KEYWORD.get(path, set()) <= set(names)


def test_the_page_lists_what_is_held():
    """Its block of imports and the table above are one list, and the guide imports no more."""
    listed = set(imports(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)[0]))
    held = {found for path in STABLE for found in listed if f"{path}.".startswith(f"{found}.")}
    assert held == listed
    assert all(any(f"{path}.".startswith(f"{one}.") for one in listed) for path in STABLE)
    same = {"flashomni.symbols.Symbols": "flashomni.Symbols"}
    code = [text for name, text in examples().items() if name != "pyproject"]
    needed = {same.get(name, name) for text in code for name in imports(text)}
    assert needed <= listed
    for name in flashomni.__all__:
        assert f"flashomni.{name}" in listed


def test_the_groups_of_entry_points_are_those():
    """And each is asked by the registry of its kind."""
    part = PAGE.partition("**Registries")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(flashomni\.\w+)`", part)) == {*GROUPS, dispatch.GROUP}
    for group, registry in GROUPS.items():
        assert registry.group == group


def test_the_formats_of_files_are_those():
    """A new format needs a reader of the old one, and the page to say so."""
    assert f"today {recipe.FORMAT} is written, 1 and {recipe.FORMAT} are read" in PAGE
    assert f"`{symbols_file.FORMAT}`" in PAGE


def test_the_layout_of_symbols_is_that():
    """Lowest bit first, rows of S_s in whole words, the padding zero."""
    grid = flashomni.Grid(128 * 9, 128 * 34)
    q_mask = torch.zeros(9, dtype=torch.bool)
    kv_mask = torch.zeros(9, 34, dtype=torch.bool)
    q_mask[[0, 8]], kv_mask[0, [0, 33]], kv_mask[8, 8] = True, True, True
    packed = flashomni.Symbols.pack(q_mask[None, None], kv_mask[None, None], grid)
    assert packed.q_bits[0, 0].tolist() == [1, 1]
    assert packed.kv_bits.shape == (1, 1, 9, 8)
    assert packed.kv_bits[0, 0, 0].tolist() == [1, 0, 0, 0, 2, 0, 0, 0]
    assert packed.kv_bits[0, 0, 8].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
