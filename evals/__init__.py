"""After the cascade, never inside it: public benchmarks, the matrix and its gates, test-time scaling, the report."""
