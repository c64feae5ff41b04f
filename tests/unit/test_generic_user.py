"""Transformers that no library knows: what is learned of them, and what is refused by name."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import flashomni
from conftest import residue
from flashomni.engine import Recipe
from flashomni.models import Blocks

pytestmark = pytest.mark.usefixtures("no_grad")

WIDTH, HEADS = 32, 4
FORA = Recipe.of("fora", interval=3, warmup=0.0, level="layers")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.options = options

    def forward(self, x, mask=None):
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        if self.options.get("enable_gqa"):
            k, v = k[:, ::2], v[:, ::2]
        o = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return self.out(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """``x + attention(x) * t``, then an MLP."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.mlp = Attention(**options), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t, mask=None, skip=None):
        if skip is not None:
            x = x + 0.5 * skip
        x = x + self.attention(x, mask) * t
        return x + torch.tanh(self.mlp(x))


class Net(nn.Module):
    """Blocks in ``layers``; what the model does ``between`` them is the test's."""

    def __init__(self, block=Block, count=6, between="nothing", **options):
        super().__init__()
        self.layers = nn.ModuleList(block(**options) for _ in range(count))
        self.between = between

    def forward(self, x, t, mask=None, keep=False):
        kept = []
        for index, layer in enumerate(self.layers):
            skip = kept.pop() if self.between == "skip" and index >= 3 else None
            x = layer(x, t, mask, skip)
            if self.between == "in place":
                x[:, 4:] += 1
            elif self.between == "new tensor":
                x = x + 1
            if self.between == "list" or keep or (self.between == "skip" and index < 3):
                kept.append(x)
        return kept if keep or self.between == "list" else [x]


def inputs(**more):
    torch.manual_seed(1)
    return {"x": torch.randn(2, 300, WIDTH), "t": torch.ones(1, 1, WIDTH), **more}


def made(*args, **kwargs):
    torch.manual_seed(0)
    return Net(*args, **kwargs).eval()


def check(model, given, recipe=FORA, steps=6, **options):
    """Every step equals stock; gives the report."""
    stock = [x.clone() for x in copy.deepcopy(model)(**given)]
    with flashomni.accelerate(model, recipe, **options) as engine:
        for step in range(steps):
            engine.step(step, steps + 1)
            torch.testing.assert_close(list(model(**given)), stock, **CLOSE)
        return engine.report()


def bypassed(report):
    return sum(kind == "bypass" for step in report.steps for kind in step["layer_kinds"])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("between", ["nothing", "in place", "new tensor", "skip", "list"])
def test_what_a_model_does_between_its_blocks(between, inference):
    """Skip connections, kept lists and additions: right, and still cached."""
    with torch.inference_mode() if inference else torch.no_grad():
        report = check(made(between=between), inputs())
    assert bypassed(report) >= 12
    assert report.tier == "generic"


def test_a_model_in_a_list_that_is_named():
    """``blocks`` names the lists, by module or by path, and where the text is."""
    model = made()
    for lists in ([model.layers], ["layers"]):
        blocks = Blocks(lists=lists, text="first", text_from="text")
        report = check(model, inputs(), blocks=blocks)
        assert report.tier == "declared"
        assert bypassed(report)


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ({"lists": ["nowhere"]}, "lists must hold lists of the model's blocks, got 'nowhere'"),
        ({"lists": ["layers.0"]}, "layers.0 is a Block"),
        ({"lists": "layers"}, "lists must be a sequence"),
        ({"text": "middle"}, "text must be 'first', 'last' or None, got 'middle'"),
    ],
)
def test_wrong_blocks_are_named(blocks, match):
    model = made()
    clean = residue(model)
    with pytest.raises(ValueError, match=match):
        flashomni.accelerate(model, "fora", blocks=Blocks(**blocks))
    assert residue(model) == clean


class Returns(Block):
    def forward(self, x, t, mask=None, skip=None):
        return {"x": super().forward(x, t)}


class Shrinks(Block):
    def forward(self, x, t, mask=None, skip=None):
        return super().forward(x, t)[:, ::2]


class Writes(Block):
    def forward(self, x, t, mask=None, skip=None):
        return x.add_(self.attention(x))


class Remembers(Block):
    def forward(self, x, t, mask=None, skip=None):
        x = super().forward(x, t)
        if mask is not None:
            mask["seen"] = x
        return x


class Dicts(Net):
    def forward(self, x, t):
        for layer in self.layers:
            x = layer(x, t)["x"]
        return [x]


class Cache:
    """What a block may write into."""


class Caches(Net):
    def forward(self, x, t):
        for layer in self.layers:
            x = layer(x, t, None, None) if not isinstance(layer, Takes) else layer(x, t, Cache())
        return [x]


class Takes(Block):
    def forward(self, x, t, cache=None):
        return super().forward(x, t)


class Twice(Net):
    def forward(self, x, t):
        for layer in (*self.layers, self.layers[0]):
            x = layer(x, t)
        return [x]


class Swaps(Block):
    def forward(self, x, y, t):
        return torch.sin(y), torch.cos(x) + self.attention(x)


class Pairs(Net):
    def forward(self, x, t):
        y = x * 2
        for layer in self.layers:
            x, y = layer(x, y, t)
        return [x]


REFUSED = {
    "dict": (lambda: Dicts(Returns, 2), {}, "layers.0: it returns a dict"),
    "shape": (lambda: Net(Shrinks, 2), {}, r"goes on as x, but is \[2, 150, 32\]"),
    "in place": (lambda: Net(Writes, 2), {}, "it writes into its argument x"),
    "dict argument": (lambda: Net(Remembers, 2), {"mask": {}}, "writes into its argument mask"),
    "object": (lambda: Caches(Takes, 2), {}, "its argument cache is a Cache"),
    "shared": (lambda: Twice(Block, 2), {}, "layers.0: it is called 2 times in one call"),
    "ambiguous": (lambda: Pairs(Swaps, 1), {}, "could carry on x or y"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("inference", [False, True])
def test_refusals_name_the_block_and_the_cause(case, inference):
    """Not safe to leave out: the list is computed in every step, and the report says why."""
    torch.manual_seed(0)
    make, more, match = REFUSED[case]
    model = make().eval()
    with torch.inference_mode() if inference else torch.no_grad():
        given = inputs(**more)
        stock = copy.deepcopy(model)(**{**given, "x": given["x"].clone()})[0]
        with flashomni.accelerate(model, FORA) as engine:
            for step in range(4):
                engine.step(step, 6)
                again = {**given, "x": given["x"].clone()}
                torch.testing.assert_close(model(**again)[0], stock, **CLOSE)
            report = engine.report()
    assert not bypassed(report)
    (note,) = [note for note in report.notes if "in every step" in note]
    assert note.startswith("layers: computed in every step, because layers.0")
    assert re.search(match, note)


def test_two_streams_that_change_places_are_followed():
    """By what the next block gets, not by shape or name."""
    torch.manual_seed(0)
    report = check(Pairs(Swaps, 3).eval(), inputs())
    assert bypassed(report)


@pytest.mark.parametrize("kind", ["prefix", "holes", "expanded"])
def test_a_key_mask_becomes_a_valid_length(kind):
    """Whatever keys it names, and without a look at its values: attention runs on our op."""
    mask = torch.arange(300) < torch.tensor([[300], [130]])
    if kind == "holes":
        mask = mask & (torch.arange(300) % 3 > 0)
    mask = mask[:, None, None]
    mask = mask.expand(2, HEADS, 300, 300) if kind == "expanded" else mask
    for recipe in ("lossless", "topk:q_density=.5,kv_density=1,interval=3,warmup=0", FORA):
        report = check(made(), inputs(mask=mask), recipe)
        assert "layers: attention of 6 of 6 blocks on FlashOmni's op" in report.notes


@pytest.mark.parametrize(
    ("mask", "options", "why"),
    [
        (torch.zeros(2, 1, 1, 300), {}, "its mask is added to the scores"),
        (torch.ones(300, 300).tril().bool()[None, None], {}, "not the same for all queries"),
        (None, {"is_causal": True}, "it is causal"),
    ],
    ids=["additive", "pairs", "causal"],
)
def test_attention_that_is_not_ours_is_named(mask, options, why):
    """It runs as the model runs it, layers are cached whole, and the report says whose it was."""
    report = check(made(**options), inputs(mask=mask))
    (note,) = [note for note in report.notes if "own attention" in note]
    assert "the model's own attention in 6 blocks" in note and why in note
    assert bypassed(report)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"enable_gqa": True}], ids=["scale", "gqa"])
def test_scale_and_shared_key_heads(options):
    recipe = "topk:q_density=.5,kv_density=1,interval=3,warmup=0,block_m=32,block_n=32"
    report = check(made(**options), inputs(), recipe)
    assert "layers: attention of 6 of 6 blocks on FlashOmni's op" in report.notes
    assert report.flops_executed["attention"] < report.flops_dense["attention"]


def test_a_call_of_another_sort_is_learned_anew():
    """A model that keeps what its blocks return only when asked to: each sort of call is right."""
    model = made()
    plain, keeping = inputs(), inputs(keep=True)
    stock = [copy.deepcopy(model)(**given) for given in (plain, keeping)]
    with flashomni.accelerate(model, FORA) as engine:
        for step in range(9):
            engine.step(step, 10)
            which = step >= 4
            torch.testing.assert_close(
                model(**(keeping if which else plain)), stock[which], **CLOSE
            )
        kinds = [step["kind"] for step in engine.report().steps]
    assert kinds[0] == kinds[4] == "full"  # watched
    assert kinds.count("dispatch") >= 3


def test_a_call_that_fails_while_it_is_watched_is_watched_again():
    model, given = made(), inputs()
    stock = copy.deepcopy(model)(**given)
    with flashomni.accelerate(model, FORA) as engine:
        engine.step(0, 7)
        with pytest.raises(RuntimeError):
            model(**{**given, "t": torch.ones(1, 1, 5)})
        for step in range(6):
            engine.step(step, 7)
            torch.testing.assert_close(model(**given), stock, **CLOSE)
        assert bypassed(engine.report())


def test_a_short_run_is_learned_and_computed():
    """One step: it is watched, and nothing is kept of it."""
    model, given = made(), inputs()
    stock = copy.deepcopy(model)(**given)
    with flashomni.accelerate(model, "balanced") as engine:
        engine.step(0, 1)
        assert torch.equal(model(**given)[0], stock[0])
        assert "nothing to gain" in engine.report().notes[0]


def test_the_output_needs_no_streams():
    """Output-level caching works whatever the blocks return."""
    torch.manual_seed(0)
    report = check(Dicts(Returns, 2).eval(), inputs(), Recipe.of("fora", level="output"))
    assert report.flops_skipped > 0.3


def test_flops_are_counted():
    """Linears and attention of the blocks, as they run."""
    model, given = made(count=2), inputs()
    with flashomni.accelerate(model, "lossless") as engine:
        for step in range(3):
            engine.step(step, 3)
            model(**given)
        report = engine.report()
    calls, tokens = 2 * 3, 2 * 300
    assert report.flops_dense["mlp"] == calls * 2 * tokens * WIDTH * 5 * WIDTH
    assert report.flops_dense["attention"] == calls * 4 * tokens * 300 * WIDTH


def test_a_copy_of_the_model_is_the_stock_model():
    model, given = made(), inputs()
    stock = model(**given)
    with flashomni.accelerate(model, FORA) as engine:
        engine.step(0, 7)
        model(**given)
        other = copy.deepcopy(model)
        assert torch.equal(other(**given)[0], stock[0])
