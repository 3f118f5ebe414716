"""What the verbs of the command line do; `pellucid.cli` only names them."""
