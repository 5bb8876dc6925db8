"""What the methods are compared with, a file each: floors and published peers.

Average pooling, a Q-Former, image downsampling and VisionZip shorten the
visual sequence before the decoder (`LlavaConfig.resampler`).  DivPrune,
CDPruner, FastV, PyramidDrop and SparseVLM are selectors (`AtpConfig.selector`),
like random tokens and uniform grids, which are in `compress/atp.py`.
`budget.at_budget` gives the config of any of them for a token budget.
"""
