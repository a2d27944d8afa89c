"""What the benchmark scripts share: the machine, the model, the contenders' processes and the report."""
