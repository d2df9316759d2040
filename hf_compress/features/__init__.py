"""Looking at bottlenecks: pages, probing, reconstruction."""
