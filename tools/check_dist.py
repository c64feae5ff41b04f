"""Check what is about to be published: metadata, contents, and that all of it is one version.

``make dist`` runs it on the folder that it fills, and a test on what it builds; a release names the
tag that was pushed. Metadata are checked by packaging, as PyPI does it.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from packaging.metadata import Metadata, parse_email
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

NAMES = ("flashomni", "flashomni-assets")
# What the packages consist of; anything else has strayed into a folder.
SUFFIXES = {
    "flashomni": (".py", ".json", ".html", ".css", ".js", ".typed"),
    "flashomni-assets": (".py", ".json", ".safetensors", ".md"),
}
BESIDE = {
    ".gitignore", "CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md",
    "pyproject.toml",
}  # fmt: skip


def name_and_version(path: Path) -> tuple[str, str]:
    """What its file name says."""
    if path.suffix == ".whl":
        name, version, *_ = parse_wheel_filename(path.name)
    else:
        name, version = parse_sdist_filename(path.name)
    return name, str(version)


def contents(path: Path, only: str | None = None) -> dict[str, bytes]:
    """Its files, and what those hold whose name ends with ``only``; all of them without it.

    Of an sdist the folder that all lie in is left out.
    """
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return {
                name: archive.read(name) if only is None or name.endswith(only) else b""
                for name in archive.namelist()
            }
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if not member.isdir():
                wanted = only is None or name.endswith(only)
                file = archive.extractfile(member) if wanted else None
                found[name] = b"" if file is None else file.read()
    return found


def faults(path: Path) -> Iterator[str]:
    """Why one file must not be published."""
    name, version = name_and_version(path)
    package = canonicalize_name(name).replace("-", "_")
    is_wheel = path.suffix == ".whl"
    info = f"{package}-{version}.dist-info"
    where = f"{info}/METADATA" if is_wheel else "PKG-INFO"
    files = contents(path, only=where)
    metadata = files.get(where)
    yield from metadata_faults(metadata, name, version)
    inside = PurePosixPath(package if is_wheel else f"src/{package}")
    for file in map(PurePosixPath, sorted(files)):
        if file.is_relative_to(inside):
            if file.suffix not in SUFFIXES[name]:
                yield f"{file} is no file of the package"
        elif not (file.is_relative_to(info) if is_wheel else str(file) in BESIDE):
            yield f"{file} does not belong there"


def metadata_faults(text: bytes | None, name: str, version: str) -> Iterator[str]:
    """What PyPI would refuse, or show badly."""
    if text is None:
        yield "there are no metadata"
        return
    raw, unknown = parse_email(text)
    yield from (f"metadata have the unknown field {field}" for field in unknown)
    try:
        metadata = Metadata.from_raw(raw)
    except ExceptionGroup as group:
        yield from map(str, group.exceptions)
        return
    if (canonicalize_name(metadata.name), str(metadata.version)) != (name, version):
        yield f"metadata are of {metadata.name} {metadata.version}, the file of {name} {version}"
    if not metadata.summary or not metadata.description:
        yield "there is no description"
    if not (metadata.description_content_type or "").startswith("text/markdown"):
        yield f"the description is {metadata.description_content_type}, not text/markdown"
    if metadata.license_expression is None or not metadata.license_files:
        yield "there is no licence, as an expression and as a file"


def folder_faults(folder: Path, tag: str | None = None) -> list[str]:
    """Why what lies in a folder must not be published together."""
    paths = sorted(folder.iterdir())
    found = [f"{path.name}: {fault}" for path in paths for fault in faults(path)]
    kinds = sorted((name_and_version(path)[0], path.suffix) for path in paths)
    wanted = sorted((name, suffix) for name in NAMES for suffix in (".gz", ".whl"))
    if kinds != wanted:
        found.append(f"there must be a wheel and an sdist of {' and '.join(NAMES)}, got {kinds}")
    versions = {name_and_version(path) for path in paths}
    if len(versions) != len(NAMES):
        found.append(f"a package has more than one version: {sorted(versions)}")
    if tag is not None and ("flashomni", tag.removeprefix("v")) not in versions:
        found.append(f"the tag is {tag}, what was built {sorted(versions)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("dist"))
    parser.add_argument("--tag", help="vX.Y.Z; has to be the version of flashomni")
    told = parser.parse_args()
    found = folder_faults(told.folder, told.tag)
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
