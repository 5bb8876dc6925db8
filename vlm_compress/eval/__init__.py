"""Measuring: scores per question kind with intervals, tokens, FLOPs and bytes of
each method, the floors at equal budgets, and the report.
"""
