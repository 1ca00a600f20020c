"""Text: tokenizer, chat templates, incremental detokenization, stop strings. Imports no torch.

How it is used:

    tokenizer = load_tokenizer(folder)                 # None: the model has none; only token ids work
    ids = tokenizer.encode(text)                       # or tokenizer.apply_chat_template(messages, ...), whose
                                                       # template runs in a process of its own
    detokenizer = IncrementalDetokenizer.from_params(tokenizer, params)     # one per sample
    stop = detokenizer.push(new_ids)                   # a stop string: the sample has ended, its text is final
    stop = detokenizer.finish()                        # the sample ended by length or abort
    detokenizer.finish(stop_token=id)                  # it ended by EOS or a stop token that was not pushed
    detokenizer.text                                   # cumulative; what is shown does not change later
"""

from nanoengine.text.detokenizer import IncrementalDetokenizer
from nanoengine.text.templates import TemplateProcesses
from nanoengine.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["IncrementalDetokenizer", "TemplateProcesses", "Tokenizer", "load_tokenizer"]
