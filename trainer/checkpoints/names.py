"""Which format the suffix of a checkpoint's path implies: one that we write, or another program's."""

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
"""Suffixes that imply another program's format: what they imply, and what to do instead."""


def suffix_of(path: Path) -> str:
    """Returns the suffix that decides the format, in lower case: ``.PKL`` means the same as ``.pkl``."""
    return path.suffix.lower()


def refuse_file_name(directory: Path) -> None:
    """Refuses a directory of checkpoints that is named as a file, or as a pattern of names.

    Raises:
        ArgumentError: It is.
    """
    suffix = suffix_of(directory)
    if suffix in _FOREIGN or suffix in (".msgpack", ".pkl", ".safetensors") or "{" in directory.name:
        raise ArgumentError(
            f"`dirpath` is `{directory}`, the name of a file; pass that of a directory, such as "
            f"'{directory.name.partition('.')[0].partition('{')[0] or 'best'}', for checkpoints named by their steps."
        )


def refuse_foreign(path: Path) -> None:
    """Refuses a path whose suffix implies another program's format. Unknown suffixes imply nothing.

    Raises:
        ArgumentError: The suffix implies another format.
    """
    suffix = suffix_of(path)
    if suffix in _FOREIGN:
        what, instead = _FOREIGN[suffix]
        raise ArgumentError(
            f"`{path}` ends in {path.suffix!r}, which promises {what}; checkpoints are .msgpack, .orbax, .pkl or "
            f".safetensors{instead}."
        )
