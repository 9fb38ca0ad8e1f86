"""Pictures of keyframes and HTML pages, for `occfeat-targets preview` and the report of `occfeat_train`."""
