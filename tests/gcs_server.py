"""A small imitation of Google Cloud Storage, of its JSON API what clients call.

It serves gcsfs, google-cloud-storage, tensorstore and array_record: objects in
memory, with generations and their preconditions, in one thread per connection.
There is one bucket, `bucket`; every other name is unknown.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http import server
from unittest import mock

import google_crc32c

_OBJECT = re.compile(r'(?:/storage/v1|/download/storage/v1)?/b/([^/]+)/o/(.+)')
_BUCKET = re.compile(r'/storage/v1/b/([^/]+)')
_LIST = re.compile(r'(?:/storage/v1)?/b/([^/]+)/o')
_UPLOAD = re.compile(r'/upload/storage/v1/b/([^/]+)/o')
_COPY = re.compile(r'(?:/storage/v1)?/b/[^/]+/o/([^/]+)/(?:rewriteTo|copyTo)/b/[^/]+/o/([^/]+)')


class Refused(Exception):
  """(status, message) of an answer that is no success."""


class _Quiet(server.ThreadingHTTPServer):
  """Says nothing of clients that are killed."""
  daemon_threads = True

  def handle_error(self, *_) -> None:
    pass


class GcsServer:
  """The server; entered, it answers.

  Attributes:
    objects: name -> (bytes, generation).
    written: called with the name of every object that is about to be written;
      may raise Refused.
    asked: called with method and path of every request; may raise Refused.
    refuses: status that every request is answered with, if it is not 0.
  """

  def __init__(self):
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.written: Callable[[str], None] = lambda name: None
    self.asked: Callable[[str, str], None] = lambda method, path: None
    self.refuses = 0
    self.lock, self.generation = threading.Lock(), 1000
    self.uploads: dict[str, tuple[str, bytes]] = {}
    handler = type('Handler', (_Handler,), {'owner': self})
    self._http = _Quiet(('localhost', 0), handler)
    self.url = f'http://localhost:{self._http.server_port}'

  def __enter__(self) -> GcsServer:
    threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._http.shutdown()
    self._http.server_close()

  def variables(self) -> dict[str, str]:
    """Environment variables that lead all clients here, without credentials."""
    return {'STORAGE_EMULATOR_HOST': self.url, 'TENSORSTORE_GCS_HTTP_URL': self.url,
            'CLOUD_STORAGE_EMULATOR_ENDPOINT': self.url, 'NO_GCE_CHECK': 'true',
            'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false', 'FSSPEC_GCS_TOKEN': 'anon'}

  @contextlib.contextmanager
  def here(self) -> Iterator[GcsServer]:
    """Leads the clients of this process here, and then nowhere."""
    import gcsfs
    from etils.epath import backend

    from vlm_compress import remote

    def forget() -> None:
      remote._files.cache_clear()
      backend.fsspec_backend._get_filesystem.cache_clear()
      gcsfs.GCSFileSystem.clear_instance_cache()
    with mock.patch.dict(os.environ, self.variables()):
      forget()
      yield self
    forget()

  def data(self, name: str) -> bytes:
    """What an object holds."""
    return self.objects[name][0]

  def names(self, prefix: str = '') -> list[str]:
    """Of all objects below a prefix."""
    return sorted(name for name in self.objects if name.startswith(prefix))

  def write(self, name: str, data: bytes, match: str | None) -> dict:
    """Writes an object, if it has the generation that is asked for."""
    self.written(name)
    with self.lock:
      now = self.objects.get(name, (b'', 0))[1]
      if match is not None and int(match) != now:
        raise Refused(412, 'conditionNotMet')
      self.generation += 1
      self.objects[name] = data, self.generation
    return self.about(name)

  def about(self, name: str) -> dict:
    """An object's resource."""
    data, generation = self.objects[name]
    checksum = int(google_crc32c.value(data)).to_bytes(4, 'big')
    return {'kind': 'storage#object', 'bucket': 'bucket', 'name': name,
            'id': f'bucket/{name}/{generation}', 'size': str(len(data)),
            'generation': str(generation), 'metageneration': '1',
            'contentType': 'application/octet-stream', 'storageClass': 'STANDARD',
            'timeCreated': '2026-01-01T00:00:00.000Z',
            'updated': '2026-01-01T00:00:00.000Z',
            'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
            'crc32c': base64.b64encode(checksum).decode(), 'etag': str(generation)}

  def listed(self, query: dict[str, str]) -> dict:
    """A listing; all of it is one page."""
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    items, prefixes = [], set()
    with self.lock:
      for name in self.names(prefix):
        head, found, _ = name[len(prefix):].partition(delimiter or '\0')
        if found:
          prefixes.add(prefix + head + delimiter)
        elif query.get('startOffset', '') <= name < query.get('endOffset', '\U0010ffff'):
          items.append(self.about(name))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}


class _Handler(server.BaseHTTPRequestHandler):
  """Answers one connection."""
  protocol_version = 'HTTP/1.1'
  owner: GcsServer

  def log_message(self, *_) -> None:
    pass

  def _answer(self, status: int, body: bytes = b'', headers: dict | None = None
              ) -> None:
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    bare = self.command == 'HEAD' or status in (204, 304)  # have no body
    if not bare:
      self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if not bare:
      self.wfile.write(body)

  def _json(self, value: dict, status: int = 200, headers: dict | None = None) -> None:
    self._answer(status, json.dumps(value).encode(),
                 {'Content-Type': 'application/json', **(headers or {})})

  def _handle(self) -> None:
    body = self._body()
    parts = urllib.parse.urlsplit(self.path)
    query = {k: v[-1] for k, v in urllib.parse.parse_qs(parts.query).items()}
    try:
      if self.owner.refuses:
        raise Refused(self.owner.refuses, 'no such luck')
      self.owner.asked(self.command, parts.path)
      self._route(parts.path, query, body)
    except Refused as refused:
      status, message = refused.args
      self._json({'error': {'code': status, 'message': message,
                            'errors': [{'message': message}]}}, status)

  do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b''
    while size := int(self.rfile.readline().split(b';')[0], 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
    if found := _UPLOAD.fullmatch(path):
      self._bucket(found[1])
      self._upload(query, body)
    elif (found := _COPY.fullmatch(path)) and self.command == 'POST':
      source, target = map(urllib.parse.unquote, found.groups())
      self._exists(source)
      about = self.owner.write(target, self.owner.data(source), None)
      self._json({'done': True, 'resource': about, **about})
    elif found := _LIST.fullmatch(path):
      self._bucket(found[1])
      self._json(self.owner.listed(query))
    elif found := _OBJECT.fullmatch(path):
      self._bucket(found[1])
      self._object(urllib.parse.unquote(found[2]), query)
    elif found := _BUCKET.fullmatch(path):
      self._bucket(found[1])
      self._json({'kind': 'storage#bucket', 'name': 'bucket', 'id': 'bucket',
                  'location': 'US', 'storageClass': 'STANDARD'})
    else:
      raise Refused(501, f'{self.command} {self.path}')

  def _bucket(self, name: str) -> None:
    if name != 'bucket':
      raise Refused(404, 'The specified bucket does not exist.')

  def _exists(self, name: str) -> None:
    if name not in self.owner.objects:
      raise Refused(404, f'No such object: bucket/{name}')

  def _object(self, name: str, query: dict[str, str]) -> None:
    self._exists(name)
    if self.command == 'DELETE':
      with self.owner.lock:
        self.owner.objects.pop(name, None)
      self._answer(204)
    elif query.get('alt') != 'media' and not self.path.startswith('/download'):
      self._json(self.owner.about(name))
    else:
      self._media(name, query)

  def _media(self, name: str, query: dict[str, str]) -> None:
    """Bytes of an object, or a part of them."""
    data, generation = self.owner.objects[name]
    for key, wrong in (('ifGenerationMatch', False), ('ifGenerationNotMatch', True)):
      if key in query and (int(query[key]) == generation) == wrong:
        raise Refused(304 if wrong else 412, 'conditionNotMet')
    about = self.owner.about(name)
    headers = {'x-goog-generation': str(generation), 'x-goog-metageneration': '1',
               'x-goog-hash': f'crc32c={about["crc32c"]},md5={about["md5Hash"]}',
               'x-goog-storage-class': 'STANDARD', 'Content-Type':
               'application/octet-stream', 'x-goog-stored-content-length': str(len(data))}
    wanted = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if wanted is None:
      self._answer(200, data, headers)
      return
    start, end = wanted[1], wanted[2]
    first = int(start) if start else max(0, len(data) - int(end))
    last = min(int(end), len(data) - 1) if start and end else len(data) - 1
    if first > last:
      raise Refused(416, 'the range is behind the end')
    self._answer(206, data[first:last + 1], {
        **headers, 'Content-Range': f'bytes {first}-{last}/{len(data)}'})

  def _upload(self, query: dict[str, str], body: bytes) -> None:
    match = query.get('ifGenerationMatch')
    kind = query.get('uploadType')
    if kind == 'media':
      self._json(self.owner.write(query['name'], body, match))
    elif kind == 'multipart':
      about, data = _multipart(self.headers['Content-Type'], body)
      self._json(self.owner.write(about['name'], data, match))
    elif kind == 'resumable' and 'upload_id' not in query:
      name = query.get('name') or json.loads(body)['name']
      number = str(len(self.owner.uploads))
      self.owner.uploads[number] = name, b''
      where = f'{self.owner.url}{self.path}&upload_id={number}'
      self._json({}, headers={'Location': where})
    else:
      self._chunk(query, body, match)

  def _chunk(self, query: dict[str, str], body: bytes, match: str | None) -> None:
    """A part of a resumable upload; the object is there behind the last one."""
    name, before = self.owner.uploads[query['upload_id']]
    whole = before + body
    self.owner.uploads[query['upload_id']] = name, whole
    total = self.headers.get('Content-Range', '/*').rpartition('/')[2]
    if total in ('*', '') or len(whole) < int(total):
      self._answer(308, headers={'Range': f'bytes=0-{len(whole) - 1}'})
    else:
      self._json(self.owner.write(name, whole, match))



def _multipart(content_type: str, body: bytes) -> tuple[dict, bytes]:
  """An object's resource and its bytes, in the form in which gcsfs sends them."""
  boundary = re.search(r'boundary="?([^";]+)"?', content_type)[1].encode()
  end = body.rindex(b'\n--' + boundary + b'--')
  _, about, data = body[:end].split(b'--' + boundary, 2)
  return json.loads(about.partition(b'\n\n')[2]), data.partition(b'\n\n')[2]
