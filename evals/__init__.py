"""Measurements after the cascade: benchmarks, the matrix and its gates, scaling, the report."""
