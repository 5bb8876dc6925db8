"""Visual token compression for LLaVA-type models, in JAX and Flax Linen.

Two methods on one model: VoCo-LLaMA (arXiv 2406.12275), which lets the
decoder compress an image into a few VoCo tokens, and ATP-LLaVA
(arXiv 2412.00447), which prunes visual tokens between decoder layers, per
image and question.  The package has layers; a file imports from lower ones
only (README, "How it is built").  Nothing is imported here, so that
`import vlm_compress` is free and needs no extra.
"""

__version__ = '0.1.0'
