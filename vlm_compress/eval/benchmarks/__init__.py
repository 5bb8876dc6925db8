"""The benchmarks of the papers: questions from the official files, prompts as
LLaVA-1.5 asks them, answer files of several tools, and the official metrics.
Pure Python: nothing here needs jax.
"""
