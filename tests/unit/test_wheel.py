"""What a user gets: both wheels are built, the core one is installed and run without the lab."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import torch

import flashomni

ROOT = Path(__file__).parents[2]
BARRED = ("matplotlib", "typer", "rich", "torchmetrics", "flashomni_assets")
SITE = Path(torch.__file__).parents[1]


def python(*command, **options):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(project, target, kind="wheel"):
    """Build with the backend that is installed here: no network, nothing left in the checkout."""
    code = (
        "import sys, hatchling.build as backend; "
        f"print(backend.build_{kind}(sys.argv[1]), file=sys.stderr)"
    )
    target.mkdir(exist_ok=True)
    before = set(target.iterdir())
    python("-c", code, target, cwd=project)
    (built,) = set(target.iterdir()) - before
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of an environment with the wheel, torch and diffusers, without the lab's packages."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    # By hand instead of a .pth, which would run those of the other environment and find its
    # checkout of flashomni.
    (site / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import sys

            class Bar:
                def __init__(self, finder):
                    self.finder = finder

                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in {BARRED!r}:
                        return None
                    return self.finder.find_spec(name, path, target)

                def __getattr__(self, name):
                    return getattr(self.finder, name)

            sys.meta_path[:] = [Bar(finder) for finder in sys.meta_path]
            sys.path.append({str(SITE)!r})
        """)
    )
    return home / "bin" / "python"


def run(python, *command):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FLASHOMNI_COMMIT")}
    return subprocess.run(
        [str(python), *command], capture_output=True, text=True, cwd=python.parent, env=env
    )


def test_core_wheel_is_small_and_holds_the_package_only(wheel):
    """Below 1 MB: the code, its data and the types; no weights, no tests."""
    assert wheel.stat().st_size < 2**20
    names = zipfile.ZipFile(wheel).namelist()
    folder = f"flashomni-{flashomni.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"flashomni", folder}
    package = Path(flashomni.__file__).parent
    data = [
        p
        for p in package.rglob("*")
        if p.suffix in (".py", ".json", ".html", ".css", ".js", ".typed")
    ]
    assert {f"flashomni/{p.relative_to(package)}" for p in data} <= set(names)
    assert "flashomni/py.typed" in names and "flashomni/recipes/balanced.json" in names
    assert "flashomni/kernels/configs/default.json" in names
    assert not [name for name in names if name.endswith((".safetensors", ".png", ".pyc"))]


def test_metadata_of_the_wheel(wheel):
    """The version is said once; serving asks for torch, diffusers and a reader of recipes."""
    archive = zipfile.ZipFile(wheel)
    folder = f"flashomni-{flashomni.__version__}.dist-info"
    metadata = HeaderParser().parsestr(archive.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == flashomni.__version__
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.partition(">")[0].partition("<")[0] for line in needed] == [
        "diffusers",
        "pyyaml",
        "torch",
    ]
    assert {"gpu", "lab", "demo", "dev"} <= set(metadata.get_all("Provides-Extra"))


def check_dist():
    """The tool that `make dist` and a release run."""
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / "tools/check_dist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_what_is_published_is_sound(tmp_path):
    """Wheels and sdists of both distributions; the assets' hold both pipelines, complete."""
    assets = ROOT / "packages" / "flashomni-assets"
    for kind in ("sdist", "wheel"):
        for project in (ROOT, assets):
            build(project, tmp_path, kind)
    tool = check_dist()
    assert tool.folder_faults(tmp_path, f"v{flashomni.__version__}") == []
    assert "the tag is v9.9" in " ".join(tool.folder_faults(tmp_path, "v9.9"))
    package = assets / "src" / "flashomni_assets"
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    files = {path.as_posix() for path in files if path.suffix != ".pyc"}
    for name, inside in (("*.whl", ""), ("*.tar.gz", "src/")):
        (built,) = tmp_path.glob(f"flashomni_assets-{name}")
        names = set(tool.contents(built, only="nothing"))
        assert {f"{inside}flashomni_assets/{file}" for file in files} <= names
        assert built.stat().st_size < 50e6


def test_what_has_strayed_is_named(wheel, tmp_path):
    """A file of another kind, a test, metadata that PyPI would refuse, a version that differs."""
    tool = check_dist()
    assert list(tool.faults(wheel)) == []
    bad = tmp_path / wheel.name.replace(flashomni.__version__, "9.9")
    info = f"flashomni-{flashomni.__version__}.dist-info"
    with zipfile.ZipFile(bad, "w") as archive:
        for name, content in tool.contents(wheel).items():
            content = content.replace(b"\nSummary: ", b"\nSummary: a\n  b ", 1)
            archive.writestr(name.replace(info, "flashomni-9.9.dist-info"), content)
        archive.writestr("flashomni/notes.orig", b"")
        archive.writestr("tests/test_x.py", b"")
    told = list(tool.faults(bad))
    assert "flashomni/notes.orig is no file of the package" in told
    assert "tests/test_x.py does not belong there" in told
    assert any("summary" in fault for fault in told)
    assert any("must be a wheel and an sdist" in fault for fault in tool.folder_faults(tmp_path))
    with zipfile.ZipFile(bad, "w") as archive:
        for name, content in tool.contents(wheel).items():
            archive.writestr(name.replace(info, "flashomni-9.9.dist-info"), content)
    (told,) = tool.faults(bad)
    assert "metadata are of flashomni 0." in told and "the file of flashomni 9.9" in told


def test_a_wheel_can_be_built_of_the_sdist(wheel, tmp_path):
    """It is small, holds what a wheel is built from and no more, and gives the same wheel."""
    built = build(ROOT, tmp_path / "sdist", "sdist")
    assert list(check_dist().faults(built)) == [] and built.stat().st_size < 2**20
    with tarfile.open(built) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert build(source, tmp_path / "wheel").read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_doctor_runs_from_the_wheel(installed):
    """Without typer and rich it still says what runs here, and what is missing."""
    (command,) = (installed.parents[1] / "lib").glob("python*/site-packages/bin/flashomni")
    for how in (("-m", "flashomni"), (str(command),)):
        done = run(installed, *how, "doctor")
        assert done.returncode == 0, done.stderr
        assert flashomni.__version__ in done.stdout and torch.__version__ in done.stdout
        assert "gemm_q" in done.stdout and "flashomni[lab]" in done.stdout
        assert "commit" in done.stdout and "unknown" in done.stdout


@pytest.mark.slow
def test_other_commands_say_what_to_install(installed):
    """One sentence, no traceback."""
    done = run(installed, "-m", "flashomni", "generate")
    assert done.returncode == 2
    assert "pip install 'flashomni[lab]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_bundled_pipeline_says_what_to_install(installed):
    """The weights are not in the wheel, and the error says where they are."""
    code = "from flashomni.lab import zoo; zoo.load('tiny-image')"
    done = run(installed, "-c", code)
    assert "ValueError" in done.stderr and "flashomni-assets" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_tiny_generation_runs_from_the_wheel(installed):
    """A FLUX with random weights generates, accelerated, through the Python interface alone."""
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
        import flashomni

        assert Path(flashomni.__file__).is_relative_to(sys.prefix), flashomni.__file__
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
        ).eval()
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
            tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=model,
        )
        pipe.set_progress_bar_config(disable=True)
        call = dict(
            prompt_embeds=torch.randn(1, 8, 32), pooled_prompt_embeds=torch.randn(1, 32),
            height=256, width=256, num_inference_steps=12, output_type="latent",
        )
        def picture():
            return pipe(**call, generator=torch.Generator().manual_seed(0)).images
        stock = picture()
        engine = flashomni.accelerate(pipe, "balanced")
        fast = picture()
        report = engine.report()
        engine.remove()
        assert torch.isfinite(fast).all() and fast.shape == stock.shape
        assert report.flops_skipped > 0, report
        assert torch.equal(picture(), stock)
        loaded = {"matplotlib", "typer", "rich", "torchmetrics"} & set(sys.modules)
        assert not loaded, loaded
    """)
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stderr
