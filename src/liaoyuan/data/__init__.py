"""From raw text to what the model trains on: corpus, tokenizer, records, batches.

Batch `i` is a function of (seed, i) alone, so the whole state of the data is one integer.
"""

from liaoyuan.data.batches import Batch, RecordBatches, TokenBatches, TokenisedRecord, TokenStream
from liaoyuan.data.chat import segments, tokenise
from liaoyuan.data.corpus import Corpus, CorpusConfig, load_corpus, prepare_corpus
from liaoyuan.data.formats import Examples, Tally, read_examples
from liaoyuan.data.records import Message, Record, ToolCall, conversations, read_records, write_records
from liaoyuan.data.tokenizer import IncrementalDecoder, Tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "CorpusConfig",
    "Examples",
    "IncrementalDecoder",
    "Message",
    "Record",
    "RecordBatches",
    "Tally",
    "TokenBatches",
    "TokenStream",
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
    "train_tokenizer",
    "write_records",
]
