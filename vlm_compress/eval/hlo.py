"""A compiled program's HLO text as data: computations, instructions, shapes.

Only what costs need is read: names, shapes with their place in memory, operands
and which computations an instruction calls.  A pure function of the text, so it
serves any backend.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
         'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64,
         'u64': 64, 'f64': 64, 'c64': 64, 'c128': 128}
_ARRAY = re.compile(r'\b([a-z]+[0-9a-z]*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?')
_SPACE = re.compile(r'S\((\d+)\)')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
# The attributes of a kernel may go over lines, which also start with a brace.
_END = re.compile(r'^\}(, execution_thread="\w+")?\s*$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_OPERAND = re.compile(r'%([\w.\-]+)')
_TRIPS = re.compile(r'"?known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)"?\}')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition|true_computation|'
                     r'false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_GROUPS = re.compile(r'replica_groups=(?:\[([\d,]+)\]<=|\{\{([\d,]*)\})')
_CHANNEL = re.compile(r'\bchannel_id=(\d+)')
_ALIASES = re.compile(r'\{(\d*)\}: \((\d+),')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
  """The shape of one array.

  Attributes:
    dtype: as HLO names it.
    dims: sizes.
    space: of memory; 0 is the device's main memory (HBM), others are on chip.
  """
  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def nbytes(self) -> int:
    """Bytes, without the padding of a tiled layout."""
    size = 1
    for dim in self.dims:
      size *= dim
    bits = 8 if self.dtype.startswith('f8') else _BITS.get(self.dtype, 0)
    return -(-size * bits // 8)  # tokens and the like have none

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@functools.cache
def arrays(shape: str) -> tuple[Array, ...]:
  """The arrays of a shape, those of a tuple in order."""
  out = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    space = _SPACE.search(layout)
    out.append(Array(dtype, tuple(int(d.strip('<= ')) for d in dims.split(',')
                                  if d.strip()),
                     int(space.group(1)) if space else 0))
  return tuple(out)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name, opcode: as in the text.
    shape: of its result, as text.
    operands: names of instructions of the same computation.
    literal: what stands in the parentheses: a constant, a parameter's number.
    attributes: the rest of the line.
    is_root: the result of its computation.
  """
  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  literal: str
  attributes: str
  is_root: bool

  @property
  def arrays(self) -> tuple[Array, ...]:
    """Of the result."""
    return arrays(self.shape)

  @property
  def called(self) -> dict[str, str]:
    """Attribute -> computation; branches are 'branch 0', 'branch 1', ..."""
    out = dict(_CALLED.findall(self.attributes))
    branches = _BRANCHES.search(self.attributes)
    if branches:
      for i, name in enumerate(branches.group(1).split(',')):
        out[f'branch {i}'] = name.strip().lstrip('%')
    return out

  @property
  def op_name(self) -> str:
    """Which operation of the source it comes from, or ''."""
    found = _OP_NAME.search(self.attributes)
    return found.group(1) if found else ''

  @property
  def known_trips(self) -> int | None:
    """How often a loop runs, where the compiler says so."""
    found = _TRIPS.search(self.attributes)
    return int(found.group(1)) if found else None

  @property
  def channel(self) -> str:
    """Of a collective, or ''."""
    found = _CHANNEL.search(self.attributes)
    return found.group(1) if found else ''

  @property
  def aliases(self) -> dict[int, int]:
    """Array of the result -> operand whose memory it is."""
    _, _, rest = self.attributes.partition('output_to_operand_aliasing=')
    rest = rest.partition('calls=')[0]
    return {int(out or 0): int(operand) for out, operand in _ALIASES.findall(rest)}

  def group_size(self, num_devices: int) -> int:
    """Devices that take part in a collective together."""
    found = _GROUPS.search(self.attributes)
    if not found:
      return num_devices
    iota, first = found.groups()
    if iota:
      return int(iota.split(',')[-1])
    return len(first.split(',')) if first else num_devices


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in order."""
  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    """The one whose result is the computation's."""
    found = [i for i in self.instructions.values() if i.is_root]
    return found[0] if found else list(self.instructions.values())[-1]

  def parameter(self, number: int) -> Instruction | None:
    """The parameter of that number."""
    return next((i for i in self.instructions.values() if i.opcode == 'parameter'
                 and i.literal.strip() == str(number)), None)

  def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
    """Instructions that read `name`, each with the number of the operand."""
    for user in self.instructions.values():
      for number, operand in enumerate(user.operands):
        if operand == name:
          yield user, number


@dataclasses.dataclass(frozen=True)
class Module:
  """A whole program.

  Attributes:
    computations: by name.
    entry: name of the one that is run.
    num_devices: that run it together.
  """
  computations: dict[str, Computation]
  entry: str
  num_devices: int

  def trips(self, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, or None.

    Where the compiler does not say so: the constant that a counter is compared
    with, taking it to start at 0 and to go up by 1.
    """
    if loop.known_trips is not None:
      return loop.known_trips
    condition = self.computations[loop.called['condition']]
    constants = [int(i.literal) for i in condition.instructions.values()
                 if i.opcode == 'constant' and re.fullmatch(r'-?\d+', i.literal)]
    compares = [i for i in condition.instructions.values() if i.opcode == 'compare']
    if len(constants) == 1 and len(compares) == 1 and (
        'direction=LT' in compares[0].attributes):
      return max(constants[0], 0)
    return None


def parse(text: str) -> Module:
  """Reads what `jax.stages.Compiled.as_text` gives.

  Raises:
    ValueError: it is no HLO module.
  """
  computations: dict[str, Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    if current is None:
      header = _HEADER.match(line)
      if header and not line.startswith('HloModule'):
        current = Computation(header.group(2), {})
        computations[current.name] = current
        entry = current.name if header.group(1) else entry
    elif _END.match(line):
      current = None
    else:
      found = _INSTRUCTION.match(line)
      if found:
        instruction = _instruction(*found.groups())
        current.instructions[instruction.name] = instruction
  if not text.startswith('HloModule') or not entry:
    raise ValueError(f'no HLO module: {text[:60]!r}')
  head = text.partition('\n')[0]
  sizes = [int(n) for n in re.findall(r'(?:num_partitions|replica_count)=(\d+)', head)]
  return Module(computations, entry, max(sizes, default=1))


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
  """`shape opcode(operands), attributes`."""
  if rest.startswith('('):
    end = _closing(rest, 0) + 1
  else:
    end = rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  close = _closing(rest, len(opcode))
  inside = rest[len(opcode) + 1:close]
  operands = tuple(_OPERAND.findall(inside))
  return Instruction(name, opcode.strip(), shape, operands, inside,
                     rest[close + 1:], root is not None)


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for match in re.finditer(r'[()]', text[start:]):
    depth += 1 if match.group() == '(' else -1
    if depth == 0:
      return start + match.start()
  return len(text)
