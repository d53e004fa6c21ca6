"""The comparison as a table: one row for each configuration."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vaedist.compare.comparison import Comparison, Configuration
from vaedist.compare.metrics import Spread, direction

ABSENT = "–"  # noqa: RUF001  a dash


class Cell(NamedTuple):
    text: str
    best: bool = False  # of its column


class Column(NamedTuple):
    name: str
    cells: list[Cell]

    @property
    def header(self) -> list[str]:
        """The name in short lines: objective., beta."""
        return self.name.replace(".", ".\n").replace("/", "/\n").replace(" ", "\n").split("\n")

    @property
    def width(self) -> int:
        return max(map(len, [*self.header, *(_marked(cell) for cell in self.cells)]))


def columns(comparison: Comparison, metrics: Sequence[str]) -> list[Column]:
    """What differs, then the final values and, where one knows which is better, the best."""
    rows = comparison.configurations
    found = [
        Column("n", [Cell(str(len(row.runs))) for row in rows]),
        Column("step", [Cell(_steps(row)) for row in rows]),
        *(Column(key, [Cell(row.said.get(key, ABSENT)) for row in rows]) for key in comparison.keys),
    ]
    for metric in metrics:
        winners = comparison.winners(metric)
        found.append(Column(metric, [Cell(_value(row, row.final(metric)), row.number in winners) for row in rows]))
        if metric.startswith("eval/") and direction(metric):
            found.append(Column(f"{metric} best", [Cell(_at(row, row.best(metric))) for row in rows]))
    return found


def text(comparison: Comparison, metrics: Sequence[str], width: int) -> Iterator[str]:
    """The lines of the table, in blocks of columns that fit the width, its runs, and what a reader must know."""
    first = Column("", [Cell(str(row.number)) for row in comparison.configurations])
    block = [first]
    for column in columns(comparison, metrics):
        if len(block) > 1 and sum(one.width + 2 for one in [*block, column]) - 2 > width:
            yield from [*_block(block), ""]
            block = [first]
        block.append(column)
    yield from [*_block(block), ""]
    for configuration in comparison.configurations:
        for run in configuration.runs:
            yield _printable(f"{configuration.number:>{first.width}}  seed {run.seed}  {run.name}")
    yield from (_printable(f"- {note}") for note in comparison.notes(metrics))


def _block(block: Sequence[Column]) -> Iterator[str]:
    height = max(len(column.header) for column in block)
    headers = [[""] * (height - len(column.header)) + column.header for column in block]
    for line in zip(*headers, strict=True):
        yield _line(line, block)
    for cells in zip(*(column.cells for column in block), strict=True):
        yield _line(map(_marked, cells), block)


def _line(words: Iterator[str] | Sequence[str], block: Sequence[Column]) -> str:
    return _printable("  ".join(f"{word:<{column.width}}" for word, column in zip(words, block, strict=True)).rstrip())


def _marked(cell: Cell) -> str:
    return f"{cell.text} *" if cell.best else cell.text


def _printable(line: str) -> str:
    """Without what a file's name or text could do to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _steps(row: Configuration) -> str:
    """How far its runs are, and of how many where one is incomplete."""
    asked = f" of {row.runs[0].steps}" if not all(run.complete for run in row.runs) else ""
    return _range([run.step for run in row.runs]) + asked


def _value(row: Configuration, spread: Spread | None) -> str:
    """With how many runs it has where that are not all."""
    if spread is None:
        return ABSENT
    return f"{spread}{f' ({spread.n} of {len(row.runs)})' if spread.n < len(row.runs) else ''}"


def _at(row: Configuration, spread: Spread | None) -> str:
    return f"{_value(row, spread)} at {_range(spread.steps)}" if spread else ABSENT


def _range(steps: Sequence[int]) -> str:
    low, high = min(steps), max(steps)
    return str(low) if low == high else f"{low}-{high}"
