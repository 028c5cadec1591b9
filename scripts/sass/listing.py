"""Reads nvdisasm's listing of an sm_52 cubin: kernels, their loops, and what a pass of a loop costs.

A slot is one lane's share of an instruction issued. Most instructions take one; the pipe of shifts, bit fields and
compares has half the rate, that of conversions and special functions a quarter, so that a pass takes at least the time of
twice its shifts, or of four times its conversions. Dual issue (the braces in a listing) is not credited: it rarely succeeds.

Three source operands of an FFMA come from four register banks (register number modulo 4); two of one bank cost a cycle
more, unless the one comes from the operand cache that `.reuse` on the operand before has filled.
"""

import collections
import re
from dataclasses import dataclass, field

HALF_RATE = frozenset(
    "SHL SHR SHF BFE BFI ISCADD LEA VADD VMAD FLO FMNMX IMNMX ISET ISETP ICMP FSET FSETP FCMP PSET PSETP CSET CSETP".split()
)
QUARTER_RATE = frozenset("I2F F2F F2I I2I MUFU POPC RRO".split())
# Local memory: spilled registers, or arrays indexed at run time.
LOCAL = frozenset("LDL STL".split())
# Take no slot of their own: they mark the control flow, or pad.
FREE = frozenset("NOP SSY PBK PCNT DEPBAR".split())
ARITHMETIC = frozenset("FFMA FADD FMUL XMAD".split())
WORK = frozenset("FFMA FADD FMUL F2F I2F MUFU LDG LDS STG STS SHFL BAR".split())

SECTION = re.compile(r'\s*\.section\s+\.text\.([^\s,"]+)')
OTHER_SECTION = re.compile(r"\s*\.section\s")
REGISTERS = re.compile(r"SHI_REGISTERS=(\d+)")
LABEL = re.compile(r"(\.L_\w+):")
INSTRUCTION = re.compile(r"\s*(?:\{\s*)?/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?([@A-Z].*?)\s*(?:;|\}|$)")
TARGET = re.compile(r"`\((\.L_\w+)\)")
SOURCE = re.compile(r"-?R(\d+)(\.reuse)?$")


@dataclass
class Instruction:
    """One instruction: its name without modifiers, its operands, and where it jumps to if it does."""

    name: str
    operands: list
    target: str = None


@dataclass
class Kernel:
    """The code of one kernel: instructions and labels in order."""

    name: str
    registers: int = 0
    code: list = field(default_factory=list)

    def instructions(self):
        return [item for item in self.code if isinstance(item, Instruction)]

    def local_accesses(self):
        return sum(i.name in LOCAL for i in self.instructions())

    def innermost_loops(self):
        """The bodies of loops that hold no other loop, in the order of the code."""
        places = {item: at for at, item in enumerate(self.code) if isinstance(item, str)}
        spans = []
        for at, item in enumerate(self.code):
            start = places.get(item.target) if isinstance(item, Instruction) and item.name == "BRA" else None
            # A jump to itself ends every listing and is no loop.
            if start is not None and start < at - 1:
                spans.append((start, at))
        inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        return [[i for i in self.code[a : b + 1] if isinstance(i, Instruction)] for a, b in inner]

    def main_loop(self):
        """
        The innermost loop with the most arithmetic; without loops the whole code. Of a loop that is there twice, for whole
        slices and for what is left of a row, the one for whole slices: constant sizes make it the shorter.
        """
        loops = self.innermost_loops()
        if not loops:
            return self.instructions()
        most = max(loops, key=lambda body: sum(i.name in ARITHMETIC for i in body))
        return min((body for body in loops if work(body) == work(most)), key=len)


def work(body):
    """What a pass does, without how it finds its data: the same for two copies of a loop."""
    return collections.Counter(i.name for i in body if i.name in WORK)


@dataclass
class Cost:
    """What one pass of a loop takes."""

    slots: int
    half_rate: int
    quarter_rate: int
    ffma: int
    conflicts: int
    counts: dict

    @classmethod
    def of(cls, body):
        counts = collections.Counter(i.name for i in body if i.name not in FREE)
        return cls(
            slots=sum(counts.values()),
            half_rate=sum(n for name, n in counts.items() if name in HALF_RATE),
            quarter_rate=sum(n for name, n in counts.items() if name in QUARTER_RATE),
            ffma=counts["FFMA"],
            conflicts=bank_conflicts(body),
            counts=dict(counts.most_common()),
        )

    def busiest(self):
        """Slots by what takes longest: issuing, with the cycles lost to conflicts, or one of the slower pipes."""
        return max(self.slots + self.conflicts, 2 * self.half_rate, 4 * self.quarter_rate)

    def ffma_share(self):
        """FFMA in all cycles, those lost to conflicts included."""
        return self.ffma / max(1, self.slots + self.conflicts)

    def conflict_share(self):
        """Cycles lost to conflicts for each FFMA."""
        return self.conflicts / max(1, self.ffma)


def parse_instruction(text):
    words = text.split(None, 1)
    if words[0].startswith("@"):
        words = words[1].split(None, 1)
    name = words[0].split(".")[0]
    rest = words[1] if len(words) > 1 else ""
    target = TARGET.search(rest)
    return Instruction(name, [o.strip() for o in rest.split(",")], target and target[1])


def parse(lines):
    """Kernels by name."""
    kernels = {}
    kernel = None
    for line in lines:
        if match := SECTION.match(line):
            kernel = kernels.setdefault(match[1], Kernel(match[1]))
        elif OTHER_SECTION.match(line):
            kernel = None
        elif kernel is None:
            continue
        elif match := REGISTERS.search(line):
            kernel.registers = int(match[1])
        elif match := LABEL.match(line):
            kernel.code.append(match[1])
        elif match := INSTRUCTION.match(line):
            kernel.code.append(parse_instruction(match[1]))
    return kernels


def bank_conflicts(body):
    """Cycles that FFMAs lose because two of their sources come from one bank."""
    lost = 0
    cached = {}
    for instruction in body:
        if instruction.name != "FFMA":
            continue
        sources = [SOURCE.match(o) for o in instruction.operands[1:4]]
        # A register read twice is read once; what the operand cache holds is not read at all.
        read = {s[1] for slot, s in enumerate(sources) if s and cached.get(slot) != s[1]}
        banks = collections.Counter(int(register) % 4 for register in read)
        lost += sum(n - 1 for n in banks.values())
        cached = {slot: s[1] for slot, s in enumerate(sources) if s and s[2]}
    return lost
