"""The stages of the quickstart: align, instruct, voco8, voco1, atp.

And what only the sweep of configs/sweeps.py trains: voco2, qformer8, pool8, pool16.

  vlm-compress train --config=configs/quickstart.py:voco8 \
    --config.init_from=vlm_compress/checkpoints/quickstart --workdir=runs/voco8

The page itself is vlm_compress/cli/quickstart_config.py, because an installed
package has no configs directory.
"""

from vlm_compress.cli.quickstart_config import get_config  # noqa: F401
