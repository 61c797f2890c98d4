"""modq beside other ways to fine-tune: suites of measurements, one runner, results as JSON and as tables."""
