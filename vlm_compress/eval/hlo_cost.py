"""What a compiled program moves: bytes of main memory, and between chips.

`cost_analysis()` of a compiled program counts the body of a loop once, and the
layers are a loop; here every loop counts as often as it runs.

What is not seen:

  * a loop whose number of passes is neither said by the compiler nor a
    constant: it counts once, and is reported as such;
  * a conditional counts its busiest branch, in the share of passes that the
    caller gives (all by default);
  * padding of tiled layouts, a kernel's own traffic beyond reading its operands
    and writing its result once, and whatever a fusion reads twice;
  * overlap: what is moved while something else is computed counts as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from vlm_compress.eval.hlo import Computation, Instruction, Module

# Bytes that a chip sends, as a share of what a collective is of, for groups
# of n chips, with the algorithms that need least: n - 1 of n parts.
_PASSES = {'all-gather': 1, 'reduce-scatter': 1, 'all-reduce': 2, 'all-to-all': 1,
           'ragged-all-to-all': 1}
COLLECTIVES = (*_PASSES, 'collective-permute', 'collective-broadcast')
# They move nothing themselves.
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
         'after-all', 'partition-id', 'replica-id', 'opt-barrier',
         'add-dependency', 'domain')
_CALLS = ('call', 'call-start', 'async-start')
_VIEWS = ('bitcast', 'get-tuple-element', 'tuple')  # of what they read
_PARTS = ('dynamic-slice', 'slice', 'gather')
Share = Callable[[str], float]


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of collective, all of a program together.

  Attributes:
    count: how often it runs.
    payload: bytes of the arrays that it is of: what an all-gather gives, what
      the others take, on one chip.
    sent: bytes that one chip sends, at least.
  """
  count: float
  payload: float
  sent: float

  def __add__(self, other: Collective) -> Collective:
    return Collective(self.count + other.count, self.payload + other.payload,
                      self.sent + other.sent)

  def __mul__(self, times: float) -> Collective:
    return Collective(self.count * times, self.payload * times, self.sent * times)


@dataclasses.dataclass
class Moved:
  """What one chip moves.

  Attributes:
    hbm_bytes: read from and written to main memory.
    collectives: by kind.
    loops_once: loops of unknown length, counted once.
  """
  hbm_bytes: float = 0.0
  collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
  loops_once: int = 0

  @property
  def sent(self) -> float:
    """Bytes that a chip sends to others."""
    return sum(c.sent for c in self.collectives.values())

  def add(self, other: Moved, times: float = 1.0) -> None:
    """Adds what something else moves, so many times."""
    self.hbm_bytes += times * other.hbm_bytes
    self.loops_once += other.loops_once
    for kind, more in other.collectives.items():
      here = self.collectives.get(kind, Collective(0, 0, 0))
      self.collectives[kind] = here + more * times


def moved(module: Module, taken: Share = lambda op_name: 1.0) -> Moved:
  """What a run of the program moves, per chip.

  Args:
    module: the program.
    taken: op_name of a conditional -> share of its passes that take the busiest
      branch; the others take the idlest.
  """
  return _Walk(module, taken).computation(module.entry)


class _Walk:
  """Sums over a program's computations, each of them once."""

  def __init__(self, module: Module, taken: Share):
    self.module, self.taken = module, taken
    self._known: dict[str, Moved] = {}

  def computation(self, name: str) -> Moved:
    """One run of a computation."""
    if name not in self._known:
      total, seen = Moved(), set()
      computation = self.module.computations[name]
      for instruction in computation.instructions.values():
        total.add(self._instruction(computation, instruction, seen))
      self._known[name] = total
    return self._known[name]

  def _instruction(self, computation: Computation, one: Instruction,
                   seen: set[str]) -> Moved:
    if one.opcode.removesuffix('-start') in COLLECTIVES:
      kind, collective = _collective(computation, one, self.module.num_devices)
      return Moved(_traffic(self.module, computation, one), {kind: collective})
    called = one.called
    if one.opcode == 'while':
      return self._loop(one, called)
    if one.opcode == 'conditional':
      return self._conditional(one, called)
    if one.opcode == 'fusion':
      return self._fusion(computation, one, seen)
    if one.opcode in _CALLS and called:
      return self.computation(called.get('calls') or called['to_apply'])
    return Moved(_traffic(self.module, computation, one))

  def _fusion(self, computation: Computation, one: Instruction, seen: set[str]
              ) -> Moved:
    """A fusion, inside which nothing goes to memory.

    A TPU runs a collective beside products: fusions that follow each other hold
    it, under one channel, and hand its arrays on.
    """
    total, goes_on = Moved(), False
    for channel, kind, collective in self._inside(one.called['calls']):
      if channel in seen:
        goes_on = True
      else:
        total.add(Moved(0.0, {kind: collective}))
        seen.update([channel] if channel else [])
    total.hbm_bytes = _fusion_traffic(self.module, computation, one, goes_on)
    return total

  def _inside(self, name: str) -> Iterator[tuple[str, str, Collective]]:
    """Channel, kind and size of the collectives of a fused computation."""
    computation = self.module.computations[name]
    for one in computation.instructions.values():
      if one.opcode.removesuffix('-start') in COLLECTIVES:
        yield one.channel, *_collective(computation, one, self.module.num_devices)
      elif one.opcode == 'fusion':
        yield from self._inside(one.called['calls'])

  def _loop(self, one: Instruction, called: dict[str, str]) -> Moved:
    trips, total = self.module.trips(one), Moved()
    total.add(self.computation(called['body']), 1 if trips is None else trips)
    total.loops_once += trips is None
    return total

  def _conditional(self, one: Instruction, called: dict[str, str]) -> Moved:
    branches = sorted(map(self.computation, called.values()),
                      key=lambda m: (m.hbm_bytes + m.sent))
    share, total = self.taken(one.op_name), Moved()
    total.add(branches[-1], share)
    total.add(branches[0], 1.0 - share)
    return total


def _collective(computation: Computation, one: Instruction, num_devices: int
                ) -> tuple[str, Collective]:
  """Kind and size of one run of a collective."""
  kind = one.opcode.removesuffix('-start')
  operand = sum(a.nbytes for name in one.operands
                for a in computation.instructions[name].arrays)
  if kind not in _PASSES:
    return kind, Collective(1, operand, operand)
  size = one.group_size(num_devices)
  if kind == 'all-reduce' and 'all-reduce-scatter' in computation.name:
    kind = 'reduce-scatter'  # a TPU's: this, fused with taking the own part
  payload = operand * size if kind == 'all-gather' else operand
  return kind, Collective(1, payload,
                          payload * _PASSES[kind] * (size - 1) / size)


def _hbm(instruction: Instruction) -> int:
  return sum(a.nbytes for a in instruction.arrays if a.space == 0)


def _traffic(module: Module, computation: Computation, one: Instruction) -> float:
  """Bytes of main memory that one instruction reads and writes."""
  if one.opcode in _FREE or one.opcode.endswith(('-done', '-update')) or (
      'custom_call_target="AllocateBuffer"' in one.attributes):
    return 0.0
  operands = [computation.instructions[name] for name in one.operands]
  if one.opcode.endswith('-start'):
    # The result holds what is read and what is written; an all-reduce's only
    # the second.
    if one.opcode.removesuffix('-start') in _PARTS:
      part = one.arrays[sum(len(x.arrays) for x in operands)]
      return part.nbytes * ((_hbm(operands[0]) > 0) + (part.space == 0))
    whole = _hbm(one)
    return whole + (sum(map(_hbm, operands)) if one.opcode == 'all-reduce-start'
                    else 0)
  if one.opcode in _PARTS:
    return _hbm(one) + _of(operands[0], one)
  if one.opcode == 'dynamic-update-slice':
    return _hbm(operands[1]) + _of(one, operands[1])
  return _hbm(one) + sum(map(_hbm, operands))


def _fusion_traffic(module: Module, computation: Computation, one: Instruction,
                    goes_on: bool) -> float:
  """`_traffic` of a fusion; one that goes on with a collective leaves alone what
  it only hands on."""
  inner = module.computations[one.called['calls']]
  aliased = one.aliases if goes_on else {}
  read = sum(min(_hbm(computation.instructions[name]), _read(module, inner, number))
             for number, name in enumerate(one.operands)
             if number not in aliased.values())
  in_hbm = sum(a.nbytes for i, a in enumerate(one.arrays)
               if a.space == 0 and i not in aliased)
  return read + min(in_hbm, _written(module, inner, inner.root))


def _of(whole: Instruction, part: Instruction) -> float:
  """Bytes of a part of an array, if that array is in main memory."""
  return sum(a.nbytes for a in part.arrays) if _hbm(whole) else 0.0


def _nbytes(instruction: Instruction) -> int:
  return sum(a.nbytes for a in instruction.arrays)


def _read(module: Module, inner: Computation, number: int) -> float:
  """Bytes of its parameter that a fused computation reads."""
  parameter = inner.parameter(number)
  return 0.0 if parameter is None else _read_of(module, inner, parameter)


def _read_of(module: Module, inner: Computation, value: Instruction) -> float:
  total = 0.0
  for user, number in inner.users(value.name):
    if user.opcode in _PARTS and number == 0:
      total += _nbytes(user)
    elif user.opcode == 'dynamic-update-slice' and number == 0:
      pass  # written in place
    elif user.opcode in _VIEWS:
      total += _read_of(module, inner, user)
    elif user.opcode == 'fusion':
      total += _read(module, module.computations[user.called['calls']], number)
    else:
      return _nbytes(value)
  return min(total, _nbytes(value))


def _written(module: Module, inner: Computation, root: Instruction) -> float:
  """Bytes of its result that a fused computation writes."""
  operands = [inner.instructions[name] for name in root.operands]
  if root.opcode == 'dynamic-update-slice':
    return _nbytes(operands[1])
  if root.opcode == 'tuple':
    return sum(_written(module, inner, x) for x in operands)
  if root.opcode == 'bitcast' and operands:
    return _written(module, inner, operands[0])
  if root.opcode == 'fusion':
    called = module.computations[root.called['calls']]
    return _written(module, called, called.root)
  return _nbytes(root)


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A large array of a program.

  Attributes:
    shape: such as 'f32[4096,11008]'.
    nbytes: on one chip, without padding.
    op_name: the operation that makes it; 'argument' for what comes in.
  """
  shape: str
  nbytes: int
  op_name: str


def largest(module: Module, count: int = 8) -> list[Buffer]:
  """The largest arrays in main memory, one of each shape and origin.

  Which of them exist at the same time is the compiler's secret.
  """
  found: dict[tuple[str, str], Buffer] = {}
  fused = {name for c in module.computations.values()
           for i in c.instructions.values() if i.opcode == 'fusion'
           for name in i.called.values()}
  for computation in module.computations.values():
    if computation.name in fused:
      continue
    for one in computation.instructions.values():
      argument = one.opcode == 'parameter'
      if argument and computation.name != module.entry or (
          one.opcode in _FREE and not argument) or one.opcode in (
              'while', 'conditional') or one.opcode.endswith('-done'):
        continue
      name = 'argument' if argument else one.op_name
      for array in one.arrays:
        if array.space == 0:
          found.setdefault((str(array), name),
                           Buffer(str(array), array.nbytes, name))
  return sorted(found.values(), key=lambda b: -b.nbytes)[:count]
