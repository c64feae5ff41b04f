"""Rows in CSVs: nobody's are lost, a cell is never a formula; where results come from."""

import csv
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import flashomni
from flashomni.dispatch import OPS
from flashomni.lab import doctor, results, versions

WRITER = """
import sys
from dataclasses import make_dataclass
from flashomni.lab import results
Row = make_dataclass("Row", [("who", str), ("number", int)])
path, who, how = sys.argv[1:]
book = results.Book(path, Row)
mine = []
for number in range(15):
    mine.append(Row(who, number))
    book.write(mine) if how == "book" else results.append(path, mine[-1:])
"""


@dataclass(frozen=True)
class Row:
    name: str
    value: float | None


@pytest.mark.slow
def test_writers_into_one_file_lose_nothing(tmp_path):
    """Four programs at once, two of either kind: every row is there, once, in its order."""
    path, names = tmp_path / "rows.csv", {"a": "append", "b": "book", "c": "append", "d": "book"}
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, how])
        for name, how in names.items()
    ]
    assert [program.wait() for program in running] == [0] * len(names)
    rows = results.read(path)
    for name in names:
        assert [int(row["number"]) for row in rows if row["who"] == name] == list(range(15))
    assert len(rows) == 15 * len(names)


def test_a_book_keeps_what_comes_from_others(tmp_path):
    """Its own rows are replaced, also where they changed; rows before and meanwhile stay."""
    path = tmp_path / "rows.csv"
    results.append(path, [Row("before", 1.0)])
    book = results.Book(path, Row)
    book.write([Row("mine", 1.0)])
    results.append(path, [Row("other", 2.0), Row("mine", 1.0)])
    book.write([Row("mine", 1.5), Row("mine too", None)])
    assert [(row["name"], row["value"]) for row in results.read(path)] == [
        ("before", "1.0"), ("mine", "1.0"), ("other", "2.0"), ("mine", "1.5"), ("mine too", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1", "'=1", "''", "'", "-", "a=b", 'a,"b"\nc', ""]
)
def test_no_cell_is_a_formula(text, tmp_path):
    """What a spreadsheet would run is quoted in the file, and read back as it was."""
    path = tmp_path / "rows.csv"
    results.append(path, [Row(text, -1.5)])
    with path.open(newline="") as file:
        (cell,) = [row["name"] for row in csv.DictReader(file)]
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert results.read(path, Row) == [{"name": text, "value": "-1.5"}]  # a number is no formula
    results.append(path, [Row("second", 1.0)])
    assert results.read(path)[0]["name"] == text


def test_replaced_rows_agree_in_the_key(tmp_path):
    """Others stay where they are."""
    path = tmp_path / "rows.csv"
    results.append(path, [Row("a", 1.0), Row("b", 1.0)])
    results.replace(path, [Row("a", 2.0)], ["name"])
    assert [(r["name"], r["value"]) for r in results.read(path)] == [("b", "1.0"), ("a", "2.0")]


@pytest.mark.parametrize(
    "content", ["other,columns\n1,2\n", "name,value\n1\n", "name,value\n1,2,3\n"]
)
def test_a_file_of_others_is_left_alone(content, tmp_path):
    """Other columns, or a line that was cut, are refused."""
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match="columns"):
        results.append(path, [Row("a", 1.0)])
    assert path.read_text() == content


def test_rows_with_a_new_last_column_go_on_in_an_old_file(tmp_path):
    """What was written before it has an empty cell there; a column in between is another file."""

    @dataclass(frozen=True)
    class Longer:
        name: str
        value: float
        more: float | str = ""

    path = tmp_path / "rows.csv"
    results.append(path, [Row("a", 1.0)])
    results.append(path, [Longer("b", 2.0, 3.0)])
    found = [tuple(row.values()) for row in results.read(path, Longer)]
    assert found == [("a", "1.0", ""), ("b", "2.0", "3.0")]
    with pytest.raises(ValueError, match="other columns"):
        results.append(path, [Row("c", 1.0)])


def test_permissions_and_links_stay(tmp_path):
    """A new file follows the umask; a link stays a link, and both ends hold the rows."""
    path, link = tmp_path / "real" / "rows.csv", tmp_path / "rows.csv"
    link.symlink_to(path)
    old = os.umask(0o027)
    try:
        results.append(link, [Row("a", 1.0)])
    finally:
        os.umask(old)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    results.append(path, [Row("b", 1.0)])
    assert len(results.read(link)) == 2


# ---------------------------------------------------------------- where they come from


def repository(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_this_project_only(tmp_path, monkeypatch):
    """Not of a repository around the environment, nor of one that has a copy."""
    monkeypatch.delenv("FLASHOMNI_COMMIT", raising=False)
    ours = tmp_path / "checkout"
    head = repository(
        ours,
        {"pyproject.toml": '[project]\nname = "flashomni"\n', "src/flashomni/__init__.py": ""},
    )
    assert head.startswith(versions.commit(ours / "src" / "flashomni"))
    theirs = tmp_path / "theirs"
    inside = "env/lib/python3/site-packages/flashomni"
    repository(theirs, {"pyproject.toml": '[project]\nname = "app"\n', f"{inside}/__init__.py": ""})
    assert versions.commit(theirs / inside) == "unknown"
    copy = tmp_path / "copy"
    repository(
        copy,
        {"pyproject.toml": '[project]\nname = "app"\n', "src/flashomni/__init__.py": ""},
    )
    assert versions.commit(copy / "src" / "flashomni") == "unknown"
    assert versions.commit(tmp_path) == "unknown"
    monkeypatch.setenv("FLASHOMNI_COMMIT", "told")
    assert versions.commit(tmp_path / "elsewhere") == "told"


def test_everything_that_generates_is_hashed():
    """A file counts until it is named as a tool; every name of a tool exists."""
    root = Path(flashomni.__file__).parent
    hashed = {str(path.relative_to(root)) for path in versions.generating_files()}
    for part in ("engine", "kernels", "models", "policies", "symbols", "util"):
        files = {str(path.relative_to(root)) for path in (root / part).rglob("*.py")}
        assert files and files <= hashed
    assert {"__init__.py", "dispatch.py", "lab/zoo.py", "lab/generation.py"} <= hashed
    assert {"lab/fidelity/methods.py", "lab/fidelity/peers.py"} <= hashed
    assert not [name for name in hashed if name.startswith(("cli/", "lab/e2e/", "lab/ops/"))]
    assert [name for name in versions.TOOLS if not (root / name).exists()] == []


def test_doctor_without_the_lab():
    """Versions, device and the reason of each backend that does not run here."""
    facts = dict(doctor.facts())
    assert facts["flashomni"] == flashomni.__version__ and facts["torch"]
    rows = doctor.backends("attention")
    short = doctor.in_short()
    ran = [op for _, why, ops in short if why == "yes" for op in ops.split(", ")]
    assert sorted(ran) == sorted(OPS) and len(short) < len(doctor.backends()) / 2
    assert ("attention", "reference", "yes") in rows and {op for op, *_ in rows} == {"attention"}
    if not torch.cuda.is_available():
        assert next(why for _, name, why in doctor.backends() if name == "sm90") != "yes"
    with pytest.raises(ValueError, match="op must be one of"):
        doctor.backends("cooking")
