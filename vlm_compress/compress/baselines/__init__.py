"""What the methods are compared with: shortening the visual sequence before
the decoder (average pooling, Q-Former), and choosing tokens without looking
(random, uniform grid), at equal budgets.
"""
