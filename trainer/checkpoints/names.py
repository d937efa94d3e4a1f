"""What the ending of a checkpoint's name promises: a format that we write, or one of another program."""

from pathlib import Path

from trainer.errors import ArgumentError

_TORCH = "; save a name in .safetensors, which `safetensors.torch.load_file` reads"
_ARCHIVE = "; save a name in .msgpack, and pack that file"
_NUMPY = "; save a name in .msgpack, and run `trainer convert` on it with a target in .npz"

_FOREIGN = {
    **dict.fromkeys((".pt", ".pth"), ("a file of PyTorch", _TORCH)),
    **dict.fromkeys((".h5", ".hdf5", ".keras"), ("an HDF5 file of Keras", "")),
    ".ckpt": ("a checkpoint of PyTorch Lightning or TensorFlow", ""),
    ".npz": ("an archive of NumPy, which holds no whole run", _NUMPY),
    ".npy": ("a single array of NumPy", _NUMPY),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z"), ("an archive", _ARCHIVE)),
    **dict.fromkeys((".pickle", ".joblib"), ("a pickle of any objects", "; the reference's pickle layout is .pkl")),
    **dict.fromkeys((".onnx", ".pb", ".tflite", ".gguf"), ("a model with its program", "")),
    **dict.fromkeys((".json", ".yaml", ".yml", ".toml", ".csv", ".txt"), ("a text", "")),
    **dict.fromkeys((".zarr", ".parquet", ".arrow", ".feather", ".mat"), ("a file of tables or arrays", "")),
}
"""Endings that name the format of another program: what they promise, and what to do."""


def suffix_of(path: Path) -> str:
    """Returns the ending of a name that decides the format, in lower case: ``.PKL`` promises what ``.pkl`` does."""
    return path.suffix.lower()


def refuse_foreign(path: Path) -> None:
    """Refuses a name that promises the format of another program. An ending that nobody knows promises nothing.

    Raises:
        ArgumentError: The ending is that of another format.
    """
    suffix = suffix_of(path)
    if suffix in _FOREIGN:
        what, instead = _FOREIGN[suffix]
        raise ArgumentError(
            f"`{path}` ends in {path.suffix!r}, which promises {what}; checkpoints are .msgpack, .orbax, .pkl or "
            f".safetensors{instead}."
        )
