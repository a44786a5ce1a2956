"""One file a subcommand: SUMMARY and EPILOG for its help, `add_arguments`, `run`.

These modules are imported to build the help, so they import the heavy parts inside `run`.
"""
