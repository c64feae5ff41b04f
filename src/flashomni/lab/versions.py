"""What took part in a measurement: device, packages, commit, and a digest of our own code."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
GENERATES = (
    "bits.py", "symbols.py", "zoo.py", "generate.py", "policies/*.py", "kernels/*.py",
    "engine/**/*.py", "models/*.py", "evaluation/methods.py", "evaluation/peers.py",
)  # fmt: skip
PACKAGES = ("flashomni", "torch", "diffusers", "transformers", "triton")


def versions(device: torch.device) -> dict[str, str]:
    """Python, device, packages and commit, by name."""
    found = {"python": platform.python_version(), "device": device_name(device)}
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
def commit() -> str:
    """Short hash of the checkout, ``-dirty`` with uncommitted changes, or ``unknown``.

    ``FLASHOMNI_COMMIT`` says it on a machine that has the files without their history.
    """
    told = os.environ.get("FLASHOMNI_COMMIT")
    if told:
        return told
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


@functools.cache
def source_digest() -> str:
    """Hash of the code that generates pictures: results of other code are not reused."""
    digest = hashlib.sha256()
    for part in GENERATES:
        for path in sorted(ROOT.glob(part)):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
