"""The examples of CONTRIBUTING.md, taken out of it as they are, and made into a package."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import flashomni

ROOT = Path(__file__).parents[2]
SOURCE = Path(flashomni.__file__).parents[1]
FENCE = re.compile(r"^```\w+ example=(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# In front of code for :func:`run`: a machine without Triton.
BAR_TRITON = """
import sys

class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Bar())
"""


def examples():
    """Each marked block of the guide, by its name."""
    found = FENCE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(dict(found)) == len(found), "two examples have one name"
    return dict(found)


def run(*command, path=(), cwd=None):
    """A command in a process of its own that imports this flashomni, and what is in ``path``."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, SOURCE)))}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=env, cwd=cwd
    )


def install(folder, pyproject, modules, package="flashomni_extras"):
    """Build a wheel of a package outside this repository and install it: where it went.

    Args:
        folder: empty; the project is written and the package installed into it.
        pyproject: text of ``pyproject.toml``.
        modules: source text by name.
    """
    project, wheels, site = (folder / name for name in ("project", "wheels", "site"))
    (project / package).mkdir(parents=True)
    (project / "pyproject.toml").write_text(pyproject, encoding="utf-8")
    (project / package / "__init__.py").write_text('"""What we add to FlashOmni."""\n')
    for name, text in modules.items():
        (project / package / f"{name}.py").write_text(text, encoding="utf-8")
    offline = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    for command in (
        ("wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, project),
        ("install", *offline, "--target", site, "--find-links", wheels, distribution(pyproject)),
    ):
        done = run("-m", "pip", *command, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return site


def lay_out(folder, pyproject, modules, package="flashomni_extras"):
    """What :func:`install` leaves, without building a wheel: modules, and the entry points."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").touch()
    for name, text in modules.items():
        (folder / package / f"{name}.py").write_text(text, encoding="utf-8")
    project = tomllib.loads(pyproject)["project"]
    info = folder / f"{package}-{project['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head)
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def distribution(pyproject):
    """The name in a ``pyproject.toml``."""
    found = re.search(r'^name = "(.*)"$', pyproject, re.MULTILINE)
    assert found is not None, "the project has no name"
    return found.group(1)
