"""python -m occfeat_train: the same as occfeat-train."""

from occfeat_train.cli import main

main(prog_name="occfeat-train")
