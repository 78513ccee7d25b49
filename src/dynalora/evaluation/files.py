"""Rows and texts, from wherever they lie: files of several kinds, folders, the Hugging Face Hub, plain text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from dynalora.common.names import is_path
from dynalora.errors import DataError, first_line

FILE_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_OTHER_KINDS = (
    ".txt",
    ".md",
    ".text",
    ".arrow",
    ".doc",
    ".docx",
    ".html",
    ".pdf",
    ".xls",
    ".xlsx",
    ".xml",
    ".yaml",
    ".yml",
    ".zip",
)
"""Endings of names that are those of files, and not of data sets on the Hub."""
SAME_SPLIT = {"valid": "dev", "validation": "dev", "eval": "dev"}
TEXT_FIELDS = ("text", "content", "document")

Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Where each row lies (such as `"line 3"`), and its fields."""


def read_rows(source: str | Path, *, split: str = "train", subset: str | None = None) -> tuple[Rows, str]:
    """The rows of a data set as they are, one after the other.

    Args:
        source: A file of `FILE_KINDS` (`.gz` may follow), a folder of such files or one written by
            `Dataset.save_to_disk`, or the id of a data set on the Hugging Face Hub.
        split: Which split of a Hub data set; in a folder, the files whose name begins with it, or all files if
            none does and it is `train`. A single file is `train`, and has no other splits.
        subset: Which configuration of a Hub data set, for those that have several.

    Returns:
        Pairs of where a row lies (such as `"line 3"`) and the row; and how to call the source in errors.

    Raises:
        DataError: The source does not exist or cannot be read; of files, while the rows are taken.
    """
    path = Path(source).expanduser()
    if path.is_file():
        _refuse_parts(path, split, subset)
        return file_rows(path), f"'{path}'"
    if path.is_dir():
        _refuse_parts(path, split, subset)
        return _folder_rows(path, split), f"'{path}'"
    if path.exists():
        raise DataError(
            f"'{source}' is neither a file nor a folder; give a file, a folder or a data set id of the Hub."
        )
    if isinstance(source, Path) or _looks_like_a_path(str(source)):
        raise DataError(f"There is no file or folder '{source}'; give a file, a folder or a data set id of the Hub.")
    return hub_rows(str(source), split, subset), f"'{source}'"


def _refuse_parts(path: Path, split: str, subset: str | None) -> None:
    """Refuse a split or subset that was asked of a file or folder, which has none.

    Raises:
        DataError: One was.
    """
    if subset is not None:
        raise DataError(f"'{path}' is no data set of the Hub and has no subset '{subset}'; leave out `subset`.")
    if path.is_file() and split != "train":
        raise DataError(
            f"'{path}' is a single file, which has no split '{split}'; leave the split out, or give a folder with a "
            "file for each split."
        )


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    words = {dict: "a JSON object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")


def _looks_like_a_path(source: str) -> bool:
    stem = source[:-3] if source.endswith(".gz") else source
    return stem.lower().endswith((*FILE_KINDS, *_OTHER_KINDS)) or is_path(source)


def _file_kind(path: Path) -> str:
    name = path.name.lower()
    return Path(name[:-3] if name.endswith(".gz") else name).suffix


def file_rows(path: Path) -> Rows:
    """The rows of one data file.

    Raises:
        DataError: While the rows are taken, if the file cannot be read or is of no known kind.
    """
    kind = _file_kind(path)
    if kind not in FILE_KINDS:
        raise DataError(
            f"'{path}' is of no known kind ('{kind}'); known are {', '.join(FILE_KINDS)}, with or without .gz."
        )
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    with _reading(path) as file:
        if kind in (".csv", ".tsv"):
            yield from _csv_rows(path, file, "\t" if kind == ".tsv" else None)
        elif kind == ".json":
            yield from _json_rows(path, file)
        else:
            yield from _json_lines(path, file)


def split_files(stem: Path, kinds: Sequence[str] = FILE_KINDS) -> dict[str, Path]:
    """The files of a data set's splits: `<stem>.<split>.jsonl`, or `<split>.jsonl` inside a folder, gzipped or not.

    Args:
        stem: The folder, or the beginning of the files' names.
        kinds: Endings of files that count, without `.gz`.

    Returns:
        Split → file; `valid`, `validation` and `eval` are called `dev`.
    """
    folder, lead = (stem, "") if stem.is_dir() else (stem.parent, f"{stem.name}.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = path.name.removesuffix(".gz")
        kind = next((kind for kind in kinds if name.endswith(kind)), None)
        if kind is None or not name.startswith(lead) or not path.is_file():
            continue
        split = name[len(lead) : -len(kind)]
        if split and "." not in split:
            files.setdefault(SAME_SPLIT.get(split, split), path)
    return files


def is_text(path: Path) -> bool:
    """Whether this is a file of plain text: any file that is no data file."""
    return path.is_file() and _file_kind(path) not in FILE_KINDS


def text_lines(path: Path) -> Rows:
    """The lines of a plain text file as rows with the field `text`, line ends included.

    Raises:
        DataError: While they are taken, if the file cannot be read.
    """
    with _reading(path) as file:
        for number, line in enumerate(file, start=1):
            yield f"line {number}", {"text": line}


def passages(path: Path) -> Iterator[str]:
    """The passages of a plain text file: what lies between blank lines.

    Raises:
        DataError: While they are taken, if the file cannot be read.
    """
    passage: list[str] = []
    for _, row in text_lines(path):
        if row["text"].strip():
            passage.append(row["text"])
        elif passage:
            yield "".join(passage).strip("\n")
            passage = []
    if passage:
        yield "".join(passage).strip("\n")


def text_field_of(names: Iterable[str]) -> str | None:
    """The first of `TEXT_FIELDS` among a row's fields; None if there is none."""
    has = list(names)
    return next((name for name in TEXT_FIELDS if name in has), None)


def texts_of(rows: Rows, name: str | None, source: str) -> Iterator[str]:
    """The texts in a field of rows; a field that is null or NaN is an empty text.

    Args:
        rows: Where each row lies, and the row.
        name: Of the field; None: the first of `TEXT_FIELDS` that the first row has.
        source: How to call the source in errors.

    Raises:
        DataError: While they are taken, if a row has no text there.
    """
    for where, row in rows:
        if name is None:
            name = text_field_of(row) or TEXT_FIELDS[0]
        missing = name in row and row[name] != row[name]  # NaN, as pandas writes it
        if name not in row or not (missing or isinstance(row[name], (str, type(None)))):
            has = ", ".join(f"'{key}'" for key in row)
            raise DataError(f"{source}, {where}: there is no text in the field '{name}'; its fields are {has}.")
        yield "" if missing else (row[name] or "").strip()


def some_texts(texts: Iterable[str], limit: int | None, source: str) -> list[str]:
    """The first texts that are not empty.

    Raises:
        DataError: There is none.
    """
    chosen = list(islice((text for text in texts if text.strip()), limit))
    if not chosen:
        raise DataError(f"{source} holds no text; give one with at least one passage.")
    return chosen


@contextmanager
def _reading(path: Path) -> Iterator[IO[str]]:
    """A file of text, gzipped or not; what goes wrong with it, here or while it is read, is a DataError."""
    packed = path.name.lower().endswith(".gz")
    # Rows of CSV may hold line ends, which must stay as they are.
    newline = "" if _file_kind(path) in (".csv", ".tsv") else None
    try:
        # utf-8-sig reads files with and without the byte-order mark that Excel writes.
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
            if packed
            else open(path, encoding="utf-8-sig", newline=newline) as file
        ):
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"'{path}' is not a complete gzip file ({error}); fetch it again.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}', line {_undecodable_line(path, packed)}: not UTF-8 text ({error.reason}); convert the file to "
            "UTF-8, or take out what is half of a character."
        ) from error
    except OSError as error:
        raise DataError(
            f"'{path}' cannot be read ({error.strerror or error}); give a file that is there and may be read."
        ) from error


def _undecodable_line(path: Path, packed: bool) -> int:
    """The first line that is no UTF-8, since the error counts bytes from somewhere within the file."""
    with gzip.open(path) if packed else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return number


def refuse_halves(value: Any, where: str, name: str = "") -> None:
    """Refuse text with half of a character, which JSON can hold and UTF-8 cannot.

    Raises:
        DataError: There is one; names its field.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: field '{name}' holds half of a character (a lone surrogate, as of an emoji that was cut in "
                "two), which no tokenizer can read; write the file anew, or take the character out."
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_halves(key, where, name or "of a name")
            refuse_halves(item, where, name or key)
    elif isinstance(value, list):
        for item in value:
            refuse_halves(item, where, name)


def _json_lines(path: Path, file: Iterable[str]) -> Rows:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"'{path}', line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "each line must be one JSON object."
            ) from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists without end
            raise DataError(f"'{path}', line {number}: JSON that cannot be read ({first_line(error)}).") from None
        if not isinstance(row, dict):
            raise DataError(
                f"'{path}', line {number}: holds {kind_of(row)}; each line must be one JSON object with named fields."
            )
        if "\\u" in line:
            refuse_halves(row, f"'{path}', line {number}")
        yield f"line {number}", row


def _json_rows(path: Path, file: IO[str]) -> Rows:
    text = file.read()
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        # Many files called .json hold JSON lines: told by a first line that is an object of its own.
        beginning = text.lstrip().split("\n", 1)[0]
        if beginning.startswith("{") and beginning.rstrip().endswith("}"):
            yield from _json_lines(path, io.StringIO(text))
            return
        raise DataError(f"'{path}', line {error.lineno}: not valid JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' holds JSON that cannot be read ({first_line(error)}).") from None
    if isinstance(content, dict):
        lists = {name: value for name, value in content.items() if isinstance(value, list)}
        if len(lists) != 1:
            if not lists:
                yield "the only row", content
                return
            raise DataError(
                f"'{path}' holds several lists ({', '.join(lists)}); keep one, or write one JSON object per line."
            )
        # A lone chat is a row, not a list of rows.
        (name, content_list), *_ = lists.items()
        if name in ("messages", "conversations"):
            yield "the only row", content
            return
        content = content_list
    if not isinstance(content, list):
        raise DataError(f"'{path}' holds {kind_of(content)}, not a list of JSON objects.")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise DataError(f"'{path}', row {number}: holds {kind_of(row)}, not a JSON object with named fields.")
        refuse_halves(row, f"'{path}', row {number}")
        yield f"row {number}", row


def _csv_rows(path: Path, file: IO[str], delimiter: str | None) -> Rows:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is less than one long document
    if delimiter is None:
        first = file.readline()
        # Comma is the standard; semicolons are what spreadsheets write in countries with a decimal comma.
        delimiter = ";" if first.count(";") > first.count(",") else ","
        lines: Iterable[str] = _chain(first, file)
    else:
        lines = file
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                header = ", ".join(repr(name) for name in reader.fieldnames or [])
                raise DataError(
                    f"'{path}', line {reader.line_num}: more cells than the header has fields ({header}); "
                    f"quote cells that hold a '{delimiter}'."
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"'{path}', line {reader.line_num}: not valid CSV ({error}).") from None


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _as_written(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a table without the nulls that Arrow puts into nested objects, where other rows have further keys."""

    def cleared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleared(item) for key, item in value.items() if item is not None}
        return [cleared(item) for item in value] if isinstance(value, list) else value

    return {name: cleared(value) for name, value in row.items()}


def _parquet_rows(path: Path) -> Rows:
    import datasets

    try:
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow's errors share no base class with datasets'
        raise DataError(f"'{path}' is not a readable Parquet file ({first_line(error)}).") from error
    for number, row in enumerate(table, start=1):
        yield f"row {number}", _as_written(row)


def _folder_rows(folder: Path, split: str) -> Rows:
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        import datasets

        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise DataError(f"'{folder}' is not a readable saved data set ({first_line(error)}).") from error
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise DataError(f"'{folder}' has no split '{split}'; its splits are {', '.join(loaded)}.")
            loaded = loaded[split]
        for number, row in enumerate(loaded, start=1):
            yield f"row {number}", _as_written(row)
        return
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and _file_kind(entry) in FILE_KINDS)
    if not files:
        raise DataError(f"The folder '{folder}' holds no data file ({', '.join(FILE_KINDS)}, with or without .gz).")
    names = {split.lower(), SAME_SPLIT.get(split.lower(), split.lower())}
    names |= {alias for alias, name in SAME_SPLIT.items() if name in names}
    chosen = [entry for entry in files if entry.name.lower().startswith(tuple(names))]
    if not chosen and split != "train":
        listed = ", ".join(entry.name for entry in files[:8])
        raise DataError(
            f"'{folder}' has no split '{split}' (no file whose name begins so; there are {listed}); name another split."
        )
    for file in chosen or files:
        for where, row in file_rows(file):
            yield f"{file.name} {where}", row


def hub_rows(
    name: str,
    split: str,
    subset: str | None = None,
    *,
    revision: str | None = None,
    remedy: str = "check its name, or give a file or folder",
) -> Rows:
    """The rows of a data set on the Hugging Face Hub.

    Args:
        name: Its id.
        split: The Hub's name of the split.
        subset: Which configuration, for those that have several.
        revision: The Hub's branch; None: its main one.
        remedy: What to do where it cannot be loaded, for the error.

    Raises:
        DataError: When the first row is taken, if it cannot be loaded.
    """
    import datasets

    label = f"'{name}'" + (f" ({subset})" if subset else "")
    try:
        loaded = datasets.load_dataset(name, name=subset, split=split, revision=revision)
    except Exception as error:
        # datasets raises its own, the hub client's, the network's and pyarrow's errors here; their first line says
        # what happened and often lists the configurations or splits that exist.
        raise DataError(
            f"The data set {label}, split '{split}', cannot be loaded ({first_line(error)}); {remedy}."
        ) from error
    for number, row in enumerate(loaded, start=1):
        yield f"row {number}", _as_written(row)
