"""Writes python_docs.txt.xz from the documentation topics in Python's standard library.

    python train/data/embedded/generate.py

The committed file came from CPython 3.12. Licence: LICENSE.txt and NOTICE.md beside this file.
"""

import lzma
import pydoc_data.topics
import random
from pathlib import Path

SEPARATOR = "\f"


def main() -> None:
    documents = [text.strip() + "\n" for text in pydoc_data.topics.topics.values()]
    assert not any(SEPARATOR in document for document in documents)
    # Topics come in the order of the alphabet; the held-out tail should be of the same kind.
    random.Random(0).shuffle(documents)
    path = Path(__file__).with_name("python_docs.txt.xz")
    path.write_bytes(lzma.compress(SEPARATOR.join(documents).encode(), preset=9))
    print(f"{path}: {len(documents)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
