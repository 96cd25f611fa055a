"""An interpreter of PTX in Python: the instructions of our kernels, one thread at a time, on this process's own memory.

It tests the compiler's output, and not only its input, where there is no GPU. Semantics are those of NVIDIA's "PTX ISA".
A float32 + × or √ computed in float64 and rounded once more is the correctly rounded one, since 53 ≥ 2·24 + 2. An
instruction that is not known here is an error.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

INTEGERS = {
    **{("u", bits): kind for bits, kind in ((8, ctypes.c_uint8), (32, ctypes.c_uint32), (64, ctypes.c_uint64))},
    **{("s", bits): kind for bits, kind in ((8, ctypes.c_int8), (32, ctypes.c_int32), (64, ctypes.c_int64))},
}
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b and a == a and b == b,  # ordered: NaN is not unequal, as in Python it would be
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
# with a u behind it a comparison holds for NaN as well
UNORDERED = {f"{name}u": compare for name, compare in COMPARE.items()}


@dataclass(frozen=True)
class Instruction:
    guard: tuple[str, bool] | None
    opcode: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    parameters: tuple[str, ...]
    code: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> dict[str, Kernel]:
    """The entry functions."""
    text = re.sub(r"//.*", "", text)
    kernels = {}
    for name, parameters, body in re.findall(r"\.visible \.entry (\w+)\((.*?)\)[^{]*\{\n(.*?)\n\}", text, re.S):
        code: list[Instruction] = []
        labels = {}
        for statement in re.findall(r"\s*(\$\w+:|[^;]+;)", body):
            statement = " ".join(statement.rstrip(";").split())
            if statement.startswith("$"):
                labels[statement.rstrip(":")] = len(code)
            elif not statement.startswith(".reg"):
                found = re.fullmatch(r"(?:@(!?)(%p\d+) )?([a-z0-9_.]+) ?(.*)", statement)
                assert found, statement
                negated, guard, opcode, rest = found.groups()
                operands = tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest))
                code.append(Instruction((guard, not negated) if guard else None, opcode, operands))
        kernels[name] = Kernel(tuple(re.findall(r"\.param \.\w+ (\w+)", parameters)), tuple(code), labels)
    return kernels


def to_float32(x: float) -> float:
    return ctypes.c_float(x).value


def to_bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def to_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


class Thread:
    def __init__(self, kernel: Kernel, arguments: dict[str, int], special: dict[str, int]) -> None:
        self.kernel, self.arguments = kernel, arguments
        self.registers: dict[str, Any] = dict(special)
        self.executed = 0

    # integers are held without sign; kind is "u32", "s64", "b32", "f32"
    def get(self, operand: str, kind: str) -> Any:
        if operand.startswith("%"):
            value = self.registers[operand]
        elif operand.startswith("0f"):
            value = to_float(int(operand[2:], 16))
        else:
            value = int(operand, 0)
        if kind == "pred":
            return bool(value)
        if kind[0] == "f":
            return value if isinstance(value, float) else to_float(value)
        if isinstance(value, float):
            value = to_bits(value)
        bits = int(kind[1:])
        value &= (1 << bits) - 1
        return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value

    def set(self, operand: str, kind: str, value: Any) -> None:
        if kind == "pred":
            self.registers[operand] = bool(value)
        elif kind[0] == "f":
            self.registers[operand] = to_float32(value)
        else:
            value &= (1 << int(kind[1:])) - 1
            # mov.b32 is how bits become a float and back
            self.registers[operand] = to_float(value) if operand.startswith("%f") else value

    def memory(self, operand: str, kind: str) -> Any:
        found = re.fullmatch(r"\[(%\w+)(?:\+(-?\d+))?\]", operand)
        assert found, operand
        sign, bits = kind[0], int(kind[1:])
        ctype = ctypes.c_float if sign == "f" else INTEGERS["s" if sign == "s" else "u", bits]
        return lambda index=0: ctype.from_address(
            self.get(found[1], "u64") + int(found[2] or 0) + index * ctypes.sizeof(ctype)
        )

    def run(self) -> Generator[None, None, None]:
        """Run to the end, yielding at each barrier."""
        at = 0
        while True:
            instruction = self.kernel.code[at]
            at += 1
            if instruction.guard and self.registers[instruction.guard[0]] is not instruction.guard[1]:
                continue
            self.executed += 1
            name, *rest = instruction.opcode.split(".")
            if name == "ret":
                return
            if name == "bra":
                at = self.kernel.labels[instruction.operands[0]]
            elif name == "bar":
                yield
            elif name != "membar":  # one thread at a time: memory is always in order
                self.execute(name, rest, instruction.operands)

    def execute(self, name: str, rest: list[str], operands: tuple[str, ...]) -> None:
        kind = rest[-1]
        to, *others = operands
        if name in ("ld", "st"):
            self.move(name, rest, operands)
            return
        if name == "cvta":
            self.set(to, kind, self.get(others[0], kind))
            return
        if name == "cvt":
            kind, source = rest[-2:]
            value = self.get(others[0], source)
            if kind[0] != "f" and source[0] == "f":
                assert "rzi" in rest
                bits = int(kind[1:])
                low, high = (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                value = 0 if math.isnan(value) else int(min(max(value, low), high))
            elif kind[0] == "f":
                assert "rn" in rest
                value = float(value)
            self.set(to, kind, value)
            return
        if name == "atom":
            cell = self.memory(others[0], kind)()
            before, operand = cell.value, self.get(others[1], kind)
            cell.value = {"add": before + operand, "or": before | operand}[rest[-2]]
            self.set(to, kind, before)
            return
        if name == "setp":
            a, b = (self.get(other, kind) for other in others)
            unordered = a != a or b != b
            how = rest[0]
            self.set(to, "pred", unordered or UNORDERED[how](a, b) if how in UNORDERED else COMPARE[how](a, b))
            return
        if name == "selp":
            self.set(to, kind, self.get(others[0] if self.get(others[2], "pred") else others[1], kind))
            return
        if name == "mul" and rest[0] == "wide":
            a, b = (self.get(other, kind) for other in others)
            self.set(to, f"{kind[0]}{2 * int(kind[1:])}", a * b)
            return
        if name in ("shl", "shr"):
            value, by = self.get(others[0], kind), self.get(others[1], "u32")
            self.set(to, kind, value << by if name == "shl" else value >> by)
            return
        if name == "not":
            self.set(to, kind, not self.get(others[0], kind) if kind == "pred" else ~self.get(others[0], kind))
            return
        values = [self.get(other, kind) for other in others]
        if kind[0] == "f" and name in ("add", "mul", "sqrt"):
            assert rest == ["rn", "f32"], rest
        self.set(to, kind, ARITHMETIC[name, rest[0] if name == "mul" and kind[0] != "f" else ""](*values))

    def move(self, name: str, rest: list[str], operands: tuple[str, ...]) -> None:
        kind = rest[-1]
        if "param" in rest:
            self.set(operands[0], kind, self.arguments[operands[1].strip("[]")])
            return
        registers, place = operands if name == "ld" else reversed(operands)
        address = self.memory(place, kind)
        listed = [part.strip() for part in registers.strip("{}").split(",")]
        cell = address()
        assert ctypes.addressof(cell) % (len(listed) * ctypes.sizeof(cell)) == 0, "on a GPU: misaligned address"
        for index, register in enumerate(listed):
            if name == "ld":
                self.set(register, kind, address(index).value)
            else:
                address(index).value = self.get(register, kind)


def _max(a: float, b: float) -> float:
    if a != a or b != b:
        return b if a != a else a  # the number, if there is one
    if a == b == 0:
        return a if math.copysign(1, a) > 0 else b
    return max(a, b)


ARITHMETIC: dict[tuple[str, str], Callable[..., Any]] = {
    ("add", ""): lambda a, b: a + b,
    ("sub", ""): lambda a, b: a - b,
    ("mul", ""): lambda a, b: a * b,
    ("mul", "lo"): lambda a, b: a * b,
    ("mul", "hi"): lambda a, b: a * b >> 32,
    ("div", ""): lambda a, b: a // b,
    ("and", ""): lambda a, b: a & b,
    ("or", ""): lambda a, b: a | b,
    ("xor", ""): lambda a, b: a ^ b,
    ("min", ""): min,
    ("max", ""): _max,
    ("neg", ""): lambda a: -a,
    ("mov", ""): lambda a: a,
    ("sqrt", ""): math.sqrt,
}


class Kernels:
    """The same interface as the library of ``cuda_on_host.build``, from PTX.

    Attributes:
        executed: how many instructions the last launch has executed, of all threads.
    """

    def __init__(self, text: str) -> None:
        self._kernels = parse(text)
        self.executed = 0

    def begin(self, chain: int, grid: int, block: int, order: int) -> bool:
        return self._launch("ddpmx_begin", chain, grid, block)

    def step(self, chain: int, grid: int, block: int, order: int) -> bool:
        return self._launch("ddpmx_step", chain, grid, block)

    def begin_each(self, call: int, grid: int, block: int, order: int) -> bool:
        return self._launch("ddpmx_begin_each", call, grid, block)

    def step_each(self, call: int, grid: int, block: int, order: int) -> bool:
        return self._launch("ddpmx_step_each", call, grid, block)

    def _launch(self, name: str, chain: int, grid: int, block: int) -> bool:
        kernel = self._kernels[name]
        (parameter,) = kernel.parameters
        self.executed = 0
        for b in range(grid):
            whole = [
                Thread(kernel, {parameter: chain}, {"%ctaid.x": b, "%tid.x": t, "%ntid.x": block, "%nctaid.x": grid})
                for t in range(block)
            ]
            threads = [thread.run() for thread in whole]
            while threads:  # from barrier to barrier
                still = [thread for thread in threads if next(thread, "ended") is None]
                if still and len(still) != len(threads):
                    return False
                threads = still
            self.executed += sum(thread.executed for thread in whole)
        return True
