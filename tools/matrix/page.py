"""docs/compatibility.md of the results, and README's rows of what is supported."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashomni.dispatch import registered
from flashomni.engine.recipe import methods, presets
from flashomni.models import adapters, tiers
from flashomni.util.files import write_text

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "results" / "compatibility.json"
CARD = ROOT / "docs" / "results" / "compatibility-card.json"
PAGE = ROOT / "docs" / "compatibility.md"
CACHED = ("fora", "balanced", "topk, tiles")
TORCHS = ("reference", "sdpa")  # backends that are torch's own attention
DEVICES = {
    "cpu": "CPU",
    "portable": "GPUs from sm_80 on (`portable`, plain Triton; only an H200 was tried)",
    "sm90": "NVIDIA Hopper (`sm90`, Gluon)",
}
REFERENCE = "reference"  # the backend that is written out in torch
ORDER = ("adapter", "declared", "generic")
Row = dict[str, Any]

HEAD = """# What happens on every transformer class and pipeline of diffusers

Written by `python tools/compatibility.py --tests FOLDER --write` from
[results/compatibility.json](results/compatibility.json), whose rows the same command without
`--write` measures. Small random models in fp32 on a CPU ({versions}): this
shows that blocks, token streams, steps and removal are right in each class, and which attention
runs on our op, not how fast it is; kernels are tested by themselves. `flashomni show models` lists
the tiers; `flashomni doctor FOLDER` says what would happen to a pipeline before anything runs.
These rows are of diffusers' tests of 0.40.0.dev0, the newest that were at hand.

**tier**: *adapter* takes the blocks apart, so projections are skipped too; *declared* is learned
from the first call, and a table says where the text is; *generic* is learned alone.
"""
MODELS = """
## Transformer classes

{counts}

**attention**: blocks whose largest self-attention is on our op, of all that are accelerated; the
other blocks run the model's own, and are cached all the same. **errors**: the largest difference
from the stock model, as a share of its output: `lossless` with two prompts and two seeds over
varying timesteps / `fora` (whole layers) / `balanced` / cached tiles, the last three on inputs that
stay the same, where every cached value must be exact. **guard**: the same with cached values off by
1e-3, those of whole layers / of tiles, in multiples of what the check allows: over 1 it is seen, so
none gives a wrong picture in silence; "-" where nothing of the kind was taken. **removed**: the
stock model's bits again, and nothing left on its modules.{card}

"""
PIPELINES = """
## Pipelines

{counts}

Six steps. **lossless**: the largest difference from the stock pipeline over two prompts and two
seeds, as a share of its output. **steps**: those of the scheduler, all of them seen under every
recipe. **fora, balanced**: how far the small random model's output is from stock, on average; "-"
where nothing was dispatched; of random weights, so no measure of quality. **LoRA**: with a random
one on the transformer, `lossless` equals stock. **takes**: i an image or a video, c a control; ip:
offers IP-Adapters, which were not run here.

"""


def write(rows: Sequence[Row], classes: Mapping[str, type]) -> None:
    """Keep the rows, and write the page of them."""
    import diffusers
    import torch

    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    lines = ",\n".join(json.dumps(row) for row in kept)
    names = json.dumps({name: tier_of(cls) for name, cls in sorted(classes.items())})
    write_text(DATA, f'{{"versions": "{versions}",\n"classes": {names},\n"rows": [\n{lines}\n]}}\n')
    write_text(PAGE, page())


def write_rows(path: Path, rows: Sequence[Row], device: str) -> None:
    """Rows of a run in one file, with what they ran on: they say it, as only cases see a card."""
    import diffusers
    import torch

    names = sorted({row["on"] for row in rows if "on" in row})
    where = " and ".join(names) or device
    versions = f"{where}, diffusers {diffusers.__version__}, torch {torch.__version__}"
    write_text(path, json.dumps({"versions": versions, "rows": list(rows)}) + "\n")


def keep_card(path: Path) -> None:
    """Take the rows of a card, and write the page anew."""
    found = json.loads(path.read_text("utf-8"))
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in found["rows"]]
    lines = ",\n".join(json.dumps(row) for row in sorted(kept, key=lambda row: row["case"]))
    write_text(CARD, f'{{"versions": {json.dumps(found["versions"])},\n"rows": [\n{lines}\n]}}\n')
    write_text(PAGE, page())


def card() -> tuple[str, dict[str, list[Row]]]:
    """What the card's rows ran on, and the rows by class; none before there was a run."""
    if not CARD.exists():
        return "", {}
    found = json.loads(CARD.read_text("utf-8"))
    models, _ = parts(found["rows"])
    return found["versions"], by_name(models)


def on_card(rows: Sequence[Row]) -> str:
    """Blocks of a class whose largest self-attention is on a kernel of ours there, and which."""
    if not rows:
        return ""
    right = works(rows)
    bad = [row for row in rows if row["status"] == "wrong"]
    if bad or not right:
        return (
            f"**{plain(bad[0]['why'])}**"
            if bad
            else f"{rows[0]['status']}: {plain(rows[0]['why'])}"
        )
    largest = max(right, key=lambda row: (by_kernels(row), sum(row["blocks"].values())))
    kernels = [name for name in largest["kernels"] if name != REFERENCE]
    count = f"{by_kernels(largest)} of {sum(largest['blocks'].values())}"
    return f"{count}{', ' if kernels else ''}{', '.join(kernels)}"


def by_kernels(row: Row) -> int:
    """Blocks whose largest self-attention ran on kernels, not on the reference."""
    return 0 if REFERENCE in row["kernels"] else row["ours"]


def count_card(versions: str, named: Mapping[str, Sequence[Row]]) -> str:
    """A sentence on the run of the card, if there was one."""
    if not named:
        return ""
    right = [name for name, rows in named.items() if works(rows)]
    ours = sum(any(by_kernels(row) for row in works(named[name])) for name in right)
    off = sorted(name for name, rows in named.items() if any(r["status"] == "wrong" for r in rows))
    counts = Counter(works(named[name])[0]["tier"] for name in right)
    shares = ", ".join(f"{counts[tier]} {tier}" for tier in ORDER)
    return (
        f"\n\n**card**: the same in bf16 ({versions}), each within twice stock's own error in bf16 "
        f"and 1e-2, without guards, which that is too coarse for: {len(named)} classes ran, "
        f"{len(right)} work ({shares}), {ours} with their largest self-attention on our kernels; "
        "the cell says in how many blocks, and on which kernels. "
        + (f"Wrong: {', '.join(off)}." if off else "None is wrong.")
    )


def kept() -> list[Row]:
    """The rows that the page is made of."""
    return json.loads(DATA.read_text("utf-8"))["rows"]


def page() -> str:
    """The page, of what is kept."""
    data = json.loads(DATA.read_text("utf-8"))
    models, pipelines = parts(data["rows"])
    versions, cards = card()
    return "".join(
        [
            HEAD.format(versions=data["versions"]),
            MODELS.format(
                counts=count_models(models, data["classes"]), card=count_card(versions, cards)
            ),
            *model_table(models, data["classes"], cards),
            PIPELINES.format(counts=count_pipelines(pipelines)),
            *pipeline_table(pipelines),
            *not_run(pipelines),
        ]
    )


def parts(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of models, and of pipelines that have a transformer."""
    models, pipelines = [], []
    for row in rows:
        part, name, source = row["case"].split("/", 2)
        row = {**row, "name": name, "source": source}
        if part == "models":
            models.append(row)
        elif row["status"] != "no transformer":
            pipelines.append(row)
    return models, pipelines


def by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["source"] != "ours"):
        found.setdefault(row["name"], []).append(row)
    return found


def works(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "works"]


def is_defined(row: Row) -> bool:
    """Whether its cached layers were held against what is written out by hand."""
    return isinstance(row.get("definition"), dict)


def tier_of(cls: type) -> str:
    """What the code gives a transformer class, by its name and those of its base classes."""
    if any(base.__name__ in adapters() for base in cls.__mro__):
        return "adapter"
    return tiers().get(cls.__name__, ("generic", ""))[0]


def count_models(rows: Sequence[Row], classes: Mapping[str, str]) -> str:
    named = by_name(rows)
    right = {name for name, found in named.items() if works(found)}
    counts = Counter(works(named[name])[0]["tier"] for name in right)
    ours = sum(any(row["ours"] for row in works(named[name])) for name in right)
    off = {name for name, found in named.items() if any(r["status"] == "wrong" for r in found)}
    equal = [row for row in works(rows) if is_defined(row)]
    off_by = worst(row["definition"]["error"] for row in equal)
    shares = ", ".join(f"{counts[tier]} {tier}" for tier in ORDER)
    return (
        f"{len(classes)} classes: {len(right)} work ({shares}), in {len(works(rows))} "
        f"configurations, {ours} with their largest self-attention on our op; "
        f"{len(classes) - len(right)} were not run. "
        + (f"Wrong: {', '.join(sorted(off))}." if off else "None is wrong.")
        + f" On inputs that vary from step to step, whole layers that are cached equal their "
        f"definition, written out block by block without the engine, in "
        f"{len({row['name'] for row in equal})} classes (largest difference {off_by}); in the "
        "others nothing is cached, or the model rewrites what blocks hand on."
    )


def model_table(
    rows: Sequence[Row], classes: Mapping[str, str], cards: Mapping[str, Sequence[Row]]
) -> Iterable[str]:
    yield "| class | tier | blocks | attention |"
    yield " card |" if cards else ""
    yield f" errors | guard | removed | not ours, and why |\n{'|---' * (9 if cards else 8)}|\n"
    named = by_name(rows)
    for name, tier in classes.items():
        found = named.get(name, [])
        right = works(found)
        if not right:
            why = found[0]["why"] if found else "no small model of it here, nor in diffusers' tests"
            yield f"| {name} | {tier}, not run |{' |' * (6 if cards else 5)} {plain(why)} |\n"
            continue
        largest = max(right, key=lambda row: sum(row["blocks"].values()))
        errors = [worst(row["lossless"]["error"] for row in right)]
        errors += [worst(r[key]["error"] for r in right if "error" in r[key]) for key in CACHED]
        cells = (
            name,
            right[0]["tier"],
            ", ".join(f"{path} {n}" for path, n in largest["blocks"].items()) or "none cached",
            f"{largest['ours']} of {sum(largest['blocks'].values())}",
            *([on_card(cards.get(name, ()))] if cards else []),
            " / ".join(errors),
            guarded(right),
            "yes" if all(row["removed"] for row in right) else "**no**",
            reasons(right),
        )
        yield f"| {' | '.join(cells)} |\n"


def guarded(rows: Sequence[Row]) -> str:
    """How far off the least visible of the shifted values is: of whole layers, of tiles."""
    found = []
    for name in ("guard", "tile guard"):
        values = [row[name] for row in rows if not isinstance(row.get(name, ""), str)]
        found.append(f"{min(values):g}" if values else "-")
    return " / ".join(found)


def reasons(rows: Iterable[Row]) -> str:
    """Why attention is the model's own, and what is computed in every step; once each."""
    said: dict[str, None] = {}
    for row in rows:
        for note in row["own"]:
            said[f"attention: {note.rpartition(' blocks: ')[2]}"] = None
        for note in row["uncached"]:
            if note.startswith("without the adapter"):
                note = f"tier {row['tier']} {note}"
            said[note] = None
        if "rounds" in row:
            said[f"tiles: {row['rounds']}"] = None
        for key in CACHED:
            if "refused" in row[key]:
                said[f"{key}: {row[key]['refused']}"] = None
    return plain("; ".join(said))


def count_pipelines(rows: Sequence[Row]) -> str:
    counts = Counter(row["status"] for row in rows)
    names = {row["name"] for row in works(rows)}
    loras = sum(row["lora"] == "exact" for row in works(rows))
    left = counts["not built"] + counts["not run"]
    return (
        f"{len(rows)} tests of pipelines with a transformer, of {len({r['name'] for r in rows})} "
        f"classes: {counts['works']} equal stock ({len(names)} classes; {loras} with a LoRA too), "
        f"{counts['miscounted']} equal it but report fewer calls than were made, "
        f"{counts['wrong']} wrong, "
        f"{counts['refused']} refused, {left} not run."
    )


def pipeline_table(rows: Sequence[Row]) -> Iterable[str]:
    yield "| pipeline | transformer | tier | scheduler | attention | lossless | steps "
    yield f"| fora, balanced | LoRA | takes | remarks |\n{'|---' * 11}|\n"
    for row in sorted(rows, key=lambda row: row["name"]):
        if "lossless" not in row:
            continue
        takes = [key for key, has in (("i", "image"), ("c", "controlnet"), ("ip", "ip_adapter"))
                 if row[has]]  # fmt: skip
        remark = row["why"] or reasons([{"topk, tiles": {}, **row}])
        cells = (
            row["name"],
            ", ".join(dict.fromkeys(row["transformers"].values())),
            row["tier"],
            row["scheduler"].removesuffix("Scheduler"),
            f"{row['ours']} of {row['blocks']}",
            f"{'**' if row['status'] == 'wrong' else ''}{worst([row['lossless']])}"
            f"{'**' if row['status'] == 'wrong' else ''}",
            str(row["steps"]),
            ", ".join(change(row[key]) for key in CACHED[:2]),
            row["lora"].partition(":")[0],
            " ".join(takes),
            plain(remark),
        )
        yield f"| {' | '.join(cells)} |\n"


def change(found: Row) -> str:
    """How far a recipe is from stock, if it left anything out."""
    if "refused" in found:
        return "refused"
    return f"{found['change']:g}" if {"bypass", "dispatch"} & set(found["kinds"]) else "-"


def not_run(rows: Sequence[Row]) -> Iterable[str]:
    left = [row for row in rows if "lossless" not in row]
    if left:
        yield "\n## Pipelines that were not run\n\n| pipeline | what | why |\n|---|---|---|\n"
    for row in sorted(left, key=lambda row: row["name"]):
        yield f"| {row['name']} | {row['status']} | {plain(row['why'])} |\n"


def worst(errors: Iterable[float]) -> str:
    return f"{max(errors, default=0.0):.0e}".replace("0e+00", "0")


def plain(text: str) -> str:
    """Words for a cell of a table, without paths of the machine."""
    return " ".join(text.split()).replace("|", "\\|").replace(str(Path.home()), "~")


def support() -> list[str]:
    """README's rows of models, recipes and devices, from the registries and the matrix."""
    data = json.loads(DATA.read_text("utf-8"))
    models, pipelines = parts(data["rows"])
    right = {name for name, found in by_name(models).items() if works(found)}
    version = data["versions"].partition(",")[0]
    short = ", ".join(f"`{name.partition('Transformer')[0]}`" for name in sorted(adapters()))
    exact, *others = sorted(presets(), key=lambda name: (name != "lossless", name))
    own = [b.name for b in registered("attention") if b.package is None and b.name not in TORCHS]
    return [
        "| models | every transformer with lists of blocks, of diffusers or your own: "
        f"{len(right)} of the {len(data['classes'])} transformer classes of {version}, and "
        f"{len(works(pipelines))} of the pipelines of diffusers' tests, ran exactly on small "
        f"models ([each of them](docs/compatibility.md)). {len(adapters())} have an adapter, "
        f"which skips projections too: {short} ([tiers](docs/models.md)) |",
        f"| recipes | presets `{exact}` (exact), {', '.join(f'`{name}`' for name in others)}; "
        f"{len(methods())} [methods of papers](docs/methods.md) |",
        f"| devices | {'; '.join(DEVICES[name] for name in sorted(own))} |",
    ]
