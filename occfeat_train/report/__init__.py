"""report.html: curves, tables and pictures of runs. The only package that imports `occfeat_targets.pictures`."""
