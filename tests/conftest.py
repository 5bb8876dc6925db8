"""Settings that have to be made before jax is imported, and nothing else.

Tests run on the CPU, on eight fake devices, so that meshes and shardings are
tested on any machine.  A test that needs an extra says
`pytest.importorskip('package', reason='needs the extra [demo]')`; pytest's
summary (-rs) lists what was skipped and why.
"""

import os
import tempfile

_DEVICES = '--xla_force_host_platform_device_count'

if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
      f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'.strip())
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling is most of the time there is, and the same program is often built anew: by
# every fit, every mesh, every worker and every command that a test starts.  All of
# them share what takes long; a directory that is given outlives this run.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _PROGRAMS = tempfile.TemporaryDirectory(prefix='jax_programs_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _PROGRAMS.name
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
