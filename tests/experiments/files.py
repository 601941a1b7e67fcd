"""Reads what the scripts write."""

import re


def read_table(file):
    """Reads a table in Markdown, without the spaces that align its columns."""
    return re.sub(" +", " ", file.read_text())
