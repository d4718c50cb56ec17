"""Data: text to memory-mapped tokens, and tokens to batches."""

from moetrain.data.commands import add_build_arguments, add_info_arguments, build_command, info_command
from moetrain.data.dataset import Dataset, Split, check_vocabulary, open_dataset
from moetrain.data.index import Index, Shard
from moetrain.data.loader import IGNORED, Batch, Loader, heldout_batches, heldout_samples, num_samples
from moetrain.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "BytesTokenizer",
    "Dataset",
    "HuggingFaceTokenizer",
    "Index",
    "Loader",
    "Shard",
    "Split",
    "Tokenizer",
    "add_build_arguments",
    "add_info_arguments",
    "build_command",
    "check_vocabulary",
    "heldout_batches",
    "heldout_samples",
    "info_command",
    "load_tokenizer",
    "num_samples",
    "open_dataset",
]
