"""An interpreter of the PTX that Triton makes of the row kernels: program instances of several warps, 32 lanes as one array.

Registers hold raw bits. A warp runs to its next `bar.sync`, and the caller decides in which order warps run. Lanes of a warp
that part at a branch meet again by running those that are furthest behind. An unknown instruction is an error.
Nothing here is about time.
"""

import re
from typing import Any

import numpy as np

from tests.support.ptx_values import TYPES, members, operands_of, read_as, value_of
from tests.support.ptx_warp import LANE, LANES, Array, Instruction, Warp, Work


class Program:
    """A kernel: its instructions, and the types of its parameters."""

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//[^\n]*", "", ptx)
        header, _, body = text[text.index(".entry") :].partition("{")
        entry = re.match(r"\.entry\s+(\w+)", header)
        threads = re.search(r"\.reqntid\s+(\d+)", header)
        assert entry is not None and threads is not None
        self.threads = int(threads[1])
        self.parameters = re.findall(r"\.param\s+\.(\w+)\s", header)
        self._prefix = f"{entry[1]}_param_"
        self._files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text))
        self._labels: dict[str, int] = {}
        lines: list[tuple[str, str]] = []
        source = ""
        depth = 1
        for statement in re.findall(r"[^;\n{}]+:(?=\s)|\.loc[^\n]*|\.reg[^;]*;|[{}](?=\s*\n)|[^;\n]+;", body):
            line = statement.strip()
            depth += (line == "{") - (line == "}")
            if depth == 0:
                break
            location = re.match(r"\.loc\s+(\d+)\s+(\d+)", line)
            if location is not None:
                source = f"{self._files.get(location[1], location[1])}:{location[2]}"
            elif line.endswith(":"):
                self._labels[line[:-1]] = len(lines)
            elif not line.startswith((".", "{", "}")):
                lines.append((" ".join(line.removesuffix(";").split()), source))
        self.instructions = [self._instruction(*line) for line in lines]

    def warps(self, parameters: list[Array], block: tuple[int, int, int], memory: Any) -> list[Warp]:
        """The warps of one program instance, before its first instruction."""
        made = []
        for number in range(self.threads // LANES):
            special = {
                "%tid.x": number * LANES + LANE,
                "%laneid": LANE,
                "%ntid.x": np.full(LANES, self.threads),
            }
            special |= {f"%ctaid.{axis}": np.full(LANES, block[place]) for place, axis in enumerate("xyz")}
            registers = {name: value.astype(np.uint32) for name, value in special.items()}
            registers |= {
                f"{self._prefix}{place}": np.repeat(value, LANES) for place, value in enumerate(parameters)
            }
            made.append(Warp(number, registers, memory))
        return made

    def _instruction(self, text: str, source: str) -> Instruction:
        parts = re.fullmatch(r"(?:@(!?)(%\w+) )?([\w.:]+)(?: (.*))?", text)
        if parts is None:
            raise NotImplementedError(f"PTX: {text}")
        inverted, guard, opcode, rest = parts.groups()
        words = opcode.split(".")
        arguments = operands_of(rest or "")
        try:
            work = self._work(words, arguments, guard, bool(inverted))
        except (KeyError, IndexError) as error:
            raise NotImplementedError(f"PTX: {text}") from error
        return Instruction(text, source, work, words[0] == "bar")

    def _work(self, words: list[str], arguments: list[str], guard: str | None, inverted: bool) -> Work:
        if words[0] in ("bra", "ret", "bar"):
            return self._jump(words[0], arguments, guard, inverted)
        if words[0] in ("ldmatrix", "stmatrix"):
            return _matrices(words, arguments)
        if words[0] in ("ld", "st") and words[1] in ("global", "shared"):
            return _access(words, arguments, guard, inverted)
        result, *operands = arguments
        compute = value_of(words, result, operands)
        names = members(result)

        def work(warp: Warp) -> None:
            value, chosen = compute(warp), warp.lanes(guard, inverted)
            if len(names) > 1:  # a register taken apart
                value = value.reshape(LANES, 1).view(f"u{value.itemsize // len(names)}")
            for name, part in zip(names, value.reshape(LANES, -1).T, strict=True):
                warp.write(name, part.copy(), chosen)

        return work

    def _jump(self, word: str, arguments: list[str], guard: str | None, inverted: bool) -> Work:
        target = self._labels[arguments[0]] if word == "bra" else -1

        def jump(warp: Warp) -> Array | int | None:
            taken = warp.lanes(guard, inverted)
            if guard is None or taken is None:
                taken = np.ones(LANES, bool)
            if word == "ret":
                warp.together()
            return target if taken.all() else np.where(taken, target, warp.place)

        return jump


def _access(words: list[str], arguments: list[str], guard: str | None, inverted: bool) -> Work:
    """A load or store of global or shared memory, of one register or a vector of them."""
    is_store = words[0] == "st"
    place, values = (arguments[0], arguments[1]) if is_store else (arguments[1], arguments[0])
    names, kind, space = members(values), TYPES[words[-1]], words[1]
    parts = re.fullmatch(r"\[ ?(%\w+|global_smem)(?: ?\+ ?(-?\d+))? ?\]", place)
    if parts is None:
        raise KeyError(place)
    base, offset = read_as(parts[1], "b64" if space == "global" else "b32"), int(parts[2] or 0)
    reads = [read_as(name, words[-1]) for name in names] if is_store else []

    def access(warp: Warp) -> None:
        addresses = base(warp).astype(np.int64) + offset
        active = warp.lanes(guard, inverted)
        threads = warp.number * LANES + LANE
        if is_store:
            data = np.stack([read(warp).view(kind) for read in reads], 1)
            warp.memory.store(space, addresses, data, threads, active)
            return
        data = warp.memory.load(space, addresses, len(names) * np.dtype(kind).itemsize, threads, active)
        for name, column in zip(names, data.view(kind).T, strict=True):
            warp.write(name, column.copy(), active)

    return access


def _matrices(words: list[str], arguments: list[str]) -> Work:
    """`ldmatrix`, `stmatrix`: 8 x 8 halves each, whose rows are where the lanes' addresses are, a lane holding two neighbours."""
    is_store, transposed = words[0] == "stmatrix", "trans" in words
    place, values = (arguments[0], arguments[1]) if is_store else (arguments[1], arguments[0])
    names, base = members(values), read_as(place.strip("[] "), "b32")
    if is_store and transposed:
        raise KeyError("trans")

    def move(warp: Warp) -> None:
        warp.together()
        addresses, threads = base(warp).astype(np.int64), warp.number * LANES + LANE
        for number, name in enumerate(names):
            rows = addresses[8 * number : 8 * number + 8]
            if is_store:
                data = warp.registers[name].view("u4").reshape(LANES, 1)
                warp.memory.store("shared", rows[LANE // 4] + LANE % 4 * 4, data, threads, None)
            elif transposed:
                halves = [
                    warp.memory.load("shared", rows[LANE % 4 * 2 + side] + LANE // 4 * 2, 2, threads, None)
                    for side in (0, 1)
                ]
                warp.registers[name] = np.concatenate(halves, 1).view("u4")[:, 0]
            else:
                data = warp.memory.load("shared", rows[LANE // 4] + LANE % 4 * 4, 4, threads, None)
                warp.registers[name] = data.view("u4")[:, 0]

    return move
