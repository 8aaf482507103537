"""Documents of a Hugging Face data set, streamed through the optional package `datasets`."""

import dataclasses
import glob
import importlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

from train.data.documents import encodable

_LEAST_VERSION = 4  # earlier versions can run code that comes with a data set
_FORMATS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
_COMPRESSION = (".gz", ".xz", ".zst")


@dataclasses.dataclass(frozen=True)
class DatasetSelection:
    """Which documents of which data set.

    Raises:
        ValueError: one line naming the value, if a field is out of range.
    """

    name: str
    """Name on the hub ("owner/name"), a local folder, or a path or glob of local .jsonl, .json,
    .parquet, .csv or .arrow files."""

    config: str | None = None
    """Configuration (subset) of the data set; None is its default."""

    split: str = "train"
    """Name of the split."""

    text_field: str = "text"
    """Column that holds the document."""

    revision: str | None = None
    """Branch, tag or commit on the hub; None is the newest."""

    max_documents: int | None = None
    """Number of leading rows to read; None reads all."""

    def __post_init__(self) -> None:
        for field in ("name", "split", "text_field"):
            if not getattr(self, field):
                raise ValueError(f"dataset: {field} must not be empty")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents={self.max_documents} must be at least 1")


class DatasetStream:
    """The documents of one selection, in the order of the data set.

    Attributes:
        description: what was read: name, config, split, revision (the commit on the hub, None for
            local files), text_field, max_documents, and null_documents (rows without text that
            were skipped; counted while reading).
        total: number of rows to come, None if the data set does not say.
    """

    def __init__(self, selection: DatasetSelection, builder: Any, rows: Any) -> None:
        self._selection, self._rows = selection, rows
        self.description: dict[str, Any] = {
            "name": selection.name,
            "config": builder.config.name,
            "split": selection.split,
            "revision": builder.hash if builder.repo_id is not None else None,
            "text_field": selection.text_field,
            "max_documents": selection.max_documents,
            "null_documents": 0,
        }
        split = (builder.info.splits or {}).get(selection.split)
        self.total: int | None = (split.num_examples or None) if split is not None else None
        if self.total is not None and selection.max_documents is not None:
            self.total = min(self.total, selection.max_documents)

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Yields (text, True) for every document, as `read_documents` does.

        Raises:
            ValueError: one line naming the data set and the row.
        """
        name, field = self._selection.name, self._selection.text_field
        rows = iter(self._rows)
        try:
            for number in itertools.count(1):
                if number - 1 == self._selection.max_documents:
                    return
                # Readers of many formats and of the network, with as many kinds of errors.
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except Exception as error:
                    raise ValueError(f"dataset {name}, row {number}: {_line(error)}") from None
                if field not in row:
                    raise ValueError(
                        f"dataset {name}, row {number}: no field {field!r} in {sorted(row)}"
                    )
                text = row[field]
                if text is None:
                    self.description["null_documents"] += 1
                    continue
                if not isinstance(text, str):
                    raise ValueError(
                        f"dataset {name}, row {number}: field {field!r} is "
                        f"{type(text).__name__}, not a string"
                    )
                yield encodable(text), True
        finally:
            # Ends a read that is under way now rather than at the end of the interpreter.
            if hasattr(rows, "close"):
                rows.close()


def open_dataset(selection: DatasetSelection) -> DatasetStream:
    """Opens a data set for one sequential read; none of its text is loaded or stored on disk.

    Raises:
        FileNotFoundError, ValueError: one line naming the data set; or how to get `datasets`.
    """
    datasets = _datasets()
    path, files = _locate(selection)
    name, local = selection.name, bool(files) or os.path.isdir(path)
    if local and selection.revision is not None:
        raise ValueError(f"dataset {name} is local, so it has no revision {selection.revision!r}")
    try:
        # What `load_dataset(..., streaming=True)` does, without hiding the commit and the sizes.
        builder = datasets.load_dataset_builder(
            path, name=selection.config, data_files=files or None, revision=selection.revision
        )
        if not local and builder.repo_id is None:
            # The name of a file format: the library would read the working directory.
            raise ValueError("neither a local path nor a name on the hub")
        rows = builder.as_streaming_dataset(split=selection.split)
        columns = rows.column_names
        if columns is not None:
            if selection.text_field not in columns:
                raise ValueError(f"no field {selection.text_field!r} in {sorted(columns)}")
            rows = rows.select_columns([selection.text_field])
    except Exception as error:  # of many libraries: network, file systems, formats
        raise ValueError(f"dataset {name}: {_line(error)}") from None
    return DatasetStream(selection, builder, rows)


def _datasets() -> Any:
    try:
        module = importlib.import_module("datasets")
        version = module.__version__  # a folder of that name has none
    except (ImportError, AttributeError):
        raise ValueError('--dataset needs datasets: pip install -e ".[data]"') from None
    if int(version.split(".")[0]) < _LEAST_VERSION:
        raise ValueError(
            f"--dataset needs datasets {_LEAST_VERSION} or newer, not {version}: "
            'pip install -U -e ".[data]"'
        )
    return module


def _locate(selection: DatasetSelection) -> tuple[str, list[str]]:
    """(path or name for the library, local data files)."""
    name = selection.name
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path, []
    if os.path.isfile(path):
        files = [path]
    elif glob.has_magic(path):
        files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not files:
            raise FileNotFoundError(f"dataset {name!r} matches no file")
    elif _suffix(path) in _FORMATS or path.startswith((os.sep, "./", "../")):
        raise FileNotFoundError(f"dataset {name!r} does not exist")
    else:
        return name, []
    suffixes = sorted({_suffix(file) for file in files})
    formats = {_FORMATS.get(suffix) for suffix in suffixes}
    if len(formats) > 1 or None in formats:
        raise ValueError(
            f"dataset {name!r} is files that end in {', '.join(map(repr, suffixes))}; they must be "
            f"of one format: {', '.join(_FORMATS)}"
        )
    if selection.config is not None:
        raise ValueError(f"dataset {name!r} is files, so it has no config {selection.config!r}")
    # Absolute, since the library reads relative ones as patterns with a base of its own; literal,
    # since a name may hold characters of patterns.
    return _FORMATS[suffixes[0]], [glob.escape(os.path.abspath(file)) for file in files]


def _suffix(path: str) -> str:
    for compression in _COMPRESSION:
        path = path.removesuffix(compression)
    return os.path.splitext(path)[1]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
