"""Random calls of an attention backend against torch in fp32: a third is hard for its softmax.

    python tests/fuzz/fuzz_attention.py --backend sm90 --count 30000 --processes 12 --seconds 240

Each case draws dtype, head_dim, batch, lengths, heads, GQA ratio, valid keys, densities, strides,
optional outputs and the forecast of cached rows; every third has values of `tests/adversarial.py`.
It fails if a row is off by more than twice the error of torch's own attention in the same dtype,
if a cached row of ``out`` or ``lse`` changed (or is not the forecast, where the case has one), or
if an empty row is not zero and -inf. Some cases run twelve times and must agree in every bit; on a
GPU some are captured in a graph and replayed on values that overflow, some are compiled. A case is
drawn from its number: `--start NUMBER --count 1` runs it again. Exits with 1 on failure.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import draw
from attention_faults import REPEATS, compile_faults, graph_faults, verdict

LOOKED_AT = 3000  # cases, for the kernels that they need
STOP = 20  # failures
RESULT = "RESULT "


def kernels(options: argparse.Namespace) -> list[int]:
    """Numbers of cases that need a kernel of their own."""
    seen: dict[tuple, int] = {}
    for number in range(options.start, options.start + min(options.count, LOOKED_AT)):
        seen.setdefault(draw(number, options.seed).build, number)
    return list(seen.values())


def run(options: argparse.Namespace, numbers: list[int], seconds: float, checked: bool) -> dict:
    """Cases one after the other; what came of them, as counts. Unchecked: kernels are built."""
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    start, counts, wrong, worst, redone = time.monotonic(), Counter(), 0, (0.0, -1), 0
    for number in numbers:
        if time.monotonic() - start > seconds or wrong >= STOP:
            break
        case = draw(number, options.seed)
        if options.verbose:
            print(number, case, flush=True)
        repeats = REPEATS if checked and number % 8 == 0 else 1
        try:
            found = verdict(case, options.backend, device, repeats)
            faults = list(found.wrong)
            if checked and number % 40 == 1 and device.type == "cuda":
                faults += graph_faults(case, options.backend, device)
                counts["captured"] += 1
            if checked and number % 500 == 3:
                faults += compile_faults(case, options.backend, device)
                counts["compiled"] += 1
        except NotImplementedError as error:
            counts["refused: " + str(error).splitlines()[-1].strip()] += 1
            continue
        except Exception:
            wrong += 1
            print(f"FAILED case {number}: {traceback.format_exc(limit=-3)}\n  {case}", flush=True)
            break  # on a GPU the context may be lost
        counts["cases"] += 1
        counts["repeated"] += repeats > 1
        counts["adversarial"] += number % 3 == 2
        counts["cases with tiles done again"] += found.redone > 0
        redone += found.redone
        worst = max(worst, (found.ratio, number))
        if faults and checked:
            wrong += 1
            print(f"FAILED case {number}: {'; '.join(faults)}\n  {case}", flush=True)
    return {"counts": counts, "failed": wrong, "worst": worst, "redone": redone}


def spread(options: argparse.Namespace) -> dict:
    """The same in several processes, after their kernels were built; sums."""
    began, total = (
        time.monotonic(),
        {"counts": Counter(), "failed": 0, "worst": (0, -1), "redone": 0},
    )
    for step in ("--warm", "--part"):
        left = options.seconds - (time.monotonic() - began)
        shared = [
            f"--{name}={value}"
            for name, value in vars(options).items()
            if name in ("backend", "device", "start", "count", "seed")
        ]
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, *shared, f"--seconds={left}", step,
                 f"{part}/{options.processes}"],
                stdout=subprocess.PIPE, text=True,
            )
            for part in range(options.processes)
        ]  # fmt: skip
        for worker in workers:
            said, _ = worker.communicate()
            lines = said.splitlines()
            for line in lines:
                if step == "--part" and line.startswith(RESULT):
                    result = json.loads(line.removeprefix(RESULT))
                    total["counts"].update(result["counts"])
                    total["failed"] += result["failed"]
                    total["redone"] += result["redone"]
                    total["worst"] = max(total["worst"], tuple(result["worst"]))
                elif step == "--part":
                    print(line, flush=True)
            if worker.returncode and not any(line.startswith(RESULT) for line in lines):
                total["failed"] += 1
                print(f"a process ended with {worker.returncode}", flush=True)
        if step == "--warm":
            print(f"kernels built in {time.monotonic() - began:.0f} s", flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="sm90")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=90.0, help="building kernels included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print every case before it runs")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the comparison it failed at times
    start, numbers = time.monotonic(), list(range(options.start, options.start + options.count))
    if options.warm:
        part, parts = map(int, options.warm.split("/"))
        run(options, kernels(options)[part::parts], options.seconds, checked=False)
        return 0
    if options.part:
        part, parts = map(int, options.part.split("/"))
        result = run(options, numbers[part::parts], options.seconds, checked=True)
        print(RESULT + json.dumps(result), flush=True)
        return 1 if result["failed"] else 0
    if options.processes > 1:
        result = spread(options)
    else:
        result = run(options, numbers, options.seconds, checked=True)
    counts = result["counts"]
    for reason, times in sorted(counts.items()):
        if reason.startswith("refused"):
            print(f"  {times} {reason}")
    print(
        f"attention {options.backend}: {counts['cases']} cases, {result['failed']} failed, "
        f"{counts['adversarial']} adversarial, {counts['repeated']} run {REPEATS} times, "
        f"{counts['captured']} captured, {counts['compiled']} compiled; largest error over torch's "
        f"{result['worst'][0]:.2f} (case {result['worst'][1]}); {result['redone']} tiles done "
        f"again in {counts['cases with tiles done again']} cases; {time.monotonic() - start:.0f} s"
    )
    return 1 if result["failed"] or not counts["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())
