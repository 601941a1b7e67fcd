"""Studies that use the library. Each is a script: `python -m experiments.<name> --help`."""
