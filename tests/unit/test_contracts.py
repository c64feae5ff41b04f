"""`make contracts` names the adapter that broke: what pytest writes is read as it was meant."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = '''
import pytest

@pytest.fixture(params=["FluxTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel"])
def tiny(request):
    if request.param.startswith("Wan"):
        raise AttributeError("module diffusers has no attribute WanTransformer3DModel")
    return request.param

@pytest.mark.parametrize("order", [0, 1])
def test_forecast(tiny, order):
    if tiny.startswith("SD3") and order:
        raise AssertionError("""Tensor-likes are not close!

Mismatched elements: 3 / 9
Greatest absolute difference: 0.25 at index (0,) (up to 1e-05 allowed)""")

def test_hooks(tiny):
    if tiny.startswith("SD3"):
        raise NotImplementedError("blocks.0: attention processor New | is not supported")

def test_gpu(tiny):
    pytest.skip("needs a CUDA device")
'''


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("contracts", ROOT / "tools/contracts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["contracts"] = module  # where its dataclass looks
    yield spec.loader.exec_module(module) or module
    del sys.modules["contracts"]


def results(folder, text):
    (folder / "test_case.py").write_text(text, encoding="utf-8")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=results.xml"]
    subprocess.run(
        [sys.executable, *command, "--rootdir", folder, "test_case.py"], cwd=folder,
        capture_output=True,
    )  # fmt: skip
    return folder / "results.xml"


@pytest.mark.slow
def test_what_broke_is_named_with_its_reason(tool, tmp_path):
    """In the fixture or in the test, for some parameters or for all; what is skipped counts not."""
    found = tool.by_adapter(
        results(tmp_path, CASES),
        ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"],
    )
    flux, sd3, wan = found
    assert (flux.passed, flux.failed) == (3, {})
    assert sd3.passed == 1 and len(sd3.failed) == 2
    assert sd3.reasons() == [
        "AssertionError: Tensor-likes are not close! Greatest absolute difference: 0.25 at index "
        "(0,) (up to 1e-05 allowed) (test_forecast[SD3Transformer2DModel-1], 1 in all)",
        "NotImplementedError: blocks.0: attention processor New \\| is not supported "
        "(test_hooks[SD3Transformer2DModel], 1 in all)",
    ]
    (reason,) = wan.reasons()
    assert reason.startswith("AttributeError: module diffusers has no attribute Wan")
    assert wan.passed == 0 and len(wan.failed) == 4
    text = tool.page("9.9", found)
    assert "diffusers 9.9" in text and "1 of 3 hold" in text
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| SD3Transformer2DModel",
        "| WanTransformer3DModel",
        "| FluxTransformer2DModel",
    ]


@pytest.mark.slow
def test_what_cannot_even_be_imported_is_no_pass(tool, tmp_path):
    """Nobody holds where no test ran; the reason is the import's."""
    told = results(tmp_path, "import nothing_of_that_name\n")
    flux, nobody = tool.by_adapter(told, ["FluxTransformer2DModel"])
    assert flux.passed == 0 and nobody.name == tool.NOBODY
    (reason,) = nobody.reasons()
    assert "No module named 'nothing_of_that_name'" in reason
    assert "0 of 1 hold" in tool.page("9.9", [flux, nobody])


def test_its_tests_are_there_and_go_by_adapter(tool, request):
    """Each file is one that takes all adapters."""
    for name in tool.TESTS:
        assert (ROOT / "tests" / "unit" / f"{name}.py").exists()
    plugins = request.config.pluginmanager.get_plugins()
    of_adapters = next(p.OF_ADAPTERS for p in plugins if hasattr(p, "OF_ADAPTERS"))
    assert set(tool.TESTS) == of_adapters
