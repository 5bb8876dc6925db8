"""Training: state, optimizer, one step function per objective, checkpoints with
exact resume, metrics, and the loop that is read from top to bottom.
"""
