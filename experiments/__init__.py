"""Studies that use the library, each readable on its own: `python -m experiments.<name> --help`."""
