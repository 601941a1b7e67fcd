"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_text_columns: int = 1) -> str:
    """Formats a Markdown table, padded; the columns after the first `num_text_columns` are right-aligned.

    Example:
      >>> print(markdown_table(["method", "accuracy"], [["ewc", "0.9"]]), end="")
      | method | accuracy |
      | ------ | -------: |
      | ewc    |      0.9 |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    is_text = [number < num_text_columns for number in range(len(header))]
    rule = ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True)]

    def line(cells: Sequence[str]) -> str:
        columns = zip(cells, widths, is_text, strict=True)
        return f"| {' | '.join(cell.ljust(width) if text else cell.rjust(width) for cell, width, text in columns)} |\n"

    return "".join(map(line, [header, rule, *rows]))
