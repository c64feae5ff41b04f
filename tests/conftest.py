"""Seeds, devices, and uninitialised memory that shows: every test starts from the same state."""

import functools
import gc
import importlib.util
import itertools
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings

import flashomni
from covering import covered
from flashomni.dispatch import OPS, find, registered
from flashomni.engine import Recipe
from flashomni.engine.layer import LayerRun
from flashomni.engine.linear import is_rms_norm
from flashomni.kernels.gemm_o.op import GemmOCall
from flashomni.kernels.gemm_q.op import GemmQCall
from flashomni.models import adapters, find_adapter
from flashomni.policies import make_policy
from flashomni.symbols import Grid, Symbols

pytest_plugins = ["process_settings"]
STEPS = 10
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ADAPTERS = sorted(adapters())
# Adapters that change little of another's: what they change is in the tests of adapters, which they
# take all of; tests of the engine have their model as a parameter without them.
RELATIVES = {
    name
    for name, adapter in adapters().items()
    if any(type(other) in type(adapter).__mro__[1:] for other in adapters().values())
}
OF_ADAPTERS = {"test_models", "test_constant", "test_adapter_inputs", "test_definition"}
# Every tile computed, every block visited, but through the sparse ops and with a history.
ONES = Recipe.of(
    make_policy("topk", q_density=1.0, kv_density=1.0), interval=3, warmup=0.0, order=1
)
# A sparse recipe whose symbols change between Updates, with first-order forecasts.
SPARSE = Recipe.of(
    make_policy("topk", q_density=0.5, kv_density=0.6), interval=4, warmup=0.2, order=1
)


@dataclass(frozen=True)
class Takes:
    """What the tests of the two GEMMs may ask of a backend.

    Args:
        dtypes: the first one where a test needs only one.
        head_dims: head dims to draw from.
        block_m: query blocks to draw from.
        multiple: what strides are multiples of, in elements.
    """

    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    block_m: tuple[int, ...]
    multiple: int


# What is asked, in this order; the first that is taken stands for the others.
DTYPES, HEAD_DIMS = (torch.float32, torch.float16, torch.bfloat16), (16, 72, 64, 128)
BLOCKS, MULTIPLES = (32, 128, 256), (1, 8)


def examples(count):
    """Settings of a property test: in Triton's interpreter, a hundred times slower, a quarter."""
    count = max(count // 4, 5) if INTERPRETED else count
    return settings(deadline=None, derandomize=True, max_examples=count)


def when_interpreted(mark):
    """A mark that a test has in Triton's interpreter alone: on a card all its cases run."""
    return mark if INTERPRETED else lambda test: test


@functools.cache
def gemm_takes(backend):
    """Asked of the backend itself: what it does not refuse, by metadata, of both GEMMs."""
    device = device_for(backend)

    def takes(dtype, head_dim, block_m, multiple):
        rows, features = 130, 25 if multiple == 1 else 3 * multiple
        kind = {"dtype": dtype, "device": device}
        symbols = Symbols.dense(Grid(rows, rows, block_m=block_m), 1, 1).to(device)
        x, heads = torch.zeros(1, rows, features, **kind), torch.zeros(1, rows, 1, head_dim, **kind)
        weight = torch.zeros(head_dim, features, **kind)
        options = (None, None, None, "interleaved")
        q = GemmQCall(x, weight, None, heads, symbols, 0, *options)
        o = GemmOCall(heads, weight.mT.contiguous(), None, None, None, None, x, symbols, 0)
        calls = {"gemm_q": q, "gemm_o": o}
        return not any(find(op, backend).refuses(call) for op, call in calls.items())

    asked = (DTYPES, HEAD_DIMS, BLOCKS, MULTIPLES)
    first = next(case for case in itertools.product(*asked) if takes(*case))
    varied = [
        tuple(one for one in some if takes(*first[:axis], one, *first[axis + 1 :]))
        for axis, some in enumerate(asked)
    ]
    return Takes(*varied[:3], varied[3][0])


def runs_on(backend):
    """Type of the device of a backend; ``None`` if it takes any, or is not known here."""
    found = (one for op in OPS for one in registered(op) if one.name == backend)
    return next((one.device for one in found), None)


def with_gpu_marks(backends):
    """Backends as test parameters, marked with what they need: a GPU, Triton."""
    params = []
    for name in backends:
        marks = [pytest.mark.gpu] if runs_on(name) == "cuda" else []
        if any(one.name == name and is_triton(one) for op in OPS for one in registered(op)):
            marks.append(pytest.mark.triton)
        params.append(pytest.param(name, marks=marks))
    return params


def is_triton(backend):
    """Whether it is plain Triton, which its interpreter runs as well."""
    if importlib.util.find_spec("triton") is None:
        return False
    from flashomni import triton_host

    return backend.available is triton_host.available


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Fixed seeds; memory from torch.empty is NaN, so that nothing may depend on it."""
    torch.manual_seed(0)
    fill, mode = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_deterministic_debug_mode(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


def device_for(backend):
    """Where a backend's tensors live in these tests."""
    return torch.device(runs_on(backend) or "cpu")


@contextmanager
def refusal_skips():
    """A refusal is an answer: the test is skipped with its reason."""
    try:
        yield
    except NotImplementedError as refusal:
        pytest.skip(str(refusal).splitlines()[-1].strip())


def random_symbols(grid, batch, num_heads, q_density=0.6, kv_density=0.4, **options):
    """Independent random bits, invariants enforced."""
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    q_mask = torch.rand(batch, num_heads, rows) < q_density
    kv_mask = torch.rand(batch, num_heads, rows, columns) < kv_density
    return Symbols.pack(q_mask, kv_mask, grid, **options)


def token_masks(symbols):
    """``(rows [B, H, M], pairs [B, H, M, N])`` of the symbols, kv_len included."""
    grid = symbols.grid
    rows = symbols.q_mask().repeat_interleave(grid.block_m, -1)[..., : grid.seqlen_q]
    pairs = symbols.kv_mask().repeat_interleave(grid.block_m, -2)
    pairs = pairs.repeat_interleave(grid.block_n, -1)[..., : grid.seqlen_q, : grid.seqlen_kv]
    if grid.kv_len is not None:
        position = torch.arange(grid.seqlen_kv, device=pairs.device)
        pairs = pairs & (position < grid.kv_len[:, None, None, None])
    return rows, pairs


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=ADAPTERS)
def tiny(request):
    """``(model, inputs)`` of one adapter, weights of unit scale so that attention is not flat."""
    return make_tiny(request.param)


@pytest.fixture
def flux():
    """``(model, inputs)`` of a small FLUX."""
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    return model.eval(), dict(inputs)


def make_tiny(name):
    """The same each time, bit by bit."""
    torch.manual_seed(0)
    model, inputs = adapters()[name].tiny()
    for key, parameter in model.named_parameters():
        if "norm_q" in key or "norm_k" in key:
            parameter.mul_(2.0)
    known = {own: usual for usual, own in own_names(model).items()}
    return model.eval(), {known.get(key, key): value for key, value in inputs.items()}


def own_names(model):
    """What a model calls its latents and its text, by their usual names, which tests use."""
    text = {"ZImageTransformer2DModel": "cap_feats"}.get(type(model).__name__)
    latents = find_adapter(model).latents
    return {"hidden_states": latents, "encoder_hidden_states": text or "encoder_hidden_states"}


def first_item(inputs):
    """The arguments of a batch of one."""
    shared = ("ids", "indices")  # of tokens, of frames
    return {
        key: value if any(word in key for word in shared) or isinstance(value, int) else value[:1]
        for key, value in inputs.items()
    }


def self_attention(block):
    """The attention that an adapter takes apart: some blocks have others behind it."""
    return next(
        getattr(block, name) for name in ("attn1", "attn", "attention") if name in block._modules
    )


def has_sparse_queries(model):
    """Whether a head of q is known without the others, by what the kernels know.

    Not where one norm spans them all, nor where it is another than RMSNorm.
    """
    attention = self_attention(find_adapter(model).sites(model)[0].block)
    return is_rms_norm(attention.norm_q, attention.inner_dim // attention.heads)


def own_arguments(model, inputs):
    """Arguments by usual names -> by the model's."""
    names = own_names(model) if type(model).__name__ in ADAPTERS else {}
    return {names.get(key, key): value for key, value in inputs.items()}


def call(model, inputs):
    """The model's first output; a list of items as one tensor."""
    output = model(**own_arguments(model, inputs), return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


def generation(engine, model, inputs, steps=STEPS, branch=None):
    """All outputs of a run in which the latents drift from step to step."""
    outputs, latents = [], inputs["hidden_states"]
    for step in range(steps):
        engine.step(step, steps, branch)
        outputs.append(call(model, {**inputs, "hidden_states": latents}))
        latents = latents - 0.05 * outputs[-1]
    return torch.stack(outputs)


def run(model, inputs, recipe, steps=STEPS, **options):
    with flashomni.accelerate(model, recipe, **options) as engine:
        return generation(engine, model, inputs, steps), engine.report()


def sparse_run(model):
    """``run(model, inputs, SPARSE)`` of `tiny`'s fresh model and its inputs, once for all tests."""
    return _sparse_run(type(model).__name__)


@functools.cache
def _sparse_run(name):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return run(*make_tiny(name), SPARSE)


def residue(model):
    """What an engine could leave behind on the modules of a model."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in module.__dict__
        or hasattr(module, "_diffusers_hook")
        or module._forward_hooks
        or module._forward_pre_hooks
    ]


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one case of each test that is not slow")


def quick(items):
    """Which of the collected tests `make quick` runs: one case of each function that is not slow.

    The first of one, the second of the next, and so on in circles: every model, backend and ragged
    size is tried by something.
    """
    cases = {}
    for item in items:
        if item.get_closest_marker("slow") is None and item.get_closest_marker("gpu") is None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = {some[turn % len(some)] for turn, some in enumerate(cases.values())}
    return [item for item in items if item in chosen]


def is_for_another(item):
    """Whether it is a test of the engine, on a model that differs little from another."""
    callspec = getattr(item, "callspec", None)
    model = None if callspec is None else callspec.params.get("tiny")
    return model in RELATIVES and item.path.stem not in OF_ADAPTERS


def is_refused(item):
    """Whether it is a kernel's case that Triton's interpreter cannot run."""
    parameters = item.callspec.params.values()
    interpreted = INTERPRETED and item.get_closest_marker("triton") is not None
    return interpreted and any(each is torch.bfloat16 for each in parameters)


def pytest_collection_modifyitems(config, items):
    items[:] = covered([item for item in items if not is_for_another(item)], is_refused)
    if config.getoption("--quick"):
        kept = quick(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


gc.disable()  # collecting tests imports much, and leaves nothing that could be freed


def pytest_collection_finish():
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    set_modules_apart(item.session)
    skip_without_gpu(item)


def set_modules_apart(session):
    """Objects of modules stay as long as the tests: whoever collects garbage need not walk them.

    A million of torch, diffusers and transformers take half a second, and a benchmark collects
    before each generation.
    """
    known, now = getattr(session, "modules_apart", 0), len(sys.modules)
    if now > known + 50:
        gc.collect()
        gc.freeze()
        session.modules_apart = now


@pytest.fixture
def cache_whole(monkeypatch):
    """Choose the layers that are cached whole; the others cache tiles."""

    def choose(layers):
        def decide(run, known):
            run._cache.degraded = run.index in layers
            if run._cache.degraded:
                run._cache.forget_heads()

        monkeypatch.setattr(LayerRun, "_decide_degradation", decide)

    return choose


def skip_without_gpu(item):
    """What the marker says: no test has to ask for the device itself.

    A kernel's test needs none where Triton interprets.
    """
    interpreted = INTERPRETED and item.get_closest_marker("triton")
    if item.get_closest_marker("gpu") and not interpreted and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
