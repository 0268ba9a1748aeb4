"""The report: what the records of a folder say, as one self-contained page and as Markdown.

`records` reads them, `lines` lays any of them out as a table, `operations` and `sections` say what a reader should
see of those that are known, `charts` draws, `page` writes.
"""

from gradlab.bench.report.page import write

__all__ = ["write"]
