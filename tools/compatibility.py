"""docs/compatibility.md: what happens on every transformer class and pipeline of diffusers.

``python tools/compatibility.py --tests FOLDER`` checks every class on small random models, then
every pipeline, each in a process of its own. FOLDER holds diffusers' ``tests``, of the installed
version or one near it (``git clone --depth 1 https://github.com/huggingface/diffusers``; its sdist
does not have them); without it only this repository's small models run. What has a result in
``--out`` is not run again; ``--write`` puts those into docs/results/compatibility.json, where the
same cases are replaced, and makes the page of it. Parts that come from the Hub are small random
stand-ins: nothing is downloaded. Some tests want torchvision, OpenCV, ftfy, parameterized and
requests-mock; without them their pipelines are not built, and the page says so.

On a card: ``--part models --device cuda --dtype bfloat16 --jobs 14 --rows FILE`` keeps every row in
one file as it comes, and ``--card FILE`` puts those into docs/results/compatibility-card.json and
the page; it runs nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from matrix import jobs

if __name__ == "__main__" and any("cuda" in word for word in sys.argv[1:]):
    jobs.hide_cards()  # before anything is imported that could ask for one

import torch
from matrix import models, page, small

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def one_of_each_first(sources: Iterable[tuple[str, str, Any]]) -> list[tuple[str, str, Any]]:
    """One of each class before more of any, where time may end."""
    seen: Counter[str] = Counter()
    found = []
    for source in sources:
        found.append((seen[source[0]], source))
        seen[source[0]] += 1
    return [source for _, source in sorted(found, key=lambda each: each[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=Path, help="folder that holds diffusers' tests")
    parser.add_argument("--out", type=Path, default=Path("out/compatibility"))
    parser.add_argument(
        "--only", nargs="+", default=[], help="classes and pipelines by their names"
    )
    parser.add_argument("--part", nargs="+", default=["models", "pipelines"])
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--timeout", type=float, default=180, help="seconds of a case")
    parser.add_argument("--minutes", type=float, help="after which no further case is begun")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--write", action="store_true", help="the page, of what is known; runs nothing"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases that run side by side")
    parser.add_argument("--rows", type=Path, help="a file for all rows, as they come")
    parser.add_argument("--card", type=Path, help="such a file of a card, for the page")
    parser.add_argument("--readme", action="store_true", help="print README's rows of support")
    options = parser.parse_args()
    if options.readme:
        print("\n".join(page.support()))
        return
    if options.card is not None:
        page.keep_card(options.card)
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.device != "cpu":
        jobs.hide_cards()
    cases = {}
    if "models" in options.part:
        found = small.sources(options.tests)
        for cls, source, make in one_of_each_first(found):
            check = partial(models.check, make, options.device, DTYPES[options.dtype])
            cases[f"models/{cls}/{source}"] = jobs.Case(check)
    if "pipelines" in options.part and options.tests is not None:
        from matrix import pipelines

        for name, test in pipelines.cases(options.tests):
            check = partial(pipelines.check, test, options.device, DTYPES[options.dtype])
            cases[f"pipelines/{name}"] = jobs.Case(check, partial(pipelines.warm, test))
    if options.write:
        rows = {row["case"]: row for row in [*page.kept(), *jobs.read_all(options.out)]}
        missing = {"status": "not run", "why": "not reached: nothing is known of it"}
        rows = {**{name: {"case": name, **missing} for name in cases}, **rows}
        page.write([rows[name] for name in sorted(rows)], small.classes())
        return
    if options.only:
        cases = {
            name: case
            for name, case in cases.items()
            if any(word.lower() in name.lower() for word in options.only)
        }
    until = None if options.minutes is None else time.time() + 60 * options.minutes
    for done, row in jobs.run_all(
        cases, options.out, options.timeout, options.again, until, options.jobs
    ):
        if options.rows is not None:
            page.write_rows(options.rows, jobs.read_all(options.out), options.device)
        said = row.get("why") or row.get("tier", "")
        print(f"{done}/{len(cases)} {row['case']}: {row['status']}: {said}", flush=True)


if __name__ == "__main__":
    main()
