"""Compile Gluon kernels for Hopper without a GPU and read what ptxas made of them."""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = 232448  # bytes a block may have on compute capability 9.0


def tensor_descriptor(dtype, block):
    """Type of a TMA descriptor argument; the layout is the one with 128-byte swizzle."""
    bits = 32 if dtype == "fp32" else 16
    return f"tensordesc<{dtype}{list(block)},{gl.NVMMASharedLayout(128, bits, len(block))}>"


@dataclass(frozen=True)
class Build:
    """What the compilers say about one specialisation."""

    ptx: str
    cubin: bytes
    shared: int
    ptxas_log: str

    @property
    def spilled_bytes(self):
        return sum(int(n) for n in re.findall(r"(\d+) bytes spill", self.ptxas_log))

    @property
    def warnings(self):
        """Lines such as the one that says that wgmma are serialised."""
        return [
            line
            for line in self.ptxas_log.splitlines()
            if re.search("warning|serializ|performance loss", line, re.IGNORECASE)
        ]

    def sass(self):
        """Instructions in order, one string each, without addresses and encodings."""
        return [line for _, line in self._listing]

    def loops(self):
        """Innermost loops: the instructions from each backward branch's target to the branch."""
        listing, found = self._listing, []
        for address, line in listing:
            target = re.match(r"(?:@!?U?P\w+ )?BRA.*?(0x[0-9a-f]+)", line)
            if target and int(target[1], 16) < address:
                found.append((int(target[1], 16), address))
        inner = [
            (start, end)
            for start, end in found
            if not any(start <= s and e < end and e - s > 256 for s, e in found)
        ]
        return [[line for at, line in listing if start <= at <= end] for start, end in inner]

    @functools.cached_property
    def _listing(self):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            text = subprocess.run(
                [TOOLS / "cuobjdump", "-sass", file.name],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
        return [
            (int(address, 16), line.strip())
            for address, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", text, re.M)
        ]


def build(kernel, types, constants, num_warps=4):
    """Compile ``kernel`` for sm_90a, with pointers aligned as torch's are.

    Args:
        kernel: a Gluon kernel.
        types: argument name -> Triton type, such as ``"*i32"``; ``"i32"`` where it says nothing.
        constants: argument name -> value of a constexpr, whatever ``types`` says of it.
    """
    at = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    signature = {name: types.get(name, "i32") for name in at}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        at[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*")
    }
    source = GluonASTSource(
        kernel, signature, {at[name]: value for name, value in constants.items()}, aligned
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}
    )
    ptx = compiled.asm["ptx"]
    return Build(ptx, compiled.asm["cubin"], compiled.metadata.shared, log_of(ptx))


def log_of(ptx):
    """What ptxas says of a kernel.

    Not what Triton prints: of a kernel in its cache it prints nothing, and its options are others.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-lineinfo", "-v", "--gpu-name=sm_90a", file.name]
        command += ["-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def writes_in_flight(sass):
    """Instructions that write a register which a running wgmma still reads or writes.

    The scan is linear: it follows the order in which the code lies, not its branches. A wgmma
    holds its accumulator and an operand A in registers until a wait leaves fewer groups running
    than were issued after it.
    """
    groups, current, found = [], set(), []
    for line in sass:
        text = re.sub(r"^@!?U?P\w+\s+", "", line)
        name, _, arguments = text.partition(" ")
        if name.startswith("HGMMA"):
            if found_a := re.match(r"HGMMA\.64x(\d+)x16\S*\s+R(\d+), R(\d+),", text):
                width, acc, a = (int(number) for number in found_a.groups())
                current |= set(range(a, a + 4))
            else:
                width, acc = (
                    int(number)
                    for number in re.match(r"HGMMA\.64x(\d+)x16\S*\s+R(\d+),", text).groups()
                )
            current |= set(range(acc, acc + width // 2))
            if "gsb0" in text:
                groups.append(current)
                current = set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            left = int(text.rpartition(",")[2], 16)
            groups = groups[len(groups) - left :] if left else []
        elif name.startswith("USETMAXREG"):
            groups, current = [], set()  # another partition begins
        elif written(name, arguments) & current.union(*groups):
            found.append(line)
    return found


def written(name, arguments):
    """General registers that an instruction writes."""
    if name.startswith(("ST", "BAR", "SYNCS", "BRA", "RED", "UTM", "BSSY", "BSYNC", "R2UR")):
        return set()
    first = next(
        (part for part in re.split(r",\s*", arguments) if not re.match(r"!?U?P(\d|T)", part)), ""
    )
    match = re.match(r"R(\d+)\b", first)
    if not match:
        return set()
    width = 1
    if ".M88.4" in name or ".128" in name:
        width = 4
    elif ".M88.2" in name or ".64" in name or ".WIDE" in name:
        width = 2
    return set(range(int(match[1]), int(match[1]) + width))
