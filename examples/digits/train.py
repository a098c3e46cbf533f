"""Trains a network on scikit-learn's images of handwritten digits, and computes its answers for those it never saw.

.venv-mlserver/bin/python examples/digits/train.py DIRECTORY

DIRECTORY then holds `repository`, a model repository for MLServer, and `test.npz` with the images that were kept back:
`images` (450, 64) float32, their `labels`, and what the network says of each, `predictions`.
"""

import pathlib
import shutil
import sys

import joblib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

HERE = pathlib.Path(__file__).resolve().parent
SEED = 0


def main(directory: pathlib.Path) -> None:
    """One hidden layer of 64 units is right about 97 of 100 images after a second of training."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images.astype("float32"), labels, test_size=0.25, random_state=SEED, stratify=labels
    )
    network = MLPClassifier(hidden_layer_sizes=(64,), max_iter=300, random_state=SEED)
    network.fit(train_images, train_labels)
    shutil.copytree(HERE / "repository", directory / "repository", dirs_exist_ok=True)
    joblib.dump(network, directory / "repository" / "digits" / "model.joblib")
    # One image at a time: nothing of how the router batches is in these.
    predictions = [network.predict(image[np.newaxis])[0] for image in test_images]
    np.savez(directory / "test.npz", images=test_images, labels=test_labels, predictions=predictions)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
