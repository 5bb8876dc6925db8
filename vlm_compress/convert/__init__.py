"""Weights in and out: tables that map the parameters of public checkpoints to
ours and back.  A table must balance; whatever is left over on either side
raises with its name.  Nothing that is read is executed.
"""
