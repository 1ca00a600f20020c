"""A tiny random OPT, in transformers' format."""

import os
import shutil
import tempfile
from pathlib import Path

from transformers import OPTConfig, OPTForCausalLM

from nanoengine.testing import randomise
from nanoengine.testing.checkpoints import SPECIAL_TOKENS, write_byte_tokenizer


def write(folder, **changes):
    """Writes the whole folder or nothing. `changes`: fields of transformers' OPTConfig."""
    pad, start, end = range(256, 256 + len(SPECIAL_TOKENS))  # after the 256 bytes
    ids = {"vocab_size": end + 1, "pad_token_id": pad, "bos_token_id": start, "eos_token_id": end}
    sizes = {"hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(**{**ids, **sizes, "word_embed_proj_dim": 48, "max_position_embeddings": 256, **changes})
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        # Answers depend on the prompt, and no bias is zero: a test sees a mistake in the use of any tensor.
        randomise(OPTForCausalLM(config), seed=0).save_pretrained(beside)
        write_byte_tokenizer(beside)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder
