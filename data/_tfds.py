"""Builds TFDS datasets of published data: parquet files become array_record files once, without TensorFlow.

The files come from a folder or from the Hugging Face Hub. What was made of them is kept in TFDS's own place (the
environment variable TFDS_DATA_DIR, or ~/tensorflow_datasets) under their checksum, so changed files are made anew.
Knows nothing of streams.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import filelock
import tensorflow_datasets as tfds

from . import _files, _parquet


@dataclasses.dataclass(kw_only=True)
class Files(tfds.core.BuilderConfig):
    """Lists the parquet files that a dataset is made of, by split, and their checksums by name."""

    files: Mapping[str, Sequence[pathlib.Path]] = dataclasses.field(default_factory=dict)
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)


class FromParquet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS dataset made of parquet files.

    Subclasses set:
        REPO: Their name on the Hub.
        SPLITS: The splits; the names of a split's files begin with its own.
        COLUMNS: Columns that a file must have.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look for checksums of downloads beside the module, for which it needs a package it does not require.
    code_path = None
    REPO: str
    SPLITS: tuple[str, ...]
    COLUMNS: tuple[str, ...]

    @abc.abstractmethod
    def features(self) -> tfds.features.FeaturesDict:
        """Returns the schema of an example."""

    @abc.abstractmethod
    def example(self, row: _files.Record) -> dict[str, Any]:
        """Makes an example of a row; raises ValueError with the row."""

    @abc.abstractmethod
    def identity(self, example: Mapping[str, Any]) -> str:
        """Names an example within its split."""

    @property
    def parquet(self) -> Files:
        """Returns the files that this dataset is made of."""
        assert isinstance(self.builder_config, Files)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"The parquet files of {self.REPO}, row by row.",
            homepage=_page(self.REPO),
            features=self.features(),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(sha256=dict(self.parquet.sha256)),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[tfds.Split, Any]:
        del dl_manager  # Nothing is downloaded here.
        return {tfds.Split(name): self._generate_examples(paths=paths) for name, paths in self.parquet.files.items()}

    def _generate_examples(
        self, *, paths: Sequence[pathlib.Path] = (), **_: Any
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the numbered examples of some files; equal rows count once."""
        known: dict[str, tuple[str, str]] = {}  # What was read under an identity, and where.
        for path in paths:
            for row in _parquet.read(path, self.COLUMNS):
                example = self.example(row)
                content = hashlib.sha256(repr(example).encode()).hexdigest()
                earlier, where = known.setdefault(self.identity(example), (content, row.where))
                if earlier != content:
                    raise ValueError(
                        f"{row.where}: {self.identity(example)} stands in {where} as well, with another content. "
                        "Remove one of the two, or move the file out of data.source_dir."
                    )
                if where == row.where:  # This row was the first with its identity.
                    yield len(known) - 1, example


def rows(builder: type[FromParquet], source_dir: str, splits: Sequence[str]) -> list[Sequence[Mapping[str, Any]]]:
    """Returns the examples of some splits, with random access; texts are bytes.

    Args:
        source_dir: The folder that holds the parquet files, or one that holds this folder under the name that the Hub
            has for it; "" for the Hub itself.
        splits: Some of `builder.SPLITS`.

    Raises:
        ValueError: the Hub cannot be reached, there is no such folder or split, or a file is broken (with its row).
    """
    files = _by_split(builder, pathlib.Path(source_dir or _download(builder.REPO)))
    missing = [split for split in splits if split not in files]
    if missing:
        raise ValueError(
            f"{source_dir or builder.REPO!r} has no split {missing[0]!r} of {builder.REPO}, only "
            f"{', '.join(files)}. Put its files there ({missing[0]}*.parquet), or ask for a split that is there."
        )
    # TFDS keeps what was made under the name of the config: here a checksum of all files, so that changed ones are
    # made anew, and what was made of others stays.
    sha256 = {path.name: _parquet.checksum(path) for paths in files.values() for path in paths}
    digest = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            digest.update(f"{split} {path.name} {sha256[path.name]}\n".encode())
    data_dir = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    config = Files(name=digest.hexdigest()[:16], files=files, sha256=sha256)
    with _quiet():
        made = builder(data_dir=data_dir, config=config, file_format="array_record")
        folder = data_dir / made.name
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f"{config.name}.lock"):  # Several processes may begin at the same time.
            made.download_and_prepare()
        sources: Any = made.as_data_source()  # By split.
    return [sources[split] for split in splits]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS, whose messages are not about our data."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)


def splits(builder: type[FromParquet], split: str) -> list[str]:
    """Returns the splits of a builder that a `StreamSpec.split` means.

    Raises:
        ValueError: it has none of them.
    """
    if split == "all":
        return list(builder.SPLITS)
    if split in builder.SPLITS:
        return [split]
    raise ValueError(
        f"{builder.REPO} has no split {split!r}, only {', '.join(builder.SPLITS)}. For training and held-out streams "
        "of different data sets, set data.name and data.test_name."
    )


def _by_split(builder: type[FromParquet], folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Finds the files of each split in a folder, or in the one within it that is called as on the Hub."""
    inner = folder / builder.REPO.partition("/")[2]
    formats = f"parquet files of {builder.REPO} (with the columns {', '.join(builder.COLUMNS)})"
    paths = _files.find(str(inner if inner.is_dir() else folder), _parquet.SUFFIXES, formats)
    found: dict[str, list[pathlib.Path]] = {}
    others = []
    for path in paths:
        split = next((name for name in builder.SPLITS if _begins(path, name)), None)
        lacks = [column for column in builder.COLUMNS if column not in _parquet.columns(path)]
        if split is None or lacks:
            others.append(f"{path.name} ({'lacks ' + ', '.join(lacks) if lacks else 'of no split, by its name'})")
        else:
            found.setdefault(split, []).append(path)
    if not found:
        raise ValueError(
            f"data.source_dir {str(folder)!r} holds no {formats}; "
            + (f"its parquet files are others: {'; '.join(others[:5])}. " if others else "it has no parquet files. ")
            + f"Put the files of {_page(builder.REPO)} there."
        )
    return {split: found[split] for split in builder.SPLITS if split in found}


def _begins(path: pathlib.Path, start: str) -> bool:
    return re.match(rf"{re.escape(start)}(?![a-z0-9])", path.name, re.IGNORECASE) is not None


def _download(repo: str) -> str:
    """Fetches a data set from the Hub, and returns the folder with it."""
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns="*.parquet")
    except Exception as error:  # Whatever it is: no network, no such data set, no rights.
        raise ValueError(
            f"{repo} could not be fetched from the Hugging Face Hub ({str(error).partition(chr(10))[0]}). Fetch the "
            f"parquet files of {_page(repo)} elsewhere, and set data.source_dir to their folder."
        ) from error


def _page(repo: str) -> str:
    return f"https://huggingface.co/datasets/{repo}"
