"""python -m occfeat_targets: the same as occfeat-targets."""

from occfeat_targets.cli import main

main(prog_name="occfeat-targets")
