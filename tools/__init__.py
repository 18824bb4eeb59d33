"""What acts on bundles: each file with a `main` is a command, the others are parts of one."""
