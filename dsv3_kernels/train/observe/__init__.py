"""What a run shows: metrics, memory, timelines, where a NaN came from, the report."""
