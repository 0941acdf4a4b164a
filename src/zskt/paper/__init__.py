"""The paper's experiments: training on data, baselines, tables and figures."""
