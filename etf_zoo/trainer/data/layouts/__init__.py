"""Where rows come from, by the way they lie there: folders, tables, zip files, parquet files, and the Hub.

A reader has `source`, `splits`, and `read(split)`, which gives encoded images, labels, and the names of the classes
where those are stated; `found`, where files were looked through; and `below`, where paths in its rows may lead.
"""

from .found import Found, role, shown
from .hub import DatasetsReader
from .readers import FilesReader, Reader, find_files, find_reader

__all__ = ["DatasetsReader", "FilesReader", "Found", "Reader", "find_files", "find_reader", "role", "shown"]
