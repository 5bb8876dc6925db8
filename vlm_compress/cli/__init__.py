"""The commands of `vlm-compress`: flags, files and exit codes.  What a command
does is in the packages below; `__main__` picks the command.
"""
