"""Make the samples from the original files of Fashion-MNIST: python samples/make.py [FOLDER OF THE FOUR FILES].

The first 600 training and 100 test images of each class, in their original order, as gzipped IDX files like the
originals.
Same input, same bytes.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ghostnet.data.datasets import DEBIAN_FASHION_MNIST, read_idx  # noqa: E402

for prefix, per_class in (("train", 600), ("t10k", 100)):
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DEBIAN_FASHION_MNIST
    images = read_idx(source, f"{prefix}-images-idx3-ubyte", 3)
    labels = read_idx(source, f"{prefix}-labels-idx1-ubyte", 1)
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)]))
    for kind, array in (("images-idx3", images[chosen]), ("labels-idx1", labels[chosen])):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        data = gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0)
        path = HERE / f"{prefix}-{kind}-ubyte.gz"
        path.write_bytes(data)
        print(f"{path.name}: {array.shape}, {len(data):,} bytes")
