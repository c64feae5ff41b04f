"""What took part in a measurement: device, packages, commit, and a digest of our own code."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import flashomni

ROOT = Path(__file__).parent.parent
# What cannot change a picture or its time; a new file counts until it is named here.
TOOLS = (
    "__main__.py", "attention.py", "cli", "compat", "recipes", "lab/doctor.py", "lab/e2e",
    "lab/fidelity/compare.py", "lab/fidelity/comparison.py", "lab/fidelity/equal_time.py",
    "lab/fidelity/judged.py", "lab/fidelity/measures.py", "lab/fidelity/page.py",
    "lab/fidelity/table.py", "lab/ops", "lab/plot.py", "lab/report.py", "lab/results.py",
    "lab/split.json", "lab/split.py", "lab/templates", "lab/versions.py", "lab/viz.py",
)  # fmt: skip
PACKAGES = ("torch", "diffusers", "transformers", "triton")


def versions(device: torch.device) -> dict[str, str]:
    """Python, device, packages and commit, by name."""
    found = {
        "python": platform.python_version(),
        "device": device_name(device),
        "flashomni": flashomni.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "commit": commit()}


def device_name(device: torch.device) -> str:
    """Name of the GPU, or how many CPU threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


@functools.cache
def commit(package: Path = ROOT) -> str:
    """Short hash of the checkout, ``-dirty`` with uncommitted changes, or ``unknown``.

    Only a checkout of FlashOmni is one: a package installed into an environment that happens to
    lie in somebody's repository says ``unknown``. ``FLASHOMNI_COMMIT`` says it on a machine that
    has the files without their history.
    """
    told = os.environ.get("FLASHOMNI_COMMIT")
    if told:
        return told
    try:
        top = Path(_git(package, "rev-parse", "--show-toplevel"))
        project = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))
        ours = project.get("project", {}).get("name") == "flashomni"
        if not ours or (top / "src" / "flashomni").resolve() != package.resolve():
            return "unknown"
        return _git(package, "describe", "--always", "--dirty", "--exclude", "*")
    except (OSError, subprocess.CalledProcessError, ValueError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def generating_files() -> list[Path]:
    """The package without its tools, and without the recipes, which a result's key has itself."""
    tools = [ROOT / name for name in TOOLS]
    return [
        path
        for path in sorted([*ROOT.rglob("*.py"), *ROOT.rglob("*.json")])
        if not any(path.is_relative_to(tool) for tool in tools)
    ]


@functools.cache
def source_digest() -> str:
    """Hash of the code that generates pictures: results of other code are not reused."""
    digest = hashlib.sha256()
    for path in generating_files():
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
