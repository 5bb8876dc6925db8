"""Settings that have to be made before jax is imported, and nothing else.

Tests run on the CPU, on eight fake devices, so that meshes and shardings are
tested on any machine.  A test that needs an extra says
`pytest.importorskip('package', reason='needs the extra [demo]')`; pytest's
summary (-rs) lists what was skipped and why.
"""

import os

_DEVICES = '--xla_force_host_platform_device_count'

if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
      f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'.strip())
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
