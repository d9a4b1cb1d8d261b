"""Where the Python code of a forward can go another way than it went, read from its bytecode.

Nothing is run here. `_branches` watches a forward, and asks what the way that it did not take reads and writes.
"""

import dis
import linecache
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from inspect import CO_VARARGS, CO_VARKEYWORDS
from pathlib import Path
from types import CodeType

_ENDS = {"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"}
_DESCRIBES = {
    "shape", "dtype", "device", "ndim", "size", "dim", "numel", "stride", "layout", "requires_grad", "is_cuda",
    "is_contiguous", "element_size", "is_floating_point",
}  # fmt: skip
_TAKES_PARTS = {
    "LOAD_CONST", "LOAD_SMALL_INT", "BINARY_SUBSCR", "BINARY_SLICE", "BUILD_SLICE", "BUILD_TUPLE", "BUILD_LIST",
    "UNARY_NEGATIVE",
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """What one of two ways does by itself, in names of local variables.

    Args:
        reads: The variables whose values it reads.
        writes: The variables that it writes.
        meets: Where it comes to what the other way does, too; None if it does not.
        is_value: Whether it leaves a value behind there, as in ``a if condition else b``.
        returns: Whether the function can end on it, other than by an exception.
        comes_back: Whether it leads to the fork again, as a round of a loop does.
    """

    reads: frozenset[str]
    writes: frozenset[str]
    meets: int | None
    is_value: bool
    returns: bool
    comes_back: bool


@dataclass(frozen=True)
class Fork:
    """A condition, or the head of a loop.

    Args:
        at: Offset of the jump.
        asks: The local variables that the condition reads.
        sides: The two ways: if it does not jump, and if it does.
        later: The variables that are read behind them.
        head: Where a round of the loop around it begins; None where there is none.
        rounds: The variables that the loop around it writes.
        line: Number of its line.
    """

    at: int
    asks: frozenset[str]
    sides: tuple[Side, Side]
    later: frozenset[str]
    head: int | None
    rounds: frozenset[str]
    line: int

    @property
    def behind(self) -> list[int]:
        """Where the ways come together, or a round begins."""
        return [at for at in (*(side.meets for side in self.sides), self.head) if at is not None]

    @property
    def ends_rounds(self) -> bool:
        """Whether it decides how many rounds a loop has."""
        return self.sides[0].comes_back != self.sides[1].comes_back


class Ways:
    """The forks of a function.

    Args:
        code: Its code.
    """

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.steps: list[dis.Instruction] = []
        self.step_at: dict[int, int] = {}  # by offset; a prefix belongs to the instruction behind it
        prefixes: list[int] = []
        for instruction in dis.get_instructions(code):
            prefixes.append(instruction.offset)
            if instruction.opname not in ("EXTENDED_ARG", "CACHE"):
                self.step_at |= dict.fromkeys(prefixes, len(self.steps))
                self.steps.append(instruction)
                prefixes = []

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of its arguments."""
        return self.code.co_varnames[: self.code.co_argcount + self.code.co_kwonlyargcount]

    @cached_property
    def fork_at(self) -> dict[int, Fork]:
        """The forks, by their offset."""
        return {fork.at: fork for fork in self.forks}

    @cached_property
    def watched(self) -> dict[int, frozenset[str]]:
        """By offset, the variables whose values matter there."""
        names: dict[int, frozenset[str]] = {}
        for fork in self.forks:
            one, other = fork.sides
            writes = one.writes | other.writes | (fork.rounds if fork.ends_rounds else frozenset())
            names[fork.at] = names.get(fork.at, frozenset()) | one.reads | other.reads | writes
            for at in fork.behind:
                names[at] = names.get(at, frozenset()) | writes
        return names

    def offset(self, at: int) -> int:
        """Give the offset of an instruction, also for one of its prefixes."""
        return self.steps[self.step_at[at]].offset

    def is_jump(self, fork: Fork, to: int) -> bool:
        """Whether a fork that went on there has jumped."""
        return self.step_at[to] == self._jumps[self.step_at[fork.at]]

    @cached_property
    def forks(self) -> list[Fork]:
        """Every condition and loop of the function."""
        return [self._fork(n, target) for n, target in self._jumps.items() if self._is_conditional(n)]

    def constants(self, given: Iterable[str], *, fixed_closure: bool) -> frozenset[str]:
        """Name the variables that are the same on every input, if the caller gives these arguments.

        Args:
            given: Names of the arguments.
            fixed_closure: Whether the function was defined before the model ran, and with it what it closes over.
        """
        writers: dict[str, list[int]] = {}
        for n, step in enumerate(self.steps):
            for name in _names(step, "STORE"):
                writers.setdefault(name, []).append(n)
        code, count = self.code, len(self.arguments)
        rest = code.co_varnames[count : count + bool(code.co_flags & CO_VARARGS) + bool(code.co_flags & CO_VARKEYWORDS)]
        varying = (set(given) & set(self.arguments)) | set(rest) | set(() if fixed_closure else code.co_freevars)
        while True:
            more = {
                name
                for name, steps in writers.items()
                if name not in varying and any(self._asks(self._expression(n)) & varying for n in steps)
            }
            if not more:
                return frozenset((*code.co_varnames, *code.co_freevars)) - varying
            varying |= more

    def text(self, fork: Fork) -> str:
        """Say where a fork is, and quote its condition where the source is there."""
        where = f"line {fork.line} of {Path(self.code.co_filename).name}"
        n = self.step_at[fork.at]
        spans = [step.positions for step in map(self.steps.__getitem__, self._expression(n)) if step.positions]
        line = linecache.getline(self.code.co_filename, fork.line).rstrip()
        if not spans or not line or any((p.lineno, p.end_lineno) != (fork.line, fork.line) for p in spans):
            return where
        start, end = min(p.col_offset or 0 for p in spans), max(p.end_col_offset or 0 for p in spans)
        return f"{where} (`{line.encode()[start:end].decode(errors='replace')}`)"

    # --- jumps ---

    @cached_property
    def _jumps(self) -> dict[int, int]:
        """Where each jump leads, by the step's number."""
        jumps = {*dis.hasjrel, *dis.hasjabs}
        targets = ((n, step.argval) for n, step in enumerate(self.steps) if step.opcode in jumps)
        return {n: self.step_at[to] for n, to in targets if to in self.step_at}

    def _is_conditional(self, n: int) -> bool:
        name = self.steps[n].opname
        return name == "FOR_ITER" or "JUMP_IF" in name or "_IF_" in name

    @cached_property
    def _loops(self) -> dict[int, int]:
        """The last step of each loop, by its first one."""
        return {target: n for n, target in self._jumps.items() if target <= n}  # the last such jump ends it

    def _next(self, n: int) -> list[int]:
        """Where a step goes on; what jumps back to the head of a loop goes on behind the loop."""
        target = self._jumps.get(n)
        is_end = self.steps[n].opname in _ENDS or (target is not None and not self._is_conditional(n))
        if target is not None and target <= n:
            target = self._jumps.get(target, n) if self.steps[target].opname == "FOR_ITER" else self._loops[target] + 1
        goes_on = [n + 1] * (not is_end) + ([] if target is None else [target])
        return [each for each in goes_on if each < len(self.steps)]

    def _way(self, start: int) -> list[int]:
        """List the steps that can follow, the nearest first."""
        way = [start]
        seen = {start}
        for n in way:
            fresh = [after for after in self._next(n) if after not in seen]
            way += fresh
            seen.update(fresh)
        return way

    def _key(self, n: int) -> object:
        """What a step has in common with its copies: the compiler writes short ends of a function several times."""
        step = self.steps[n]
        has_place = step.positions is not None and None not in step.positions
        return (step.opname, step.argval, step.positions) if has_place and n not in self._jumps else n

    @cached_property
    def _depth(self) -> dict[int, int]:
        """How many values wait on the stack before each step."""
        depth, to_see = {0: 0}, [0]
        while to_see:
            n = to_see.pop()
            step = self.steps[n]
            for after in self._next(n):
                jumps = after == self._jumps.get(n)
                arg = step.arg if step.opcode >= dis.HAVE_ARGUMENT else None
                if after not in depth and (jumps or after == n + 1):
                    depth[after] = depth[n] + dis.stack_effect(step.opcode, arg, jump=jumps)
                    to_see.append(after)
        return depth

    # --- conditions ---

    def _fork(self, n: int, target: int) -> Fork:
        starts = n + 1, (self._next(n)[-1] if target <= n else target)
        ways = [self._way(start) for start in starts]
        if target <= n:
            ways[1] = [*range(target, n), *ways[1]]
        keys = [set(map(self._key, way)) for way in ways]
        shared = keys[0] & keys[1]
        loop = max((head for head, end in self._loops.items() if head <= n <= end), default=None)
        rounds = range(0) if loop is None else range(loop, self._loops[loop] + 1)
        sides = []
        for way, other in (ways, ways[::-1]):
            own = [step for step in way if self._key(step) not in shared]
            writes = self._writes(way, shared) | self._writes(other, shared) | self._writes(rounds, ())
            handed, known = self._handed(own), {key for key in self._handed(other).values() if key[-1] not in writes}
            meets = next((step for step in way if self._key(step) in shared and not self._is_skipped(step)), None)
            sides.append(
                Side(
                    self._reads([step for step in own if handed.get(step) not in known]),
                    self._writes(way, shared),
                    None if meets is None else self.steps[meets].offset,
                    meets is not None and self._depth.get(meets, 0) > self._base(n),
                    any("RETURN" in self.steps[step].opname for step in way),
                    loop is not None and (target == loop <= n or any(self._jumps.get(step) == loop for step in way)),
                )
            )
        later = {step for way in ways for step in way if self._key(step) in shared}
        later.update(rounds)
        return Fork(
            self.steps[n].offset,
            self._asks(self._expression(n)),
            (sides[0], sides[1]),
            self._reads(later),
            None if loop is None else self.steps[loop].offset,
            self._writes(rounds, ()),
            self._line(n),
        )

    def _is_skipped(self, n: int) -> bool:
        return self.steps[n].opname == "END_FOR"  # Python goes on behind it

    def _expression(self, n: int) -> range:
        """Give the steps that compute what a step takes from the stack, and those of a loop's iterable."""
        if self.steps[n].opname == "FOR_ITER":
            n = next((m for m in range(n, -1, -1) if self.steps[m].opname == "GET_ITER"), n)
        start = self._start(n, self._base(n))
        if self.steps[start].opname == "FOR_ITER" and start != n:
            start = self._expression(start).start
        return range(start, n)

    def _start(self, n: int, waits: int) -> int:
        """Go back to where as many values waited on the stack."""
        while n > 0 and self._depth.get(n, waits + 1) > waits:
            n -= 1
        return n

    def _base(self, n: int) -> int:
        """How many values wait on the stack before the expression that this step takes begins."""
        return self._depth.get(n, 1) - 1

    def _asks(self, steps: Iterable[int]) -> frozenset[str]:
        """Name the variables that are read there, other than to ask for what the model's own type decides."""
        asked = set()
        for n in steps:
            names = _names(self.steps[n], "LOAD")
            is_fixed = self.steps[n + 1].opname == "LOAD_ATTR" and self.steps[n + 1].argval in ("dtype", "device")
            asked.update(names[:-1] if is_fixed else names)
        return frozenset(asked)

    def _writes(self, way: Iterable[int], shared: Collection[object]) -> frozenset[str]:
        """Name the variables that a way writes by itself."""
        own = (step for step in way if self._key(step) not in shared)
        return frozenset(name for step in own for name in _names(self.steps[step], "STORE"))

    def _reads(self, steps: Iterable[int]) -> frozenset[str]:
        """Name the variables that are read there, other than to ask for a shape and the like."""
        read = set()
        for n in steps:
            names = _names(self.steps[n], "LOAD")
            after = self.steps[n + 1] if n + 1 < len(self.steps) else None
            asked = after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD") and after.argval in _DESCRIBES
            before = self.steps[n - 1]
            asked |= before.opname == "LOAD_GLOBAL" and before.argval in ("len", "isinstance", "type")
            read.update(names[:-1] if asked else names)
        return frozenset(read)

    def _handed(self, steps: Iterable[int]) -> dict[int, tuple[str, ...]]:
        """By the step that loads a variable, the module that it, or a part of it, is handed to, and its name."""
        handed = {}
        for n in steps:
            step, before = self.steps[n], self.steps[n - 1]
            if step.opname != "CALL" or step.arg != 1:
                continue
            end = n - (before.opname == "PRECALL")
            start = self._start(end, self._depth.get(end, 1) - 1)
            loads = [m for m in range(start, end) if _names(self.steps[m], "LOAD")]
            callee = start - 1
            while callee > 0 and self.steps[callee].opname in ("LOAD_ATTR", "LOAD_METHOD", "PUSH_NULL"):
                callee -= 1
            is_part = all(m in loads or self._takes_part(m) for m in range(start, end))
            names = _names(self.steps[callee], "LOAD")
            if len(loads) == 1 and is_part and names:
                path = [each.argval for each in self.steps[callee + 1 : start] if each.argval is not None]
                handed[loads[0]] = (names[-1], *path, _names(self.steps[loads[0]], "LOAD")[-1])
        return handed

    def _takes_part(self, n: int) -> bool:
        return self.steps[n].opname in _TAKES_PARTS or self.steps[n].argrepr == "[]"  # an operator from Python 3.14 on

    def _line(self, n: int) -> int:
        positions = (step.positions for step in reversed(self.steps[: n + 1]))
        return next((p.lineno for p in positions if p and p.lineno), self.code.co_firstlineno)


def _names(step: dis.Instruction, what: str) -> list[str]:
    """List the local variables that a step loads or stores; some steps do two things."""
    parts = step.opname.split("_FAST")
    if len(parts) == 1:
        return [step.argval] if step.opname in (f"{what}_DEREF", f"{what}_CLOSURE") else []
    names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    verbs = [part for part in step.opname.replace("_", " ").split() if part in ("LOAD", "STORE", "DELETE")]
    return [name for verb, name in zip(verbs, names, strict=False) if verb == what]


def given_arguments(ways: Ways, caller: Ways | None, at: int) -> Iterator[str]:
    """Name the arguments that a call hands over; all of them where that cannot be read from the caller's code."""
    every = ways.arguments
    n = -1 if caller is None else bisect_right(caller.steps, at, key=lambda step: step.offset) - 1
    if caller is None or not caller.steps[n].opname.startswith("CALL") or "EX" in caller.steps[n].opname:
        yield from every
        return
    by_name: tuple[str, ...] = ()
    for step in caller.steps[max(n - 2, 0) : n]:
        if step.opname == "KW_NAMES" or (caller.steps[n].opname == "CALL_KW" and step.opname == "LOAD_CONST"):
            by_name = step.argval if isinstance(step.argval, tuple) else ()
    count = (caller.steps[n].arg or 0) - len(by_name) + (every[:1] == ("self",))
    yield from every[:count]
    yield from by_name
