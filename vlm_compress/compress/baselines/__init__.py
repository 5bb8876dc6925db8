"""What the methods are compared with: shortening the visual sequence before
the decoder, by average pooling or a Q-Former.  Random tokens and uniform grids
are selectors of `compress/atp.py`.
"""
