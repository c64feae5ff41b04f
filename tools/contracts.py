"""Which adapters hold on another release of diffusers: their contract tests, told by adapter.

``make contracts`` takes the newest release, ``make contracts DIFFUSERS=0.41.0`` that one. It is
installed, with what it needs, into an environment of its own, which sees everything else of this
one and changes nothing in it. The tests are those that an adapter has to pass here
(``tests/unit/test_models.py`` and the like), a case an adapter; the report says of each adapter
whether it holds, and of one that broke why. Exit code 1 if one did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import site
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_models", "test_definition", "test_constant", "test_adapter_inputs")
NOBODY = "no adapter"


@dataclass
class Adapter:
    """What the tests said of one adapter.

    Args:
        name: of its transformer class.
        passed: how many tests.
        failed: test -> reason, in a line.
    """

    name: str
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> list[str]:
        """The different ones, the most frequent first, each with a test that gives it."""
        first: dict[str, str] = {}
        for test, reason in self.failed.items():
            first.setdefault(reason, test)
        counted = Counter(self.failed.values()).most_common()
        return [f"{reason} ({first[reason]}, {count} in all)" for reason, count in counted]


def environment(diffusers: str, folder: Path) -> Path:
    """Python of an environment with that diffusers, and with all else of the running one.

    Args:
        diffusers: ``installed``, ``newest``, a version, or anything else that pip installs.
        folder: where the environment is made, anew.

    Raises:
        ValueError: pip cannot install it.
    """
    if diffusers == "installed":
        return Path(sys.executable)
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    beneath = [f"site.addsitedir({path!r})" for path in site.getsitepackages()]
    (own / "beneath.pth").write_text(f"import site; {'; '.join(beneath)}\n", encoding="utf-8")
    if diffusers == "newest":
        wanted = ["--upgrade", "diffusers"]
    else:
        wanted = [f"diffusers=={diffusers}" if re.match(r"\d", diffusers) else diffusers]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *wanted]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"diffusers {diffusers!r} cannot be installed: {done.stderr.strip()}")
    return python


def version(python: Path) -> str:
    """Of the diffusers that it imports, or why it imports none."""
    code = "import diffusers; print(diffusers.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return f"that cannot be imported: {done.stderr.strip().splitlines()[-1]}"
    return done.stdout.strip()


def run(python: Path, results: Path, tests: list[str], workers: int) -> None:
    """The tests in that environment; what they say goes into a file, as JUnit writes it.

    Args:
        tests: files, and what else pytest takes.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    command = ["-m", "pytest", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={results}"]
    subprocess.run([python, *command, *spread, *tests], cwd=ROOT, env=env)


def outcomes(results: Path) -> Iterator[tuple[str, str, str]]:
    """Test, its parameters, and why it failed: empty if it passed. Skipped ones are left out."""
    for case in ElementTree.parse(results).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        test, _, parameters = case.get("name", "").partition("[")
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        yield test, parameters.rstrip("]"), "" if wrong is None else reason(wrong)


def reason(wrong: ElementTree.Element) -> str:
    """What was raised, in a line; of tensors that differ, by how much."""
    text = wrong.get("message") or wrong.text or "failed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = re.sub(r'^failed on \w+ with "(.*?)"?$', r"\1", lines[0])
    found = f"{first} {lines[-1].removesuffix(chr(34))}" if first.endswith(":") else first
    if text.startswith("collection failure"):
        last = [line.strip() for line in (wrong.text or "").splitlines() if line.startswith("E ")]
        return last[-1].removeprefix("E").strip() if last else found
    by = next((line for line in lines if line.startswith("Greatest absolute")), "")
    return f"{found} {by}".strip().replace("|", "\\|")


def by_adapter(results: Path, names: list[str]) -> list[Adapter]:
    """What each adapter passed and failed; tests of none of them last, if any failed."""
    found = {name: Adapter(name) for name in [*names, NOBODY]}
    for test, parameters, why in outcomes(results):
        of = next((part for part in parameters.split("-") if part in found), NOBODY)
        if why:
            found[of].failed[f"{test}[{parameters}]" if parameters else test] = why
        else:
            found[of].passed += 1
    rest = found.pop(NOBODY)
    return [*found.values(), *([rest] if rest.failed else [])]


def page(diffusers: str, found: list[Adapter]) -> str:
    """The report as Markdown, what broke first."""
    broken = [each for each in found if each.failed or not each.passed]
    known = [each for each in found if each.name != NOBODY]
    hold = [each for each in known if each not in broken]
    lines = [f"# Adapters on diffusers {diffusers}", ""]
    lines += [f"{len(hold)} of {len(known)} hold.", ""]
    lines += ["| adapter | passed | failed | why |", "|---|---|---|---|"]
    for each in sorted(found, key=lambda each: each not in broken):
        why = "; ".join(each.reasons()) or ("" if each.passed else "no test of it ran")
        lines.append(f"| {each.name} | {each.passed} | {len(each.failed)} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--diffusers", default="newest", help="newest, installed, or a version")
    parser.add_argument("--out", type=Path, default=Path("build/contracts"))
    parser.add_argument("--only", action="append", default=[], help="of these adapters")
    parser.add_argument("--workers", type=int, default=1, help="processes that test")
    told = parser.parse_args()
    out = told.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        python = environment(told.diffusers, out / "venv")
    except ValueError as error:
        (out / "report.md").write_text(f"# Adapters\n\n{error}\n", encoding="utf-8")
        sys.exit(str(error))
    from flashomni.models import adapters

    names = sorted(adapters())
    if told.only:
        unknown = sorted(set(told.only) - set(names))
        if unknown:
            sys.exit(f"--only must be of {', '.join(names)}, got {', '.join(unknown)}")
        names = told.only
    is_version, results = version(python), out / "results.xml"
    results.unlink(missing_ok=True)
    chosen = ["-k", " or ".join(names)] if told.only else []
    run(python, results, [f"tests/unit/{name}.py" for name in TESTS] + chosen, told.workers)
    if not results.exists():
        sys.exit("pytest ended before it could say anything")
    found = by_adapter(results, names)
    text = page(is_version, found)
    (out / "report.md").write_text(text, encoding="utf-8")
    data = {"diffusers": is_version, "adapters": [asdict(each) for each in found]}
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(text)
    sys.exit(any(each.failed or not each.passed for each in found))


if __name__ == "__main__":
    main()
