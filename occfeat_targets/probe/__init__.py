"""Linear probes: how well a cache's target features separate the classes of its labels."""
