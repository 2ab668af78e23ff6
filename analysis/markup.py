"""A grid of text as Markdown or LaTeX."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

LINE_BREAK = r" \\ "
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "†": r"$\dagger$",
    "’": "'",
    "\n": " ",
}


class Bold(str):
    """Text to be set in bold."""

    __slots__ = ()


def markdown_escape(text: str) -> str:
    """Escape what would end a table's cell or start markup."""
    for mark in "\\|*`<>":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def latex_escape(text: str) -> str:
    """Escape every character that LaTeX would read as a command."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    # a row that starts with a bracket would be read as the optional argument of the line break before it
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Write a pipe table, padded so that its source reads as a table too.

    Parameters
    ----------
    headers, rows
        Plain text; `Bold` cells are set in bold.
    text_columns
        How many leading columns are words, set left; the rest are numbers, set right.
    """

    def cell(text: str) -> str:
        return f"**{markdown_escape(text)}**" if isinstance(text, Bold) and text else markdown_escape(text)

    grid = [[cell(text) for text in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[i]) for row in grid)) for i in range(len(headers))]
    rule = ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(row: Sequence[str]) -> str:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        padded[:text_columns] = [text.ljust(width) for text, width in zip(row[:text_columns], widths, strict=False)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(row) for row in (grid[0], rule, *grid[1:])) + "\n"


def latex_table(
    headers: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], caption: str, label: str, text_columns: int = 1
) -> str:
    r"""Write a ``table`` float with booktabs rules, a ``\midrule`` between groups of rows."""

    def cell(text: str) -> str:
        return rf"\textbf{{{latex_escape(text)}}}" if isinstance(text, Bold) and text else latex_escape(text)

    def line(row: Sequence[str]) -> str:
        return "    " + " & ".join(map(cell, row)) + r" \\"

    head = "    " + " & ".join(_stacked(header) for header in headers) + r" \\"
    body = "\n    \\midrule\n".join("\n".join(line(row) for row in group) for group in groups if group)
    columns = "l" * text_columns + "r" * (len(headers) - text_columns)
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"  \centering",
            r"  \footnotesize",
            rf"  \caption{{{latex_escape(caption)}}}",
            rf"  \label{{{label}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            head,
            r"    \midrule",
            body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _stacked(header: str) -> str:
    """Break a long heading into lines, so that numbers set the width of a column and not their heading."""
    lines = textwrap.wrap(header, 14, break_long_words=False, break_on_hyphens=False)
    if len(lines) < 2:
        return latex_escape(header)
    return rf"\shortstack[r]{{{LINE_BREAK.join(map(latex_escape, lines))}}}"
