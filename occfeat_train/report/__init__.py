"""report.html: curves, tables and pictures of runs."""
