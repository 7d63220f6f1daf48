"""Training state that resumes bit for bit, and Hugging Face weights in and out.

`load_model` and `save_model` read and write the folder that transformers reads; nothing is ever unpickled.
"""

from liaoyuan.checkpoint.hugging_face import (
    load_model,
    load_weights,
    quantisation_for,
    read_parts,
    read_weights,
    save_model,
    save_program,
)

__all__ = ["load_model", "load_weights", "quantisation_for", "read_parts", "read_weights", "save_model", "save_program"]
