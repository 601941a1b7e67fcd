"""What the scripts share: settings, run folders, resumable sequences, comparisons, sweeps, reports."""
