"""The process that compiles grammars with xgrammar: a script that imports no nanoengine.

A compilation of xgrammar cannot be interrupted, so it runs where its parent (xgrammar.py) can kill it. The standard
input is a socket. Messages are bytes with their length, as `multiprocessing.connection` sends them: first JSON of
[tokenizer.json, vocabulary size, end ids], answered by b"ready"; then JSON of [method, arguments, keywords] of a
`GrammarCompiler`, answered by b"+" and the compiled grammar as JSON, or by b"-" and an error message.
"""

import json
import os
from multiprocessing.connection import Connection
from typing import Any


def tokenizer_info(tokenizer_json: str, vocab_size: int, end_ids: list[int]) -> Any:
    """The xgrammar.TokenizerInfo of a tokenizer.json."""
    import xgrammar
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json))
    return xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=end_ids)


def main() -> None:
    connection = Connection(os.dup(0))
    try:
        info = tokenizer_info(*json.loads(connection.recv_bytes()))
        import xgrammar

        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        connection.send_bytes(b"ready")
        while True:
            method, arguments, keywords = json.loads(connection.recv_bytes())
            try:
                compiled = getattr(compiler, method)(*arguments, **keywords)
                connection.send_bytes(b"+" + compiled.serialize_json().encode())
            except Exception as error:  # noqa: BLE001 - whatever is wrong with the grammar
                connection.send_bytes(b"-" + str(error).encode("utf-8", "replace"))
    except EOFError:  # the parent has closed its end
        return


if __name__ == "__main__":
    main()
