"""Pictures of traces, runs and benchmarks: charts as plain numbers, drawn or written as CSV."""
