"""A warp of the PTX interpreter: where its lanes are, and the bits of its registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LANES = 32
LANE = np.arange(LANES)

Array = np.ndarray
Work = Callable[["Warp"], Array | int | None]


@dataclass(frozen=True)
class Instruction:
    """One line of code. `work` returns the place of the next instruction, or of every lane's; None: the one after, -1: the end."""

    text: str
    source: str  # file and line of the kernel
    work: Work
    is_barrier: bool


@dataclass
class Warp:
    """Where a warp is, and the bits of its registers."""

    number: int
    registers: dict[str, Array]
    memory: Any  # of `ptx_memory`
    place: int = 0
    waits: bool = False
    done: bool = False
    places: Array | None = None  # of every lane, while they are apart
    active: Array | None = None  # lanes that run this instruction, while they are apart

    def lanes(self, guard: str | None, inverted: bool) -> Array | None:
        """Which lanes an instruction is for; None: all."""
        if guard is None:
            return self.active
        chosen = self.registers[guard] != inverted
        return chosen if self.active is None else chosen & self.active

    def write(self, name: str, value: Array, chosen: Array | None) -> None:
        """Set a register of some lanes."""
        if chosen is not None and name in self.registers:
            value = np.where(chosen, value, self.registers[name].view(value.dtype))
        self.registers[name] = value

    def together(self) -> None:
        """What runs now needs all lanes."""
        if self.places is not None:
            raise RuntimeError(f"lanes are apart: {self.memory.instruction.text}")

    def step(self, instructions: list[Instruction]) -> None:
        """Run one instruction, of the lanes that are furthest behind where they are apart."""
        if self.places is not None:
            self.place = int(self.places.min())
            self.active = self.places == self.place
            if bool((self.places == self.place).all()):
                self.places = self.active = None
        instruction = self.memory.instruction = instructions[self.place]
        self.place += 1
        self.waits = instruction.is_barrier
        if self.waits:
            return self.together()
        target = instruction.work(self)
        if target is None:
            target = self.place
        if isinstance(target, int) and self.places is None:
            self.place, self.done = target, target < 0
            return
        if self.places is None or self.active is None:
            self.places, self.active = np.full(LANES, self.place), np.ones(LANES, bool)
        self.places = np.where(self.active, target, self.places)


def run_warp(warp: Warp, instructions: list[Instruction], most: int) -> None:
    """Run to the next barrier or to the end, but for no more than so many instructions."""
    for _ in range(most):
        warp.step(instructions)
        if warp.waits or warp.done:
            return
