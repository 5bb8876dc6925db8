"""Prepared data on gs://: what the service refuses is not called damage."""

from __future__ import annotations

import pytest

pytest.importorskip('gcsfs', reason='needs the extra [gcs]')
pytest.importorskip('google_crc32c', reason='needs the extra [test]')
pytest.importorskip('PIL', reason='needs the extra [demo]')

import llava_rows  # noqa: E402
from gcs_server import GcsServer, Refused  # noqa: E402

from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.data import manifest  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.prepare import Preparation, prepare  # noqa: E402
from vlm_compress.data.prepared import PreparedSource  # noqa: E402
from vlm_compress.remote import RemoteError  # noqa: E402


@pytest.fixture(scope='module', name='made')
def fixture_made(tmp_path_factory):
  """Directory of a data set."""
  root = tmp_path_factory.mktemp('made')
  source = llava_rows.write(root)
  prepare(Preparation(source, root / 'images', root / 'out', shard_mb=0.015))
  return root / 'out'


@pytest.fixture(name='service')
def fixture_service(made, monkeypatch):
  """A bucket with the data set in gs://bucket/data, whose shards have a middle."""
  monkeypatch.setattr(manifest, 'EDGE', 100)
  with GcsServer() as service, service.here():
    for path in made.iterdir():
      if path.is_file() and path.name[0] != '.':
        service.write(f'data/{path.name}', path.read_bytes(), None)
    name = 'data/manifest.json'
    about = service.data(name).decode()
    for shard in manifest.read(made)['shards']:
      about = about.replace(shard['edges'], manifest.edges(
          made / shard['file'], shard['bytes']))
    service.write(name, about.encode(), None)
    yield service


def refuse(service, part, status=403):
  def asked(_, path):
    if part in path:
      raise Refused(status, 'no right to it')
  service.asked = asked


@pytest.mark.parametrize('part', ['manifest.json', '.array_record', 'dataset_info.json',
                                  'features.json'])
def test_what_may_not_be_read_when_it_is_opened(part, service):
  refuse(service, part)
  with pytest.raises(RemoteError, match='cannot be read .*Forbidden.*credentials'
                     ) as caught:
    PreparedSource('gs://bucket/data')
  line = cli.describe(caught.value, [])
  assert line.startswith('gs://bucket/data/') and part in line
  assert 'prepare-data' not in line and 'damaged' not in line


def test_a_record_that_may_not_be_read(service):
  prepared = PreparedSource('gs://bucket/data')
  refuse(service, '.array_record')
  with pytest.raises(RemoteError, match='read at record 3 .*credentials') as caught:
    prepared[3]
  line = cli.describe(caught.value, [])
  assert line.startswith('gs://bucket/data: ')
  assert 'prepare-data' not in line and 'damaged' not in line


def test_damage_is_damage_there_too(service):
  name = min(name for name in service.names() if '.array_record' in name)
  data = bytearray(service.data(name))
  data[len(data) // 2] ^= 1
  assert any(data[len(data) // 2 - 50:len(data) // 2 + 50])  # no padding
  whole = service.data(name)
  service.write(name, bytes(data), None)
  prepared = PreparedSource('gs://bucket/data')
  with pytest.raises(DataError, match='record . cannot be read.*prepare-data'):
    for i in range(10):
      prepared[i]
  service.write(name, whole, None)
  service.objects.pop('data/features.json')
  with pytest.raises(DataError, match='features.json is missing or damaged'):
    PreparedSource('gs://bucket/data')


def test_examples_of_a_part_are_those_of_a_disk(service, made):
  manifest_here = (made / 'manifest.json').read_bytes()
  (made / 'manifest.json').write_bytes(service.data('data/manifest.json'))
  try:
    ours = PreparedSource('gs://bucket/data', 'train[30%:]')
    theirs = PreparedSource(made, 'train[30%:]')
    assert len(ours) == len(theirs) > 3
    assert all(ours[i] == theirs[i] for i in range(len(theirs)))
  finally:
    (made / 'manifest.json').write_bytes(manifest_here)
