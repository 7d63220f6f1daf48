"""From raw text to what the model trains on: corpus, tokenizer, records, batches.

Batch `i` is a function of (seed, i) alone, so the whole state of the data is one integer.
"""

from liaoyuan.data.batches import Batch, RecordBatches, TokenBatches, TokenStream
from liaoyuan.data.chat import segments, tokenise
from liaoyuan.data.corpus import Corpus, CorpusConfig, load_corpus, prepare_corpus
from liaoyuan.data.file_records import FileRecords
from liaoyuan.data.formats import Examples, Tally, read_examples
from liaoyuan.data.record_cache import TokenisedFile, tokenise_file
from liaoyuan.data.record_tokens import RecordTokens, TokenisedRecord
from liaoyuan.data.records import Message, Record, ToolCall, conversations, read_records, write_records
from liaoyuan.data.tokenizer import IncrementalDecoder, Tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "CorpusConfig",
    "Examples",
    "FileRecords",
    "IncrementalDecoder",
    "Message",
    "Record",
    "RecordBatches",
    "RecordTokens",
    "Tally",
    "TokenBatches",
    "TokenStream",
    "TokenisedFile",
    "TokenisedRecord",
    "Tokenizer",
    "ToolCall",
    "conversations",
    "load_corpus",
    "prepare_corpus",
    "read_examples",
    "read_records",
    "segments",
    "tokenise",
    "tokenise_file",
    "train_tokenizer",
    "write_records",
]
