"""A file of examples in any known layout becomes a file of records, one after another: a large one needs no memory."""

from collections.abc import Iterator
from pathlib import Path

from liaoyuan.data.formats import Examples, Tally, check_tally
from liaoyuan.data.records import Record, write_records
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, Report, silent

TOLD_EVERY = 1000  # records between two reports


def convert_file(source: Path, out: Path, skip_bad: bool = False, licence: str = "", report: Report = silent) -> Tally:
    """Write the records of `source` to `out` and return what was in it; `licence` is of records that name none.

    Raises:
        LiaoyuanError: the file cannot be read, gives no record, or has bad lines and `skip_bad` is not set (then
            nothing is written); `out` is no name of a file of records, or is the source itself.
    """
    if not out.name.removesuffix(".zst").endswith(".jsonl"):
        raise LiaoyuanError(f"Records are written as JSON lines: {out} must end with .jsonl or .jsonl.zst.")
    if out.exists() and source.exists() and out.samefile(source):
        raise LiaoyuanError(f"{out} is the file that is to be read: choose another name.")
    examples = Examples(source)
    write_records(out, _told(examples, licence, skip_bad, report))
    return examples.tally


def _told(examples: Examples, licence: str, skip_bad: bool, report: Report) -> Iterator[Record]:
    total = max(1, examples.path.stat().st_size // 1000) if examples.path.exists() else 1
    for number, record in enumerate(examples):
        if number % TOLD_EVERY == 0:
            report(Progress(min(examples.position // 1000, total), total, "kB", f"{number:,} records"))
        yield record if record.licence or not licence else record.model_copy(update={"licence": licence})
    check_tally(examples.path, examples.tally, skip_bad)  # raised in here, it keeps the file from being written
    report(Progress(total, total, "kB", f"{examples.tally.records:,} records"))
