"""A few calls of the Hopper kernels between profiler marks, for ncu.

    ncu --clock-control none --profile-from-start off --section SpeedOfLight \
        --section WarpStateStats python tools/profile_kernels.py
"""

import argparse

import torch

from flashomni.lab.ops.problem import Request
from flashomni.lab.ops.problems import PROBLEMS
from flashomni.lab.ops.shapes import SHAPES

CALLS = [
    ("attention", "flux-2048", 1.0),
    ("attention", "flux-2048", 0.1),
    ("attention", "flux-1024", 0.25),
    ("gemm_q", "hunyuan-33k", 0.1),
    ("gemm_q", "flux-1024", 0.25),
    ("gemm_q_fused", "hunyuan-33k", 1.0),
    ("gemm_o", "hunyuan-33k", 1.0),
    ("gemm_o", "hunyuan-33k", 0.1),
    ("gemm_o", "flux-1024", 0.25),
]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    runs = []
    for op, shape, density in CALLS:
        request = Request(SHAPES[shape], density, device, torch.bfloat16)
        runs.append(PROBLEMS[op](request).ours)
    for run in runs:
        run(0)
        run(0)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for run in runs:
        run(0)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    print(*(" ".join(map(str, call)) for call in CALLS), sep="\n")


if __name__ == "__main__":
    main()
